"""Ranks that are stopped or wait for ever: the run ends in time and names the guilty rank.

A whole job that is suspended for longer, and continued, goes on.
"""

import random
import signal
import time
from pathlib import Path

from faults.result import Result, Scale
from support.toy_run import (
    LAST_STEP,
    RANKS,
    ToyRun,
    difference,
    last_line,
    start_training,
    steps_logged,
    undisturbed,
)

NAME = "hangs"
TITLE = "a stopped or waiting rank: ended within --hang_timeout + 5 s, the rank named"
MINUTES = (0.7, 8.5)
CASES = (2, 20)
SUSPENDED_CASES = (1, 4)
SECONDS = 10.0  # --hang_timeout; on a busy machine no phase of a start may take longer
EXTRA_SECONDS = 5.0
# Where it hangs, by the failpoint that holds the rank there.
PLACES = {
    "a step": "step@4",
    "a save": "save:written@2",
    "an evaluation": "evaluation@1",
    "loading": "inputs@1",
}


def run(scale: Scale) -> Result:
    toy, rng, failures = ToyRun.make(scale.folder / "toy"), random.Random(scale.seed), []
    num, longest = CASES[not scale.quick], 0.0
    for number in range(num):
        place = list(PLACES)[(number // 2 + number % 2) % len(PLACES)]
        rank = 0 if place == "a save" else rng.randrange(RANKS)  # only rank 0 writes
        # Either the whole process is stopped, or its main thread waits for ever.
        stopped = number % 2 == 0
        stage, out = (2, 3)[number // 2 % 2], scale.folder / f"run{number}"
        seconds, problem = _case(toy, stage, place, rank, stopped, out)
        longest = max(longest, seconds)
        if problem:
            how = "stopped" if stopped else "held"
            failures.append(f"case {number}, rank {rank} {how} in {place}: {problem}")
    num_suspended = SUSPENDED_CASES[not scale.quick]
    for number in range(num_suspended):
        stage, step = (2, 3)[number % 2], rng.randrange(LAST_STEP - 1)
        if problem := _suspended(toy, stage, step, scale.folder / f"suspended{number}"):
            failures.append(f"ZeRO-{stage}, suspended behind step {step}: {problem}")
    num += num_suspended
    facts = {
        "failures": failures,
        "set_seconds": SECONDS,
        "longest_seconds": round(longest, 1),
    }
    return Result(num - len(failures), num, facts)


def _case(
    toy: ToyRun, stage: int, place: str, rank: int, stopped: bool, out: Path
) -> tuple[float, str]:
    """(seconds from the hang to the end of all ranks, what is wrong or nothing)."""
    flags = [*toy.flags(stage, out), "--hang_timeout", str(SECONDS / 60)]
    run = start_training(flags, f"{PLACES[place]}#{rank}=sleep 600")
    if not run.wait_until(lambda: "vico: failpoint" in run.output):
        run.kill()
        return 0.0, f"it did not come so far: {last_line(run.output)}"
    began = time.monotonic()
    if stopped:
        run.processes[rank].send_signal(signal.SIGSTOP)
    codes = run.wait(SECONDS + EXTRA_SECONDS + 30)
    seconds = time.monotonic() - began
    if None in codes or seconds > SECONDS + EXTRA_SECONDS:
        return seconds, f"it took {seconds:.1f} s: {codes}"
    if not {5, -9} >= set(codes) or 5 not in codes:
        return seconds, f"ended with {codes}: {last_line(run.output)}"
    if len(run.errors) != 1 or f"rank {rank} on " not in run.errors[0].partition("last reports")[0]:
        return seconds, f"the guilty rank is not named once: {run.errors}"
    return seconds, "" if 'File "' in run.output else "there are no stacks"


def _suspended(toy: ToyRun, stage: int, step: int, out: Path) -> str:
    """All processes are stopped for longer than --hang_timeout, which nobody counts."""
    undisturbed(toy, stage)
    flags = [*toy.flags(stage, out), "--hang_timeout", str(SECONDS / 60)]
    run = start_training(flags)
    if not run.wait_until(lambda: out.exists() and steps_logged(out) >= step):
        run.kill()
        return f"it did not come so far: {last_line(run.output)}"
    for number, seconds in ((signal.SIGSTOP, SECONDS + EXTRA_SECONDS), (signal.SIGCONT, 0.0)):
        for process in run.processes:
            process.send_signal(number)
        time.sleep(seconds)
    if run.wait() != [0] * RANKS:
        return f"ended with {run.codes}: {last_line(run.output)}"
    return difference(toy, stage, out)
