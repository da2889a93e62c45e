"""Two runs on one output_dir: the second is refused; a dead one's place is free; nobody outlives a killed launcher."""

import os
import signal
import time
from pathlib import Path

import psutil

from faults.result import Result, Scale
from support.processes import Processes
from support.toy_run import RANKS, ToyRun, last_line, launch_training, start_training, steps_logged

NAME = "writers"
TITLE = "second writers refused within 5 s, dead owners' places taken over, no rank left 5 s behind a killed launcher"
MINUTES = (0.5, 4.0)
REFUSALS, TAKEOVERS = (2, 20), (1, 5)
SECONDS = 5.0


def run(scale: Scale) -> Result:
    world, full = ToyRun.make(scale.folder / "world"), not scale.quick
    failures: list[str] = []
    times: list[float] = []
    for number in range(TAKEOVERS[full]):
        out = scale.folder / f"run{number}"
        # Long enough to be met by all the others; a checkpoint is there soon.
        flags = [
            *world.flags((2, 3)[number % 2], out),
            "--epochs",
            "2000",
            "--max_steps",
            "5000",
            "--num_workers",
            "1",
        ]
        owner = launch_training(flags)
        if not owner.wait_until(lambda out=out: steps_logged(out) >= 3):  # type: ignore[misc]
            failures.append(f"the owner did not start: {last_line(owner.output)}")
            owner.kill()
            continue
        for _ in range(REFUSALS[full] // TAKEOVERS[full]):
            seconds, problem = _refused(world, flags)
            times.append(seconds)
            failures += [f"second writer: {problem}"] if problem else []
        failures += [problem] if (problem := _orphans(owner, number)) else []
        failures += [problem] if (problem := _taken_over(world, flags, out)) else []
    total = REFUSALS[full] + 2 * TAKEOVERS[full]
    counts = {
        "refusals": REFUSALS[full],
        "takeovers": TAKEOVERS[full],
        "launchers_killed": TAKEOVERS[full],
    }
    return Result(
        max(0, total - len(failures)),
        total,
        {"failures": failures, **counts, "longest_refusal_seconds": round(max(times), 1)},
    )


def _refused(world: ToyRun, flags: list[str]) -> tuple[float, str]:
    began = time.monotonic()
    second = start_training(flags, ranks=1)
    codes = second.wait(60)
    seconds = time.monotonic() - began
    if codes != [6] or len(second.errors) != 1 or ": in use by process " not in second.errors[0]:
        return seconds, f"ended with {codes}: {last_line(second.output)}"
    return seconds, "" if seconds <= SECONDS else f"it took {seconds:.1f} s"


def _orphans(owner: Processes, number: int) -> str:
    """Kill the launcher alone, in every other case by its shell's group; its ranks and their helpers must be gone in time."""
    ranks = [
        p for p in psutil.Process(owner.processes[0].pid).children(recursive=True) if p.is_running()
    ]
    os.kill(owner.processes[0].pid, signal.SIGKILL)
    owner.processes[0].wait()
    _, alive = psutil.wait_procs(ranks, timeout=SECONDS)
    for process in alive:
        process.kill()
    if len(ranks) < RANKS:
        return f"launcher {number}: it had {len(ranks)} processes"
    return (
        f"launcher {number}: {len(alive)} of {len(ranks)} processes lived on for {SECONDS:.0f} s"
        if alive
        else ""
    )


def _taken_over(world: ToyRun, flags: list[str], out: Path) -> str:
    before = steps_logged(out)
    heir = start_training([*flags, "--max_steps", str(before + 2)])
    codes = heir.wait()
    return (
        ""
        if codes == [0] * RANKS and steps_logged(out) == before + 2
        else f"no takeover: {codes}, {last_line(heir.output)}"
    )
