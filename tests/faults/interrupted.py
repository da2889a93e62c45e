"""A toy run of six steps that a test interrupts, and the comparison with an undisturbed one."""

from collections.abc import Callable
from pathlib import Path

from support.processes import Processes, start
from support.toy_dataset import ToyData, records
from vico.checkpoint.format import OPTIMIZER, WEIGHTS

# 20 questions: 3 steps of 8 an epoch.
FLAGS = "--epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7".split()
# A run that a test ends.
ENDLESS = "--epochs 200 --save_steps 1000".split()
LAST_STEP = 6
SECONDS = 120.0


def train_command(toy: ToyData, ranks: int, out: Path, *more: str) -> list[str]:
    """The same command for one and two ranks: 8 questions a step."""
    batch = ["--batch_size", str(8 // ranks), "--save_steps", "2"]
    return ["train", *toy.flags, *FLAGS, *batch, "--output_dir", str(out), *more]


def interrupt(
    command: list[str],
    ranks: int,
    condition: Callable[[], bool],
    action: Callable[[Processes], None],
) -> Processes:
    """Start the ranks, wait for `condition`, call `action` with them, and wait for their end."""
    run = start(*command, ranks=ranks)
    run.wait_until(condition, SECONDS)
    action(run)
    run.wait(SECONDS)
    return run


def steps_done(out: Path) -> int:
    """Counts lines, so that it can be called while a line is being written."""
    path = out / "steps.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def read_losses(out: Path) -> list[tuple[int, float]]:
    """(step, loss) of each step."""
    return [(line["step"], line["loss"]) for line in records(out / "steps.jsonl")]


def assert_same_end(out: Path, undisturbed: Path) -> None:
    """Weights, optimizer state, losses and accuracies are bitwise those of the undisturbed run."""
    for folder in (f"checkpoint-{LAST_STEP}", "checkpoint_best"):
        for name in (WEIGHTS, OPTIMIZER):
            same = (out / folder / name).read_bytes() == (undisturbed / folder / name).read_bytes()
            assert same, (folder, name)
    losses = read_losses(out)
    assert losses == read_losses(undisturbed)
    assert [step for step, _ in losses] == list(range(1, LAST_STEP + 1))
    assert records(out / "log.txt") == records(undisturbed / "log.txt")
