"""The store alone, killed at named and at random moments while it saves, replaces and prunes."""

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
TITLE = "the checkpoint store alone, kill -9 at named and random moments: the next start finds the last saved step, and no remains"
MINUTES = (0.5, 4.0)
CASES = (60, 500)
STEPS = 6
PASSINGS = 2 * STEPS


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
    return Result(
        num - len(failures),
        num,
        {"failures": failures, "at_named_moments": named, "at_random_times": num - named},
    )


def _kill(out: Path, rng: random.Random, number: int) -> tuple[str, int]:
    """(how the process was killed, the last step it had said to be saved)."""
    keep = 1 + number % 4 // 2
    failpoint = (
        f"save:{MOMENTS[number // 2 % len(MOMENTS)]}@{rng.randint(1, PASSINGS)}=kill"
        if number % 2
        else ""
    )

    def work(pipe: int) -> None:
        failpoints.arm(failpoint)
        os.write(pipe, b"\0")
        for step in range(1, STEPS + 1):
            save_both(out, step, keep)
            if step % 3 == 0:
                save_both(out, step, keep)  # the same step once more, as behind an evaluation
            os.write(pipe, bytes([step]))
        time.sleep(60)  # to be killed here too

    pid, pipe = in_child(work)
    os.read(pipe, 1)
    delay = rng.random() * 0.4
    if not _wait(pid, 10.0 if failpoint else delay):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    said = b""
    while select.select([pipe], [], [], 0)[0] and (more := os.read(pipe, 100)):
        said += more
    os.close(pipe)
    return f"{failpoint or f'kill -9 after {delay * 1000:.0f} ms'}, {keep} kept", max(
        said, default=0
    )


def _wait(pid: int, seconds: float) -> bool:
    """Whether the child ended within the time."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        time.sleep(0.001)
    return False
