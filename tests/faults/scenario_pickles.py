"""No pickle is ever run: payloads in every kind of file, handed to every command, and not one canary or audit event."""

import itertools
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.payloads import CARRIERS, as_it_is, as_old, as_safetensors, as_zip, bites, canary_is_there, payloads
from faults.result import Outcome, Scale
from support.run_fixture import (
    CAPTIONS,
    CHECKPOINT,
    FEATURES,
    OPTIMIZER,
    PARAMS,
    SHARD,
    STATE,
    TINY,
    TOKENIZER,
    TRAIN,
    WEIGHTS,
    Home,
    make_home,
)
from support.warm_process import Resident, residents

NAME, TITLE = "pickles", "Pickle payloads through train, resume, eval, convert, check, plan: none is run (canaries and an audit hook)"
MINUTES = (0.8, 4.0)
Carrier = Callable[[bytes], bytes]
Door = tuple[str, str, tuple[Carrier, ...]]  # a command, the file it is handed, and what the payload comes as
LINEAGE = "lineage.pth"
OUT = OPTIMIZER.replace("run/", "out/")
DOORS: dict[str, list[Door]] = {
    "train": [
        ("", FEATURES, CARRIERS),
        ("", SHARD, (as_zip, as_old)),
        ("", CAPTIONS, (as_it_is,)),
        ("", TRAIN, (as_it_is,)),
        ("", TOKENIZER, (as_it_is,)),
        ("", PARAMS, (as_it_is,)),
        ("--config {home}/r.yaml", "r.yaml", (as_it_is,)),
    ],
    "resume": [
        ("--resume {home}/lineage.pth", LINEAGE, CARRIERS),
        ("--output_dir {home}/run", OPTIMIZER, (as_safetensors, as_zip)),
        ("--output_dir {home}/run", STATE, (as_it_is,)),
        ("--output_dir {home}/run", "run/args.json", (as_it_is,)),
    ],
    "eval": [
        ("eval --resume {home}/lineage.pth", LINEAGE, CARRIERS),
        (f"eval --resume {{home}}/{CHECKPOINT}", WEIGHTS, (as_safetensors, as_zip)),
        (f"eval --resume {{home}}/{CHECKPOINT}", STATE, (as_it_is,)),
    ],
    "convert": [
        ("!convert {home}/lineage.pth {home}/x.safetensors", LINEAGE, CARRIERS),
        (f"!convert {{home}}/{CHECKPOINT} {{home}}/x.pth", WEIGHTS, (as_safetensors, as_zip)),
        (f"!convert {{home}}/{TINY} {{home}}/hf", SHARD, (as_zip, as_old)),
    ],
    "check": [("check", FEATURES, CARRIERS), ("check", SHARD, (as_zip,)), ("check --resume {home}/lineage.pth", LINEAGE, (as_zip, as_old))],
    "plan": [(f"!plan --gpu H100 --model {{home}}/{TINY}", PARAMS, (as_it_is,))],
}
OWN_ERRORS = "pickle.find_class ('vico.errors', "  # a rank's refusal, on its way to the others


def run(scale: Scale) -> Outcome:
    canary = scale.folder / "canary"
    found = payloads(canary)
    faults = [f"{name}: the payload does not bite, so it proves nothing" for name, payload in found.items() if not bites(payload, canary)]
    with residents(2) as workers:
        original = make_home(scale.folder / "original", workers[0])
        jobs = [
            (name, door, *choice)
            for i, name in enumerate(found)
            for door, ways in DOORS.items()
            for choice in _choices(ways, i if scale.quick else None)
        ]
        free: queue.SimpleQueue[Resident] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def attempt(job: tuple[str, str, str, str, Carrier]) -> str | None:
            worker = free.get()
            try:
                name, _, line, target, carrier = job
                return try_payload(carrier(found[name]), line, target, original, scale.folder / str(id(worker)), canary, worker)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(workers)) as pool:
            results = list(pool.map(attempt, jobs))
    faults += [f"{j[0]} as {j[4].__name__} in {j[3]}, {j[1]}: {fault}" for j, fault in zip(jobs, results, strict=True) if fault]
    total = len(found) + len(jobs)
    return Outcome(total - len(faults), total, {"payloads": len(found), "loadings": len(jobs), "doors": list(DOORS), "failures": faults})


def _choices(ways: list[Door], turn: int | None) -> list[tuple[str, str, Carrier]]:
    """All, or one that is another at every turn."""
    every = [(line, target, carrier) for line, target, carriers in ways for carrier in carriers]
    return every if turn is None else list(itertools.islice(every, turn % len(every), turn % len(every) + 1))


def try_payload(content: bytes, line: str, target: str, original: Home, folder: Path, canary: Path, worker: Resident) -> str | None:
    shutil.rmtree(folder, ignore_errors=True)
    home, watched = original.copy(folder), folder.with_suffix(".watched")
    watched.write_text("")
    (home.folder / target).write_bytes(content)
    ended = worker.run(home.command(line), home.folder, watched=watched)
    events = [event for event in watched.read_text().splitlines() if not event.startswith(OWN_ERRORS)]
    faults = {
        "the canary is there": canary_is_there(canary),
        f"ran {events}": bool(events),
        f"exit code {ended.code}: {ended.err[-300:]!r}": ended.code not in (2, 3),
        f"not one line: {ended.err[-300:]!r}": ended.err.count("\n") != 1 or "Traceback" in ended.out,
    }
    return "; ".join(what for what, so in faults.items() if so) or None
