"""`vico eval`: score the questions of a split with a checkpoint."""

from vico.checkpoint import read as checkpoints
from vico.checkpoint.format import Checkpoint
from vico.cli.flags import CommandLine
from vico.distributed.world import World
from vico.train.build import build_engine, read_inputs
from vico.train.config import SHAPES, RunConfig
from vico.train.evaluate import evaluate, report
from vico.train.rank_consistency import require_same_files


def evaluate_checkpoint(line: CommandLine, world: World) -> None:
    """`vico eval`: evaluate --resume on --split, by the checkpoint's own settings where no flag is given."""
    with world.raise_together():
        found = checkpoints.read(line.given["resume"])
        config, notes = settings_of(found, line)
    require_same_files(world, config)
    with world.raise_together():
        inputs = read_inputs(config, (config.split,), world)
        found = checkpoints.validate_for_model(
            found, inputs.trainable_shapes, inputs.weights.config.n_layers
        )
    if world.is_main:
        inputs.cache.flush()
    for note in (*notes, *found.notes, *inputs.notes):
        world.print_rank0(note)
    engine = build_engine(config, inputs, found.weights, world)
    report(evaluate(engine, inputs, config.split, config, world), config.split, config, world)


def settings_of(found: Checkpoint, line: CommandLine) -> tuple[RunConfig, list[str]]:
    """(settings, what the user should know): the checkpoint's, then the flags', its tensors' shapes always its own."""
    kept = {name: found.settings[name] for name in SHAPES if name in found.settings}
    notes = [
        f"note: --{name} {line.given[name]} is not used: the checkpoint has {value}"
        for name, value in kept.items()
        if name in line.given and line.given[name] != value
    ]
    # Predictions go beside the checkpoint, wherever it has been copied since, and no split is remembered.
    saved = {**found.settings, "output_dir": found.path.parent, "split": "val", "init_eval": False}
    given = {name: value for name, value in line.given.items() if name not in kept}
    return CommandLine(given, line.notes, line.debug).resolve(saved), notes
