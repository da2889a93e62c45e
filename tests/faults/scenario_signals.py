"""Requests to stop in a step, a save, an evaluation or at the start: no step is lost."""

import re
import signal
from pathlib import Path

from faults.result import Result, Scale
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
TITLE = "SIGTERM, SIGHUP and others, also in a save or evaluation: exit 75, no step is lost"
MINUTES = (0.5, 2.1)
RUNS = (1, 5)
SIGNALS = ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
# The failpoint holds that moment until the signal has come.
MOMENTS = {
    "a step": "step@2=sleep 1",
    "a save": "save:written@1=sleep 1",
    "an evaluation": "evaluation@1=sleep 1",
    "the start": "inputs@1=sleep 1",
}
# In each order every moment still comes, with a step behind it: of ten steps the fifth ends an
# epoch, and every second is saved.
ORDERS = (
    ("the start", "a step", "a save", "an evaluation"),
    ("a step", "the start", "an evaluation", "a save"),
    ("a save", "an evaluation", "a step", "the start"),
    ("a step", "an evaluation", "the start", "a save"),
    ("a save", "the start", "an evaluation", "a step"),
)


def run(scale: Scale) -> Result:
    """Each run is started five times and stopped four times; the last start ends it."""
    toy, failures = ToyRun.make(scale.folder / "toy"), []
    num = RUNS[not scale.quick]
    for number in range(num):
        stage, out = (2, 3)[number % 2], scale.folder / f"run{number}"
        undisturbed(toy, stage)
        for place, moment in enumerate(ORDERS[(number + scale.seed) % len(ORDERS)]):
            name = SIGNALS[(number + place) % len(SIGNALS)]
            receiver = ("the launcher", "rank 0", "rank 1")[(number + place) % 3]
            if problem := _stop(toy, stage, out, moment, signal.Signals[name], receiver):
                case = f"run {number}, ZeRO-{stage}, {name} to {receiver} in {moment}"
                failures.append(f"{case}: {problem}")
        last = launch_training(toy.flags(stage, out))
        if last.wait() != [0]:
            failures.append(f"run {number}: it did not end: {last_line(last.output)}")
        elif problem := difference(toy, stage, out):
            failures.append(f"run {number}: {problem}")
    total = num * len(MOMENTS)
    return Result(max(0, total - len(failures)), total, {"failures": failures, "runs": num})


def _stop(toy: ToyRun, stage: int, out: Path, moment: str, number: int, receiver: str) -> str:
    """Stop a run at a moment. Returns what is wrong; empty: nothing."""
    by_launcher = receiver == "the launcher"
    start = launch_training if by_launcher else start_training
    run = start(toy.flags(stage, out), MOMENTS[moment])
    if not run.wait_until(lambda: "vico: failpoint" in run.output):
        run.kill()
        return f"the moment did not come: {last_line(run.output)}"
    victims = run.processes[-1:] if receiver == "rank 1" else run.processes[:1]
    for process in victims:
        process.send_signal(number)
    codes = run.wait()
    done, saved = steps_logged(out), newest_step(out)
    if codes != [75] * (1 if by_launcher else RANKS):
        return f"ended with {codes}: {last_line(run.output)}"
    if saved != done:
        return f"{done - saved} of {done} steps were lost"
    notes = re.findall(r"stopped by SIG\w+; saved \S+/checkpoint-(\d+); .*same command", run.output)
    if notes != [str(saved)]:
        return f"the output does not say where it was saved: {last_line(run.output)}"
    return ""
