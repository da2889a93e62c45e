"""`vico eval`: score the questions of a split with a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vico.cli.flags import CommandLine, parse_with_checkpoint
from vico.cli.with_world import with_world
from vico.errors import UserError
from vico.io import streams
from vico.io.output_dir import OutputDir
from vico.train.config import NOT_IDENTITY, SAVING, SHAPES, RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.checkpoint.format import Checkpoint
    from vico.distributed.world import World

DESCRIPTION = (
    "Evaluate a checkpoint (--resume). Settings come from the checkpoint; a flag that is given "
    "wins, except for shapes (adapter_layer, adapter_len, max_feats), which are the checkpoint's."
)


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    line = parse_with_checkpoint(argv, "vico eval", DESCRIPTION)

    def work(world: "World") -> None:
        from vico.train.rank_consistency import require_same_files
        from vico.train.saved_run import read_for_evaluation

        with world.raise_together():
            checkpoint = read_for_evaluation(line.given["resume"])
            config, notes = settings_of(checkpoint, line)
            notes += on_replaced_predictions(checkpoint, line.given)
        require_same_files(world, config)
        evaluate_checkpoint(config, checkpoint, world, notes)

    return with_world(line, work)


def evaluate_named(config: RunConfig, world: "World") -> None:
    """`vico train --resume CHECKPOINT --init_eval`: evaluate it with the flags' settings."""
    from vico.train.rank_consistency import require_same_files
    from vico.train.saved_run import read_for_evaluation

    require_same_files(world, config)
    with world.raise_together():
        assert config.resume is not None
        checkpoint = read_for_evaluation(config.resume)
    evaluate_checkpoint(config, checkpoint, world)


def evaluate_checkpoint(
    config: RunConfig, checkpoint: "Checkpoint", world: "World", notes: Sequence[str] = ()
) -> None:
    """Score config.split, print the accuracies, write the predictions. A collective."""
    from vico.train.build import build_engine
    from vico.train.evaluate import evaluate, report
    from vico.train.start import open_evaluation

    inputs, checkpoint = open_evaluation(config, checkpoint, world)
    if os.path.isdir(config.output_dir):
        streams.keep_lost_output(OutputDir(config.output_dir).lost_output)
    for note in (*notes, *checkpoint.notes, *inputs.notes):
        world.print_rank0(note)
    engine = build_engine(config, inputs, checkpoint.weights, world)
    evaluation = evaluate(engine, inputs, config.split, config, world)
    report(evaluation, config.split, config, world)


def on_replaced_predictions(checkpoint: "Checkpoint", given: Mapping[str, Any]) -> list[str]:
    """A note where predictions of other settings replace those of the checkpoint's own run.

    Raises UserError for another dataset: those are no newer version of them.
    """
    run = OutputDir(checkpoint.path.parent)
    changed = [
        f"--{name} {value}"
        for name, value in given.items()
        if name not in NOT_IDENTITY and checkpoint.settings.get(name, value) != value
    ]
    if "output_dir" in given or not changed or not run.has_run():
        return []
    path = run.predictions(given.get("split", "val"))
    dataset = checkpoint.settings.get("dataset")
    if given.get("dataset", dataset) != dataset:
        raise UserError(
            f"--dataset {given['dataset']}: the run of {run} is of {dataset}, and its {path.name} "
            "would be overwritten; name another folder by --output_dir"
        )
    return [f"note: {', '.join(changed)}: unlike the run, whose {path.name} is replaced"]


def settings_of(checkpoint: "Checkpoint", line: CommandLine) -> tuple[RunConfig, list[str]]:
    """(settings, notes for the user): the checkpoint's settings, overridden by the given flags.

    Shapes are always the checkpoint's.
    """
    shapes = {name: v for name, v in checkpoint.settings.items() if name in SHAPES}
    notes = []
    for name, value in shapes.items():
        given = line.given.get(name, value)
        if given != value:
            notes.append(f"note: --{name} {given} is not used: the checkpoint has {value}")
    # Predictions go beside the checkpoint, wherever it was copied; the split is always the flag's.
    folder = checkpoint.path.parent
    # So are permissions: what its training was allowed is not what its evaluation is. Its captions
    # are not read, and may lie in a folder that this user may not look into.
    own = {"output_dir": folder, "split": "val", "init_eval": False, "captions": None}
    saved = {**checkpoint.settings, **own, "allow_change": None, "verify": False}
    for name in SAVING:  # an earlier version may have accepted a number that is out of range now
        saved.pop(name, None)
    given = {name: value for name, value in line.given.items() if name not in shapes}
    return CommandLine(given, line.notes, line.debug).resolve(saved), notes


if __name__ == "__main__":  # `python -m vico.cli.evaluate`, or this file
    from vico.cli.main import console

    console(command="eval")
