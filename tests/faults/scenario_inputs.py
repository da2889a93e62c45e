"""Corrupted inputs: whatever is wrong, the command ends with one line that says where and what to do, and changes nothing."""

import os
import queue
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.cases_data import DATA
from faults.cases_model import MODEL
from faults.cases_settings import SETTINGS
from faults.damage import Case
from faults.result import Result, Scale
from support.run_fixture import RunFixture, make_run_fixture
from support.warm_process import Ended, WarmProcess, warm_processes

NAME = "inputs"
TITLE = "corrupted inputs: one line that helps, exit 2 or 3, within 10 s, nothing written"
MINUTES = (0.9, 1.5)
SECONDS = 10.0
CASES: dict[str, Case] = {**SETTINGS, **DATA, **MODEL}
ROOT = Path(__file__).resolve().parents[2]
# By starts of their own: launcher and all on two ranks, and one process.
LAUNCHED = ("answer 7", "shard cut off", "unknown flag")
SINGLE_RANK = ("no features", "lineage, runs code", "recipe, runs code")


def run(scale: Scale) -> Result:
    with warm_processes(2) as workers:
        original = make_run_fixture(scale.folder / "original", workers[0])
        results = attempt_all(list(CASES), original, workers, scale.folder / "cases")
    faults = [f"{name}: {fault}" for name, (fault, _) in results.items() if fault]
    starts = [*((name, True) for name in LAUNCHED), *((name, False) for name in SINGLE_RANK)]
    chosen = starts[::3] if scale.quick else starts
    for name, launched in chosen:
        if fault := start_case(name, original, scale.folder / "started", launched):
            faults.append(
                f"{name} by {'launch/train.sh' if launched else 'a process of its own'}: {fault}"
            )
    total = len(CASES) + len(chosen)
    facts = {
        "distinct_cases": len(CASES),
        "own_starts": len(chosen),
        "slowest_seconds": round(max(s for _, s in results.values()), 2),
    }
    return Result(total - len(faults), total, {**facts, "failures": faults})


def attempt_all(
    names: list[str],
    original: RunFixture,
    workers: list[WarmProcess],
    folder: Path,
    limit: float = SECONDS,
) -> dict[str, tuple[str | None, float]]:
    """By name: what was not as it must be, and seconds."""
    free: queue.SimpleQueue[WarmProcess] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def attempt(name: str) -> tuple[str | None, float]:
        worker = free.get()
        try:
            return try_case(CASES[name], original, folder / str(id(worker)), worker, limit)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        return dict(zip(names, pool.map(attempt, names), strict=True))


def try_case(
    case: Case, original: RunFixture, folder: Path, worker: WarmProcess, limit: float
) -> tuple[str | None, float]:
    """(what was not as it must be, seconds)."""
    shutil.rmtree(folder, ignore_errors=True)
    fixture = original.copy(folder)
    damage, line, _, _ = case
    if damage is not None:
        damage(fixture)
    before = fixture.contents()
    ended = worker.run(fixture.command(line), fixture.folder)
    return judge(ended, case, fixture, before, limit), ended.seconds


def judge(
    ended: Ended, case: Case, fixture: RunFixture, before: dict[str, str], seconds: float = SECONDS
) -> str | None:
    _, _, code, parts = case
    first, *table = ended.err.splitlines() or [""]
    missing = [
        part for part in parts if part.replace("{fixture}", str(fixture.folder)) not in ended.err
    ]
    faults = {
        f"exit code {ended.code}, not {code}": ended.code != code or code not in (2, 3),
        f"not one line: {ended.err[:500]!r}": not first.startswith("vico: error: ")
        or not all(row.startswith("  ") for row in table)
        or (bool(table) and "table below" not in first)
        or not ended.err.replace("\n", "").isprintable(),
        f"the line is {len(first)} characters long": len(first) > 1000,
        f"{missing} not in {ended.err[:500]!r}": bool(missing),
        "a traceback": "Traceback" in ended.err + ended.out,
        f"took {ended.seconds:.1f} s": ended.seconds > seconds,
        "an optimizer step": "step 1" in ended.out,
        "files were changed": fixture.contents() != before,
    }
    found = [what for what, so in faults.items() if so]
    return "; ".join(found) or None


def start_case(name: str, original: RunFixture, folder: Path, launched: bool) -> str | None:
    """The case by the commands that a user types."""
    shutil.rmtree(folder, ignore_errors=True)
    fixture, case = original.copy(folder), CASES[name]
    if case[0] is not None:
        case[0](fixture)
    before, command = fixture.contents(), fixture.command(case[1])
    words = (
        ["bash", str(ROOT / "launch" / "train.sh"), *command[1:]]
        if launched
        else [sys.executable, "-m", "vico", *command]
    )
    environment = {**os.environ, "VICO_RANKS": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    err = "\n".join(
        line
        for line in done.stderr.splitlines()
        if line.startswith(("vico: error", "Traceback", "  File"))
    )
    ended = Ended(done.returncode, done.stdout, err + "\n", 0.0)
    return judge(ended, case, fixture, before)
