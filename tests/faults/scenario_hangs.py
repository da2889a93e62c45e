"""Ranks that are stopped or wait for ever: the run ends within the time that is set, with stacks and the guilty rank's name."""

import random
import signal
import time
from pathlib import Path

from faults.result import Result, Scale
from support.toy_run import RANKS, ToyRun, last_line, start_training

NAME = "hangs"
TITLE = "a rank that is stopped, or does not come back, in a step, a save, an evaluation or while loading: ended within the time + 5 s"
MINUTES = (0.4, 6.0)
CASES = (2, 20)
SECONDS = 10.0  # --hang_timeout; on a busy machine no phase of a start may take longer
ALLOWED = 5.0
# Where it hangs, by the failpoint that holds the rank there.
PLACES = {
    "a step": "step@4",
    "a save": "save:written@2",
    "an evaluation": "evaluation@1",
    "loading": "inputs@1",
}


def run(scale: Scale) -> Result:
    world, rng, failures = ToyRun.make(scale.folder / "world"), random.Random(scale.seed), []
    num, longest = CASES[not scale.quick], 0.0
    for number in range(num):
        place = list(PLACES)[(number // 2 + number % 2) % len(PLACES)]
        rank = 0 if place == "a save" else rng.randrange(RANKS)  # only rank 0 writes
        stopped = (
            number % 2 == 0
        )  # the whole process; otherwise its main thread waits for ever, and the process lives
        seconds, problem = _case(
            world, (2, 3)[number // 2 % 2], place, rank, stopped, scale.folder / f"run{number}"
        )
        longest = max(longest, seconds)
        if problem:
            failures.append(
                f"case {number}, rank {rank} {'stopped' if stopped else 'held'} in {place}: {problem}"
            )
    return Result(
        num - len(failures),
        num,
        {"failures": failures, "set_seconds": SECONDS, "longest_seconds": round(longest, 1)},
    )


def _case(
    world: ToyRun, stage: int, place: str, rank: int, stopped: bool, out: Path
) -> tuple[float, str]:
    flags = [*world.flags(stage, out), "--hang_timeout", str(SECONDS / 60)]
    run = start_training(flags, f"{PLACES[place]}#{rank}=sleep 600")
    if not run.wait_until(lambda: "vico: failpoint" in run.output):
        run.kill()
        return 0.0, f"it did not come so far: {last_line(run.output)}"
    began = time.monotonic()
    if stopped:
        run.processes[rank].send_signal(signal.SIGSTOP)
    codes = run.wait(SECONDS + ALLOWED + 30)
    seconds = time.monotonic() - began
    if None in codes or seconds > SECONDS + ALLOWED:
        return seconds, f"it took {seconds:.1f} s: {codes}"
    if not {5, -9} >= set(codes) or 5 not in codes:
        return seconds, f"ended with {codes}: {last_line(run.output)}"
    if len(run.errors) != 1 or f"rank {rank} on " not in run.errors[0].partition("last heard")[0]:
        return seconds, f"the guilty rank is not named once: {run.errors}"
    return seconds, "" if 'File "' in run.output else "there are no stacks"
