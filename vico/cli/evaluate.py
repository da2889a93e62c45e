"""`vico eval`: score the questions of a split with a checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.cli.flags import CommandLine, parse_with_checkpoint
from vico.cli.with_world import with_world
from vico.data.mixture import dataset_names
from vico.io import streams
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.identity import NOT_IDENTITY, SAVING, SHAPES
from vico.train.settings import has_dialogue

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
    evaluate_checkpoint(config, checkpoint, world, on_other_datasets(checkpoint, config))


def evaluate_checkpoint(
    config: RunConfig, checkpoint: "Checkpoint", world: "World", notes: Sequence[str] = ()
) -> None:
    """Score config.split, print the accuracies, write the predictions. A collective."""
    from vico.train.attention_shares import measured_attention
    from vico.train.build import build_engine
    from vico.train.cognition import measured_texts
    from vico.train.evaluate import evaluate, report
    from vico.train.start import open_evaluation

    inputs, checkpoint = open_evaluation(config, checkpoint, world)
    if os.path.isdir(config.output_dir):
        streams.keep_lost_output(OutputDir(config.output_dir).lost_output)
    for note in (*notes, *checkpoint.notes, *inputs.notes):
        world.print_rank0(note)
    engine = build_engine(config, inputs, checkpoint.weights, world)
    evaluation = evaluate(engine, inputs, config.split, config, world)
    facts: dict[str, str] = {"split": config.split}
    if evaluates_others(checkpoint, config):
        names, trained_on = config.dataset_names, trained_datasets(checkpoint)
        facts |= {"dataset": ",".join(names), "trained_on": ",".join(trained_on)}
    more = measured_texts(engine, inputs, world)
    more |= measured_attention(engine, inputs, config, world)
    report(evaluation, predictions_path(checkpoint, config), facts, world, more)


def trained_datasets(checkpoint: "Checkpoint") -> tuple[str, ...]:
    """The names of the data sets that it was trained on; empty if it does not say."""
    text = checkpoint.settings.get("dataset")
    return dataset_names(text) if text else ()


def evaluates_others(checkpoint: "Checkpoint", config: RunConfig) -> bool:
    """Whether the data sets to evaluate are others, or fewer, than it was trained on."""
    trained_on = trained_datasets(checkpoint)
    return bool(trained_on) and set(trained_on) != set(config.dataset_names)


def on_other_datasets(checkpoint: "Checkpoint", config: RunConfig) -> list[str]:
    """A note if it was not trained on a data set that is evaluated."""
    trained_on = trained_datasets(checkpoint)
    others = [name for name in config.dataset_names if name not in trained_on]
    if not others or not trained_on:
        return []
    return [
        f"note: {checkpoint.path}: was trained on {', '.join(trained_on)}, and is evaluated on "
        f"{', '.join(others)}: another data set"
    ]


def predictions_path(checkpoint: "Checkpoint", config: RunConfig) -> Path:
    """Beside a checkpoint, predictions on other data sets do not replace those of its run."""
    folder = OutputDir(config.output_dir)
    is_own_folder = config.output_dir == checkpoint.path.parent.absolute()
    if is_own_folder and evaluates_others(checkpoint, config):
        return folder.predictions(config.split, config.dataset_names)
    return folder.predictions(config.split)


def on_replaced_predictions(checkpoint: "Checkpoint", given: Mapping[str, Any]) -> list[str]:
    """A note where predictions of other settings replace those of the checkpoint's own run.

    `given`: by flags. Predictions on other data sets have a file of their own.
    """
    run = OutputDir(checkpoint.path.parent)
    changed = [
        f"--{name} {value}"
        for name, value in given.items()
        if name not in NOT_IDENTITY and checkpoint.settings.get(name, value) != value
    ]
    if "output_dir" in given or not changed or not run.has_run():
        return []
    trained_on = trained_datasets(checkpoint)
    if "dataset" in given and set(dataset_names(given["dataset"])) != set(trained_on):
        return []
    path = run.predictions(given.get("split", "val"))
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
    own["no_eval"] = False
    saved = {**checkpoint.settings, **own, "allow_change": None, "verify": False}
    for name in SAVING:  # an earlier version may have accepted a number that is out of range now
        saved.pop(name, None)
    given = {name: value for name, value in line.given.items() if name not in shapes}
    if saved.get("sub") and not has_dialogue(RunConfig(**{**saved, **given})):
        saved["sub"] = False  # it had no effect on these data sets
    config = CommandLine(given, line.notes, line.debug).resolve(saved)
    return config, [*notes, *on_other_datasets(checkpoint, config)]


if __name__ == "__main__":  # `python -m vico.cli.evaluate`, or this file
    from vico.cli.main import console

    console(command="eval")
