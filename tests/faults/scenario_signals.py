"""SIGTERM and SIGUSR1, to the launcher or to one rank, in a step, a save, an evaluation or at the start: no step is lost."""

import re
import signal
from pathlib import Path

from faults.result import Result, Scale
from support.processes import Processes
from support.toy_run import (
    RANKS,
    ToyRun,
    difference,
    last_line,
    launch_training,
    newest_step,
    start_training,
    steps_logged,
    undisturbed,
)

NAME = "signals"
TITLE = "SIGTERM and SIGUSR1, also during save and evaluation: exit 75, no step lost, the run goes on to the undisturbed end"
MINUTES = (1.1, 6.0)
RUNS = (1, 5)
# What a life is doing when it is asked to stop. The failpoint holds that moment until the signal has come.
LIVES = {
    "a step": "step@2=sleep 1",
    "a save": "save:written@1=sleep 1",
    "an evaluation": "evaluation@1=sleep 1",
    "the start": "inputs@1=sleep 1",
}
# In each order every moment still comes, and a step behind it: of ten steps the fifth ends an epoch, and every second is saved.
ORDERS = (
    ("the start", "a step", "a save", "an evaluation"),
    ("a step", "the start", "an evaluation", "a save"),
    ("a save", "an evaluation", "a step", "the start"),
    ("a step", "an evaluation", "the start", "a save"),
    ("a save", "the start", "an evaluation", "a step"),
)


def run(scale: Scale) -> Result:
    """Each run is stopped once in each life; the last life ends it."""
    world, failures = ToyRun.make(scale.folder / "world"), []
    num = RUNS[not scale.quick]
    for number in range(num):
        stage, out = (2, 3)[number % 2], scale.folder / f"run{number}"
        undisturbed(world, stage)
        for place, moment in enumerate(ORDERS[(number + scale.seed) % len(ORDERS)]):
            name = ("SIGTERM", "SIGUSR1")[(number + place) % 2]
            who = ("the launcher", "rank 0", "rank 1")[(number + place) % 3]
            if problem := _stop(world, stage, out, moment, signal.Signals[name], who):
                failures.append(
                    f"run {number}, ZeRO-{stage}, {name} to {who} in {moment}: {problem}"
                )
        last = launch_training(world.flags(stage, out))
        if last.wait() != [0]:
            failures.append(f"run {number}: it did not end: {last_line(last.output)}")
        elif problem := difference(world, stage, out):
            failures.append(f"run {number}: {problem}")
    total = num * len(LIVES)
    return Result(max(0, total - len(failures)), total, {"failures": failures, "runs": num})


def _stop(world: ToyRun, stage: int, out: Path, moment: str, number: int, who: str) -> str:
    flags, failpoint = world.flags(stage, out), LIVES[moment]
    run = (
        launch_training(flags, failpoint)
        if who == "the launcher"
        else start_training(flags, failpoint)
    )
    if not run.wait_until(lambda: "vico: failpoint" in run.output):
        run.kill()
        return f"the moment did not come: {last_line(run.output)}"
    victims = run.processes[-1:] if who == "rank 1" else run.processes[:1]
    for process in victims:
        process.send_signal(number)
    codes = run.wait()
    done, saved = steps_logged(out), newest_step(out)
    if codes != [75] * (1 if who == "the launcher" else RANKS):
        return f"ended with {codes}: {last_line(run.output)}"
    if saved != done:
        return f"{done - saved} of {done} steps were lost"
    return _unsaid(run, saved)


def _unsaid(run: Processes, saved: int) -> str:
    said = re.search(
        r"stopped by SIG\w+; saved \S+/checkpoint-(\d+); the same command goes on there", run.output
    )
    return (
        ""
        if said and int(said[1]) == saved
        else f"it is not said where it was saved: {last_line(run.output)}"
    )
