"""Corrupted inputs: the command ends with one line that says where and what to do, and no more."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from faults.case import Case
from faults.cases import CASES
from faults.result import Result, Scale
from support.processes import launch, run_command
from support.run_fixture import RunFixture, make_run_fixture
from support.warm_process import CommandResult, WarmProcess, share_out, warm_processes

NAME = "inputs"
TITLE = "corrupted inputs: one line that helps, exit 2 or 3, within 10 s, nothing written"
MINUTES = (1.1, 1.5)
SECONDS = 10.0
MAX_LINE_LENGTH = 1000
# Cases that are also started as users start them: by the launcher on two ranks, and as one process.
LAUNCHED = ("answer 7", "shard cut off", "unknown flag")
SINGLE_RANK = ("no features", "published, runs code", "recipe, runs code")


def run(scale: Scale) -> Result:
    with warm_processes(2) as workers:
        original = make_run_fixture(scale.folder / "original", workers[0])
        results = try_all(list(CASES), original, workers, scale.folder / "cases")
    failures = [f"{name}: {fault}" for name, (fault, _) in results.items() if fault]
    starts = [(name, True) for name in LAUNCHED] + [(name, False) for name in SINGLE_RANK]
    chosen = starts[::3] if scale.quick else starts
    for name, launched in chosen:
        if fault := start_case(name, original, scale.folder / "started", launched):
            how = "launch/train.sh" if launched else "a process of its own"
            failures.append(f"{name} by {how}: {fault}")
    total = len(CASES) + len(chosen)
    facts = {
        "distinct_cases": len(CASES),
        "own_starts": len(chosen),
        "slowest_seconds": round(max(seconds for _, seconds in results.values()), 2),
        "failures": failures,
    }
    return Result(total - len(failures), total, facts)


def try_all(
    names: Sequence[str],
    original: RunFixture,
    workers: list[WarmProcess],
    folder: Path,
    limit: float = SECONDS,
) -> dict[str, tuple[str | None, float]]:
    """By name: (what is wrong, seconds)."""

    def attempt(name: str, worker: WarmProcess) -> tuple[str | None, float]:
        return try_case(CASES[name], original, folder / str(id(worker)), worker, limit)

    return dict(zip(names, share_out(names, workers, attempt), strict=True))


def try_case(
    case: Case, original: RunFixture, folder: Path, worker: WarmProcess, limit: float
) -> tuple[str | None, float]:
    """(what is wrong, seconds)."""
    fixture = _damaged_copy(case, original, folder)
    before = fixture.contents()
    result = worker.run(fixture.command(case.line), fixture.folder)
    return judge(result, case, fixture, before, limit), result.seconds


def _damaged_copy(case: Case, original: RunFixture, folder: Path) -> RunFixture:
    shutil.rmtree(folder, ignore_errors=True)
    fixture = original.copy(folder)
    if case.damage is not None:
        case.damage(fixture)
    return fixture


def judge(
    result: CommandResult,
    case: Case,
    fixture: RunFixture,
    before: dict[str, str],
    limit: float = SECONDS,
) -> str | None:
    """What is wrong with the result of a case; None: nothing."""
    err = result.stderr
    first, *table = err.splitlines() or [""]
    parts = [part.replace("{fixture}", str(fixture.folder)) for part in case.parts]
    missing = [part for part in parts if part not in err]
    is_table = all(row.startswith("  ") for row in table) and (not table or "table below" in first)
    is_printable = err.replace("\n", "").isprintable()
    one_line = first.startswith("vico: error: ") and is_table and is_printable
    faults = {
        f"exit code {result.code}, not {case.code}": result.code != case.code,
        "not an exit code of a refusal": case.code not in (2, 3),
        f"not one line: {err[:500]!r}": not one_line,
        f"the line is {len(first)} characters long": len(first) > MAX_LINE_LENGTH,
        f"{missing} not in {err[:500]!r}": bool(missing),
        "a traceback": "Traceback" in err + result.stdout,
        f"took {result.seconds:.1f} s": result.seconds > limit,
        "an optimizer step": "step 1" in result.stdout,
        "files were changed": fixture.contents() != before,
    }
    return "; ".join(what for what, is_so in faults.items() if is_so) or None


def start_case(name: str, original: RunFixture, folder: Path, launched: bool) -> str | None:
    """The case by the commands that a user types."""
    case = CASES[name]
    fixture = _damaged_copy(case, original, folder)
    before, command = fixture.contents(), fixture.command(case.line)
    if launched:
        run = launch("train.sh", *command[1:], ranks=2, cwd=folder)
        run.wait(120)
    else:
        run = run_command([sys.executable, "-m", "vico", *command], folder, seconds=120)
    (code,) = run.codes
    # Launchers and libraries may print more.
    starts = ("vico: error", "Traceback", "  File")
    lines = [line for line in run.stderrs[0].splitlines() if line.startswith(starts)]
    code = os.EX_SOFTWARE if code is None else code
    result = CommandResult(code, run.stdouts[0], "\n".join(lines) + "\n", 0.0)
    return judge(result, case, fixture, before)
