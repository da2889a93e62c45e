"""No pickle is ever run: payloads in every kind of file, given to every command."""

import shutil
from pathlib import Path
from typing import NamedTuple

from faults.payloads import (
    CARRIERS,
    Carrier,
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
    PUBLISHED,
    SHARD,
    STATE,
    TINY,
    TOKENIZER,
    TRAIN,
    WEIGHTS,
    RunFixture,
    make_run_fixture,
)
from support.warm_process import WarmProcess, share_out, warm_processes

NAME = "pickles"
TITLE = "pickle payloads through six commands: none is run (canaries and an audit hook)"
MINUTES = (0.4, 4.0)
OF_THE_RUN = "--output_dir {fixture}/run"
RESUME, EVAL = f"--resume {{fixture}}/{PUBLISHED}", f"eval --resume {{fixture}}/{PUBLISHED}"
EVAL_OWN = f"eval --resume {{fixture}}/{CHECKPOINT}"


class Entry(NamedTuple):
    """A way into the program: a command, the file that it reads, and what that can be."""

    line: str
    file: str
    carriers: tuple[Carrier, ...]


ENTRIES: dict[str, list[Entry]] = {
    "train": [
        Entry("", FEATURES, CARRIERS),
        Entry("", SHARD, (as_zip, as_old)),
        Entry("", CAPTIONS, (as_it_is,)),
        Entry("", TRAIN, (as_it_is,)),
        Entry("", TOKENIZER, (as_it_is,)),
        Entry("", PARAMS, (as_it_is,)),
        Entry("--config {fixture}/r.yaml", "r.yaml", (as_it_is,)),
    ],
    "resume": [
        Entry(RESUME, PUBLISHED, CARRIERS),
        Entry(OF_THE_RUN, OPTIMIZER, (as_safetensors, as_zip)),
        Entry(OF_THE_RUN, STATE, (as_it_is,)),
        Entry(OF_THE_RUN, "run/args.json", (as_it_is,)),
    ],
    "eval": [
        Entry(EVAL, PUBLISHED, CARRIERS),
        Entry(EVAL_OWN, WEIGHTS, (as_safetensors, as_zip)),
        Entry(EVAL_OWN, STATE, (as_it_is,)),
    ],
    "convert": [
        Entry(f"!convert {{fixture}}/{PUBLISHED} {{fixture}}/x.safetensors", PUBLISHED, CARRIERS),
        Entry(
            f"!convert {{fixture}}/{CHECKPOINT} {{fixture}}/x.pth",
            WEIGHTS,
            (as_safetensors, as_zip),
        ),
        Entry(f"!convert {{fixture}}/{TINY} {{fixture}}/hf", SHARD, (as_zip, as_old)),
    ],
    "check": [
        Entry("check", FEATURES, CARRIERS),
        Entry("check", SHARD, (as_zip,)),
        Entry(f"check {RESUME}", PUBLISHED, (as_zip, as_old)),
    ],
    "plan": [Entry(f"!plan --gpu H100 --model {{fixture}}/{TINY}", PARAMS, (as_it_is,))],
}
# A rank's refusal, on its way to the others.
OWN_ERRORS = "pickle.find_class ('vico.errors', "


class Job(NamedTuple):
    payload: str
    command: str
    line: str
    file: str
    carrier: Carrier

    def __str__(self) -> str:
        return f"{self.payload} as {self.carrier.__name__} in {self.file}, {self.command}"


def run(scale: Scale) -> Result:
    canary = scale.folder / "canary"
    pickles = payloads(canary)
    failures = [
        f"{name}: the payload does not bite, so it proves nothing"
        for name, payload in pickles.items()
        if not bites(payload, canary)
    ]
    jobs = _make_jobs(list(pickles), scale.quick)
    with warm_processes(2) as workers:
        original = make_run_fixture(scale.folder / "original", workers[0])

        def attempt(job: Job, worker: WarmProcess) -> str | None:
            content = job.carrier(pickles[job.payload])
            folder = scale.folder / str(id(worker))
            return try_payload(content, job.line, job.file, original, folder, canary, worker)

        faults = share_out(jobs, workers, attempt)
    failures += [f"{job}: {fault}" for job, fault in zip(jobs, faults, strict=True) if fault]
    total = len(pickles) + len(jobs)
    facts = {
        "payloads": len(pickles),
        "loadings": len(jobs),
        "doors": list(ENTRIES),
        "failures": failures,
    }
    return Result(total - len(failures), total, facts)


def _make_jobs(names: list[str], quick: bool) -> list[Job]:
    """Every payload in every carrier; `quick`: in one of each command, another at every turn."""
    jobs = []
    for turn, name in enumerate(names):
        for command, entries in ENTRIES.items():
            choices = []
            for entry in entries:
                for carrier in entry.carriers:
                    choices.append(Job(name, command, entry.line, entry.file, carrier))
            jobs += [choices[turn % len(choices)]] if quick else choices
    return jobs


def try_payload(
    content: bytes,
    line: str,
    file: str,
    original: RunFixture,
    folder: Path,
    canary: Path,
    worker: WarmProcess,
) -> str | None:
    """What is wrong after the command has read the payload; None: nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    fixture, watched = original.copy(folder), folder.with_suffix(".watched")
    watched.write_text("")
    (fixture.folder / file).write_bytes(content)
    result = worker.run(fixture.command(line), fixture.folder, watched=watched)
    events = [
        event for event in watched.read_text().splitlines() if not event.startswith(OWN_ERRORS)
    ]
    one_line = result.stderr.count("\n") == 1 and "Traceback" not in result.stdout
    faults = {
        "the canary is there": canary_is_there(canary),
        f"ran {events}": bool(events),
        f"exit code {result.code}: {result.stderr[-300:]!r}": result.code not in (2, 3),
        f"not one line: {result.stderr[-300:]!r}": not one_line,
    }
    return "; ".join(what for what, is_so in faults.items() if is_so) or None
