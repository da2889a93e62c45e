"""kill -9 of one rank or all, anywhere or in a save: the rerun ends in the undisturbed bits."""

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
TITLE = "kill -9, half of them in a save: the rerun has the undisturbed run's sha256"
MINUTES = (1.1, 7.0)
CASES = (12, 100)
CASES_AT_ONE_STEP = (1, 4)
KILLS_AT_ONE_STEP = 4  # one more than the failures after which a run is refused
NUM_THREADS = 2  # a case waits as much as it computes
# Of a save, in order.
MOMENTS = "begun file written flushed aside renamed verified noted pruned".split()
# Of most moments in a run: saves of steps 2, 4, 5, 6, 8, 10 and of the best.
NUM_PASSES = 5
SECONDS_TO_END = 40.0


def run(scale: Scale) -> Result:
    toy = ToyRun.make(scale.folder / "toy")
    for stage in (2, 3):
        undisturbed(toy, stage)
    num = CASES[not scale.quick]

    def case(number: int) -> tuple[str, int]:
        stage, in_save, out = (2, 3)[number % 2], number % 4 >= 2, scale.folder / f"run{number}"
        workers = int(number % 5 == 4)  # per rank; they read ahead of the step that is killed
        flags = [*toy.flags(stage, out), "--num_workers", str(workers)]
        rng = random.Random(f"{scale.seed} {number}")
        how, killed = _killed_run(flags, in_save, out, rng)
        problem, steps_lost = _check(killed, flags, out)
        problem = problem or difference(toy, stage, out)
        shutil.rmtree(out)
        name = f"case {number}, ZeRO-{stage}, {workers} data workers, {how}"
        return f"{name}: {problem}" if problem else "", steps_lost

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        results = list(pool.map(case, range(num)))
    failures = [problem for problem, _ in results if problem]
    num_at_one_step = CASES_AT_ONE_STEP[not scale.quick]
    for number in range(num_at_one_step):
        if problem := _killed_at_one_step(toy, number, scale.folder / f"one_step{number}"):
            failures.append(f"killed at one step, case {number}: {problem}")
    num_all = num + num_at_one_step
    facts = {
        "failures": failures,
        "inside_a_save": sum(number % 4 >= 2 for number in range(num)),
        "most_steps_redone": max(steps_lost for _, steps_lost in results),
        "save_interval": SAVE_STEPS,
    }
    return Result(num_all - len(failures), num_all, facts)


def _killed_at_one_step(toy: ToyRun, number: int, out: Path) -> str:
    """All ranks are killed there by every start: none is refused, and the last one ends."""
    # The first step of all, or the one behind the checkpoint of step 4.
    stage, first_step = (2, 3)[number % 2], (5, 1)[number // 2 % 2]
    flags, place = toy.flags(stage, out), first_step
    for start in range(KILLS_AT_ONE_STEP):
        run = start_training(flags, f"step@{place}=sleep 600")
        if not _waits_in_step(run):
            run.kill()
            return f"start {start + 1} did not come to step {first_step}: {last_line(run.output)}"
        for process in run.processes:
            process.kill()
        run.wait(SECONDS_TO_END)
        place = 1  # of the next start
    run = start_training(flags)
    if run.wait() != [0] * RANKS:
        return f"the start behind the kills ended with {run.codes}: {last_line(run.output)}"
    return difference(toy, stage, out)


def _waits_in_step(run: Processes) -> bool:
    return run.wait_until(lambda: run.output.count("vico: failpoint step") == RANKS)


def _killed_run(
    flags: list[str], in_save: bool, out: Path, rng: random.Random
) -> tuple[str, Processes]:
    """(how it was killed, the run that has ended). A kill that came too late is tried again."""
    while True:
        how, killed = _kill(flags, in_save, out, rng)
        if -9 in killed.wait(SECONDS_TO_END):
            return how, killed
        shutil.rmtree(out, ignore_errors=True)


def _check(killed: Processes, flags: list[str], out: Path) -> tuple[str, int]:
    """(what is wrong with the killed run or its rerun, empty: nothing; the steps lost)."""
    if None in killed.codes:
        said = f"{killed.codes}; {killed.output[-4000:]}"
        return f"a rank was still there after {SECONDS_TO_END:.0f} s: {said}", 0
    steps_lost = steps_logged(out) - newest_step(out)
    has_strays = bool(stray_files(out))
    rerun = start_training(flags)
    problem = ""
    if rerun.wait() != [0] * RANKS:
        problem = f"the same command ended with {rerun.codes}: {last_line(rerun.output)}"
    elif steps_lost > SAVE_STEPS:
        problem = f"{steps_lost} steps were lost"
    elif has_strays and "a run was killed while it wrote" not in rerun.output:
        problem = "what the kill left was removed without a note"
    elif steps_lost and f"({steps_lost} step(s) to redo)" not in rerun.output:
        problem = f"the output does not mention {steps_lost} step(s) to redo"
    return problem, steps_lost


def _kill(flags: list[str], in_save: bool, out: Path, rng: random.Random) -> tuple[str, Processes]:
    if in_save and rng.random() < 0.6:
        failpoint = f"save:{rng.choice(MOMENTS)}@{rng.randint(1, NUM_PASSES)}#0=kill"
        killed = start_training(flags, failpoint)
        killed.wait_until(lambda: not killed.running)
        return failpoint, killed
    killed = start_training(flags)
    step, delay = rng.randint(0, LAST_STEP - 1), rng.random()
    if in_save:
        saves = rng.randint(1, NUM_PASSES)
        for _ in range(saves):
            killed.wait_until(lambda: not _is_saving(out))
            killed.wait_until(lambda: _is_saving(out))
        milliseconds = delay * 20  # a save takes about 10
        how = f"kill -9 {milliseconds:.1f} ms into save {saves}"
    else:
        killed.wait_until(lambda: steps_logged(out) >= step and out.exists())
        milliseconds = delay * 400
        how = f"kill -9 {milliseconds:.0f} ms behind step {step}"
    time.sleep(milliseconds / 1000)
    victims = rng.choice((killed.processes, killed.processes[:1], killed.processes[1:]))
    for process in victims:
        process.kill()
    return f"{how} of {len(victims)} rank(s)", killed


def _is_saving(out: Path) -> bool:
    suffixes = (TEMPORARY_SUFFIX, REPLACED_SUFFIX)
    return any(path.name.endswith(suffixes) for path in out.glob(".checkpoint*"))
