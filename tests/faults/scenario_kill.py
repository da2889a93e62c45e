"""kill -9 of a rank or of all, anywhere or inside a save: the same command ends in the bits of an undisturbed run."""

import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from faults.result import Result, Scale
from support.processes import Processes
from support.toy_run import (
    LAST_STEP,
    RANKS,
    SAVE_STEPS,
    ToyRun,
    difference,
    last_line,
    newest_step,
    start_training,
    steps_logged,
    stray_files,
    undisturbed,
)
from vico.io.atomic import REPLACED_SUFFIX, TEMPORARY_SUFFIX

NAME = "kill"
TITLE = "kill -9 at random moments, half inside a save, ZeRO-2 and 3: the same command ends in the undisturbed run's sha256"
MINUTES = (2.5, 25.0)
CASES = (12, 100)
AT_ONCE = 2  # a case waits as much as it computes
MOMENTS = (
    "begun",
    "file",
    "written",
    "flushed",
    "aside",
    "renamed",
    "verified",
    "noted",
    "pruned",
)  # of a save, in order
PASSINGS = 5  # of most of them in a run: saves of steps 2, 4, 5, 6, 8, 10 and of the best


def run(scale: Scale) -> Result:
    world = ToyRun.make(scale.folder / "world")
    for stage in (2, 3):
        undisturbed(world, stage)
    num = CASES[not scale.quick]

    def case(number: int) -> tuple[str, int]:
        stage, in_save, out = (2, 3)[number % 2], number % 4 >= 2, scale.folder / f"run{number}"
        workers = int(number % 5 == 4)  # per rank, which read ahead of the step that is killed
        how, problem, lost = _case(
            world, stage, in_save, workers, out, random.Random(f"{scale.seed} {number}")
        )
        shutil.rmtree(out)
        return (
            f"case {number}, ZeRO-{stage}, {workers} data workers, {how}: {problem}"
            if problem
            else "",
            lost,
        )

    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(case, range(num)))
    failures = [problem for problem, _ in results if problem]
    in_saves = sum(number % 4 >= 2 for number in range(num))
    facts = {
        "failures": failures,
        "inside_a_save": in_saves,
        "most_steps_redone": max(lost for _, lost in results),
        "save_interval": SAVE_STEPS,
    }
    return Result(num - len(failures), num, facts)


def _case(
    world: ToyRun, stage: int, in_save: bool, workers: int, out: Path, rng: random.Random
) -> tuple[str, str, int]:
    """(what was done, what is wrong or nothing, steps that were lost)."""
    flags = [*world.flags(stage, out), "--num_workers", str(workers)]
    while True:  # a kill that comes too late for this run is none
        how, killed = _disturb(flags, in_save, out, rng)
        codes = killed.wait(40)
        if -9 in codes:
            break
        shutil.rmtree(out, ignore_errors=True)
    if None in codes:
        return how, f"a rank was still there after 40 s: {codes}; {killed.output[-4000:]}", 0
    lost = steps_logged(out) - newest_step(out)
    left = bool(stray_files(out))
    again = start_training(flags)
    codes = again.wait()
    if codes != [0] * RANKS:
        return how, f"the same command ended with {codes}: {last_line(again.output)}", lost
    if lost > SAVE_STEPS:
        return how, f"{lost} steps were lost", lost
    if left and "a run was killed while it wrote" not in again.output:
        return how, "what the kill left was removed without a word", lost
    if lost and f"({lost} step(s) to redo)" not in again.output:
        return how, f"it is not said that {lost} step(s) are done again", lost
    return how, difference(world, stage, out), lost


def _disturb(
    flags: list[str], in_save: bool, out: Path, rng: random.Random
) -> tuple[str, Processes]:
    if in_save and rng.random() < 0.6:
        failpoint = f"save:{rng.choice(MOMENTS)}@{rng.randint(1, PASSINGS)}#0=kill"
        killed = start_training(flags, failpoint)
        killed.wait_until(lambda: not killed.running)
        return failpoint, killed
    killed = start_training(flags)
    step, delay = rng.randint(0, LAST_STEP - 1), rng.random()
    if in_save:
        saves = rng.randint(1, PASSINGS)
        for _ in range(saves):  # the time of a save here is some 10 ms
            killed.wait_until(lambda: not _is_saving(out))
            killed.wait_until(lambda: _is_saving(out))
        time.sleep(delay * 0.02)
        how = f"kill -9 {delay * 20:.1f} ms into save {saves}"
    else:
        killed.wait_until(lambda: steps_logged(out) >= step and out.exists())
        time.sleep(delay * 0.4)
        how = f"kill -9 {delay * 400:.0f} ms behind step {step}"
    victims = rng.choice((killed.processes, killed.processes[:1], killed.processes[1:]))
    for process in victims:
        process.kill()
    return f"{how} of {len(victims)} rank(s)", killed


def _is_saving(out: Path) -> bool:
    return any(out.glob(f".checkpoint*{TEMPORARY_SUFFIX}")) or any(
        out.glob(f".checkpoint*{REPLACED_SUFFIX}")
    )
