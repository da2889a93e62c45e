"""The checkpoint store alone, killed at named and random moments while it saves and prunes."""

import os
import random
import select
import shutil
import signal
import time
from pathlib import Path

import torch

from faults.result import Result, Scale
from faults.scenario_kill import MOMENTS
from faults.small_store import fault_after, in_child, save_both
from vico.io import failpoints

NAME = "store"
TITLE = "kill -9 of saves alone: the last saved step is found, and no strays are left"
MINUTES = (0.5, 4.0)
CASES = (60, 500)
STEPS = 6
NUM_PASSES = 2 * STEPS


def run(scale: Scale) -> Result:
    torch.set_num_threads(1)  # the processes are forked
    rng, failures = random.Random(scale.seed), []
    num, named = CASES[not scale.quick], 0
    for number in range(num):
        out = scale.folder / f"store{number}"
        out.mkdir()
        how, saved = _kill(out, rng, number)
        named += how.startswith("save:")
        if fault := fault_after(out, saved):
            failures.append(f"case {number}, {how}: {fault}")
        shutil.rmtree(out)
    facts = {"failures": failures, "at_named_moments": named, "at_random_times": num - named}
    return Result(num - len(failures), num, facts)


def _kill(out: Path, rng: random.Random, number: int) -> tuple[str, int]:
    """(how the process was killed, the last step that it reported as saved)."""
    keep = 1 + number % 4 // 2
    failpoint = ""
    if number % 2:
        moment = MOMENTS[number // 2 % len(MOMENTS)]
        failpoint = f"save:{moment}@{rng.randint(1, NUM_PASSES)}=kill"

    def work(pipe: int) -> None:
        failpoints.arm(failpoint)
        os.write(pipe, b"\0")
        for step in range(1, STEPS + 1):
            save_both(out, step, keep)
            if step % 3 == 0:
                save_both(out, step, keep)  # the same step again, as after an evaluation
            os.write(pipe, bytes([step]))
        time.sleep(60)  # to be killed here too

    pid, pipe = in_child(work)
    os.read(pipe, 1)
    delay = rng.random() * 0.4
    if not _ends_within(pid, 10.0 if failpoint else delay):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    steps = b""
    while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 100)):
        steps += more
    os.close(pipe)
    how = failpoint or f"kill -9 after {delay * 1000:.0f} ms"
    return f"{how}, {keep} kept", max(steps, default=0)


def _ends_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False
