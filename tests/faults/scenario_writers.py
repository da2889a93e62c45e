"""Two runs on one output_dir: the second is refused; a dead one's place is free; no orphans."""

import os
import signal
import time
from pathlib import Path

import psutil

from faults.result import Result, Scale
from support.processes import Processes
from support.toy_run import (
    RANKS,
    ToyRun,
    last_line,
    launch_training,
    start_training,
    steps_logged,
)

NAME = "writers"
TITLE = "second writers are refused in 5 s, dead ones replaced, a dead launcher has no orphans"
MINUTES = (0.2, 4.0)
REFUSALS, TAKEOVERS = (2, 20), (1, 5)
SECONDS = 5.0
# Long enough to be met by all the others; a checkpoint comes soon.
LONG = "--epochs 2000 --max_steps 5000 --num_workers 1".split()


def run(scale: Scale) -> Result:
    toy, full = ToyRun.make(scale.folder / "toy"), not scale.quick
    failures: list[str] = []
    refusal_seconds: list[float] = []
    for number in range(TAKEOVERS[full]):
        out = scale.folder / f"run{number}"
        flags = [*toy.flags((2, 3)[number % 2], out), *LONG]
        owner = launch_training(flags)
        if not owner.wait_until(lambda: steps_logged(out) >= 3):  # noqa: B023
            failures.append(f"the owner did not start: {last_line(owner.output)}")
            owner.kill()
            continue
        for _ in range(REFUSALS[full] // TAKEOVERS[full]):
            seconds, problem = _start_second(flags)
            refusal_seconds.append(seconds)
            if problem:
                failures.append(f"second writer: {problem}")
        if problem := _kill_launcher(owner):
            failures.append(f"launcher {number}: {problem}")
        if problem := _take_over(flags, out):
            failures.append(problem)
    total = REFUSALS[full] + 2 * TAKEOVERS[full]
    facts = {
        "failures": failures,
        "refusals": REFUSALS[full],
        "takeovers": TAKEOVERS[full],
        "launchers_killed": TAKEOVERS[full],
        "longest_refusal_seconds": round(max(refusal_seconds, default=0.0), 1),
    }
    return Result(max(0, total - len(failures)), total, facts)


def _start_second(flags: list[str]) -> tuple[float, str]:
    """(seconds, what is wrong or nothing) of a second writer, which must be refused."""
    began = time.monotonic()
    second = start_training(flags, ranks=1)
    codes = second.wait(60)
    seconds = time.monotonic() - began
    if codes != [6] or len(second.errors) != 1 or ": in use by process " not in second.errors[0]:
        return seconds, f"ended with {codes}: {last_line(second.output)}"
    return seconds, "" if seconds <= SECONDS else f"it took {seconds:.1f} s"


def _kill_launcher(owner: Processes) -> str:
    """Kill the launcher alone; its ranks and their helpers must end in time."""
    launcher = owner.processes[0]
    ranks = psutil.Process(launcher.pid).children(recursive=True)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS)
    for process in alive:
        process.kill()
    if len(ranks) < RANKS:
        return f"it had {len(ranks)} processes"
    if alive:
        return f"{len(alive)} of {len(ranks)} processes lived on for {SECONDS:.0f} s"
    return ""


def _take_over(flags: list[str], out: Path) -> str:
    before = steps_logged(out)
    successor = start_training([*flags, "--max_steps", str(before + 2)])
    codes = successor.wait()
    if codes != [0] * RANKS or steps_logged(out) != before + 2:
        return f"no takeover: {codes}, {last_line(successor.output)}"
    return ""
