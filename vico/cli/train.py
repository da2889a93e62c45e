"""`vico train`: train, or resume the run in OUTPUT_DIR; with --resume and --init_eval, evaluate."""

from dataclasses import replace
from typing import TYPE_CHECKING

from vico.cli.flags import parse, training_notes
from vico.cli.with_world import with_world
from vico.distributed import launcher_env, signals
from vico.io import log
from vico.io.output_dir import OutputDir

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.distributed.world import World

DESCRIPTION = (
    "Train ViCo, or resume the run in OUTPUT_DIR. Start it on all devices by "
    "`bash launch/train.sh FLAGS`."
)


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    signals.install_handlers()
    line = parse(argv, "vico train", DESCRIPTION)
    config = line.resolve()
    line = replace(line, notes=(*line.notes, *training_notes(config)))
    output_dir = OutputDir(config.output_dir)
    if launcher_env.is_rank_0() and output_dir.has_run() and not config.only_evaluates:
        # Before the ranks meet: a folder in use is reported at once. A folder without a run is
        # locked when the first file is written.
        for note in output_dir.lock():
            log.info(note)

    def work(world: "World") -> None:
        if config.only_evaluates:
            from vico.cli.evaluate import evaluate_named

            evaluate_named(config, world)
        else:
            from vico.train.loop import run
            from vico.train.start import start

            run(start(config, world))

    return with_world(line, work)


if __name__ == "__main__":  # `python -m vico.cli.train`, or this file
    from vico.cli.main import console

    console(command="train")
