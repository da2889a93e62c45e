"""No pickle is ever run: payloads in every kind of file, handed to every command, and not one canary or audit event."""

import itertools
import queue
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.payloads import (
    CARRIERS,
    as_it_is,
    as_old,
    as_safetensors,
    as_zip,
    bites,
    canary_is_there,
    payloads,
)
from faults.result import Result, Scale
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
    RunFixture,
    make_run_fixture,
)
from support.warm_process import WarmProcess, warm_processes

NAME = "pickles"
TITLE = "pickle payloads through six commands: none is run (canaries and an audit hook)"
MINUTES = (0.8, 4.0)
Carrier = Callable[[bytes], bytes]
Door = tuple[
    str, str, tuple[Carrier, ...]
]  # a command, the file it is handed, and what the payload comes as
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
        ("--config {fixture}/r.yaml", "r.yaml", (as_it_is,)),
    ],
    "resume": [
        ("--resume {fixture}/lineage.pth", LINEAGE, CARRIERS),
        ("--output_dir {fixture}/run", OPTIMIZER, (as_safetensors, as_zip)),
        ("--output_dir {fixture}/run", STATE, (as_it_is,)),
        ("--output_dir {fixture}/run", "run/args.json", (as_it_is,)),
    ],
    "eval": [
        ("eval --resume {fixture}/lineage.pth", LINEAGE, CARRIERS),
        (f"eval --resume {{fixture}}/{CHECKPOINT}", WEIGHTS, (as_safetensors, as_zip)),
        (f"eval --resume {{fixture}}/{CHECKPOINT}", STATE, (as_it_is,)),
    ],
    "convert": [
        ("!convert {fixture}/lineage.pth {fixture}/x.safetensors", LINEAGE, CARRIERS),
        (f"!convert {{fixture}}/{CHECKPOINT} {{fixture}}/x.pth", WEIGHTS, (as_safetensors, as_zip)),
        (f"!convert {{fixture}}/{TINY} {{fixture}}/hf", SHARD, (as_zip, as_old)),
    ],
    "check": [
        ("check", FEATURES, CARRIERS),
        ("check", SHARD, (as_zip,)),
        ("check --resume {fixture}/lineage.pth", LINEAGE, (as_zip, as_old)),
    ],
    "plan": [(f"!plan --gpu H100 --model {{fixture}}/{TINY}", PARAMS, (as_it_is,))],
}
OWN_ERRORS = "pickle.find_class ('vico.errors', "  # a rank's refusal, on its way to the others


def run(scale: Scale) -> Result:
    canary = scale.folder / "canary"
    found = payloads(canary)
    faults = [
        f"{name}: the payload does not bite, so it proves nothing"
        for name, payload in found.items()
        if not bites(payload, canary)
    ]
    with warm_processes(2) as workers:
        original = make_run_fixture(scale.folder / "original", workers[0])
        jobs = [
            (name, door, *choice)
            for i, name in enumerate(found)
            for door, ways in DOORS.items()
            for choice in _choices(ways, i if scale.quick else None)
        ]
        free: queue.SimpleQueue[WarmProcess] = queue.SimpleQueue()
        for worker in workers:
            free.put(worker)

        def attempt(job: tuple[str, str, str, str, Carrier]) -> str | None:
            worker = free.get()
            try:
                name, _, line, target, carrier = job
                return try_payload(
                    carrier(found[name]),
                    line,
                    target,
                    original,
                    scale.folder / str(id(worker)),
                    canary,
                    worker,
                )
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(workers)) as pool:
            results = list(pool.map(attempt, jobs))
    faults += [
        f"{j[0]} as {j[4].__name__} in {j[3]}, {j[1]}: {fault}"
        for j, fault in zip(jobs, results, strict=True)
        if fault
    ]
    total = len(found) + len(jobs)
    return Result(
        total - len(faults),
        total,
        {"payloads": len(found), "loadings": len(jobs), "doors": list(DOORS), "failures": faults},
    )


def _choices(ways: list[Door], turn: int | None) -> list[tuple[str, str, Carrier]]:
    """All, or one that is another at every turn."""
    every = [(line, target, carrier) for line, target, carriers in ways for carrier in carriers]
    return (
        every
        if turn is None
        else list(itertools.islice(every, turn % len(every), turn % len(every) + 1))
    )


def try_payload(
    content: bytes,
    line: str,
    target: str,
    original: RunFixture,
    folder: Path,
    canary: Path,
    worker: WarmProcess,
) -> str | None:
    shutil.rmtree(folder, ignore_errors=True)
    fixture, watched = original.copy(folder), folder.with_suffix(".watched")
    watched.write_text("")
    (fixture.folder / target).write_bytes(content)
    ended = worker.run(fixture.command(line), fixture.folder, watched=watched)
    events = [
        event for event in watched.read_text().splitlines() if not event.startswith(OWN_ERRORS)
    ]
    faults = {
        "the canary is there": canary_is_there(canary),
        f"ran {events}": bool(events),
        f"exit code {ended.code}: {ended.err[-300:]!r}": ended.code not in (2, 3),
        f"not one line: {ended.err[-300:]!r}": ended.err.count("\n") != 1
        or "Traceback" in ended.out,
    }
    return "; ".join(what for what, so in faults.items() if so) or None
