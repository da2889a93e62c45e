"""`vico quantize-eval`: how --quantize changes the scores and answers of a checkpoint.

It scores the same questions twice: with the unquantized backbone and with quantized linear layers.
"""

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vico.cli.flags import parse_with_checkpoint
from vico.cli.with_world import with_world
from vico.errors import UserError
from vico.train.config import RunConfig

if TYPE_CHECKING:  # they import torch, which is slow; a mistyped flag is reported before
    from vico.checkpoint.format import Checkpoint
    from vico.distributed.world import World
    from vico.train.evaluate import Evaluation

DESCRIPTION = (
    "Measure what --quantize costs on --split: how far the scores and answers of a checkpoint "
    "(--resume) are from those of the unquantized backbone, which must fit in memory as well. "
    "Settings come from the checkpoint, as for `vico eval`."
)


def main(argv: list[str]) -> int:
    """Run the command on this rank; returns the exit code."""
    line = parse_with_checkpoint(argv, "vico quantize-eval", DESCRIPTION)

    def work(world: "World") -> None:
        from vico.cli.evaluate import settings_of
        from vico.train.rank_consistency import require_same_files
        from vico.train.saved_run import read_for_evaluation

        with world.raise_together():
            checkpoint = read_for_evaluation(line.given["resume"])
            config, notes = settings_of(checkpoint, line)
            if config.quantize is None:
                raise UserError(
                    "--quantize is missing: give 8bit, nf4 or fp8, to be compared with the "
                    "unquantized weights"
                )
        require_same_files(world, config)
        for note in notes:
            world.print_rank0(note)
        unquantized = _evaluate(checkpoint, replace(config, quantize=None), world)
        quantized = _evaluate(checkpoint, config, world)
        result = Comparison(unquantized, quantized).to_json()
        world.print_rank0(describe(result, config.quantize, config.precision))
        shown = {"split": config.split, "quantize": config.quantize, **result}
        world.print_rank0(json.dumps(shown))

    return with_world(line, work)


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions. Scores are mean losses per answer token."""

    unquantized: "Evaluation"
    quantized: "Evaluation"

    def to_json(self) -> dict[str, Any]:
        """The differences. `right_option_loss_change` only where the split has answers."""
        unquantized = [np.array(scores) for scores in self.unquantized.scores]
        quantized = [np.array(scores) for scores in self.quantized.scores]
        distances = np.abs(np.concatenate(quantized) - np.concatenate(unquantized))
        answers = zip(self.unquantized.predictions, self.quantized.predictions, strict=True)
        result: dict[str, Any] = {
            "n": len(unquantized),
            "mean_score": float(np.concatenate(unquantized).mean()),
            "mean_score_distance": float(distances.mean()),
            "largest_score_distance": float(distances.max()),
            "predictions_changed": sum(before != after for before, after in answers),
        }
        if "acc" in self.unquantized.accuracies:
            changes = []
            questions = self.unquantized.questions
            for question, before, after in zip(questions, unquantized, quantized, strict=True):
                changes.append(after[question.answer] - before[question.answer])
            result["right_option_loss_change"] = float(np.mean(changes))
            result["acc"] = self.unquantized.accuracies["acc"]
            result["acc_quantized"] = self.quantized.accuracies["acc"]
        return result


def describe(result: dict[str, Any], kind: str, precision: str) -> str:
    """The comparison as lines of text."""
    mean, largest = result["mean_score_distance"], result["largest_score_distance"]
    changed, n = result["predictions_changed"], result["n"]
    lines = [
        f"{n} questions, linear layers in {precision} and in {kind}:",
        f"  score distance   {mean:.4f} on average, {largest:.4f} at most; "
        f"a score is {result['mean_score']:.4f} on average",
        f"  other answers    {changed} of {n} questions",
    ]
    if "acc" in result:
        change = result["right_option_loss_change"]
        lines.append(f"  right option     its loss changes by {change:+.4f} on average")
        lines.append(f"  accuracy         {result['acc']:.2%} -> {result['acc_quantized']:.2%}")
    return "\n".join(lines)


def _evaluate(checkpoint: "Checkpoint", config: RunConfig, world: "World") -> "Evaluation":
    """Score config.split once, and free the model. A collective."""
    import gc

    import torch

    from vico.train.build import build_engine
    from vico.train.evaluate import evaluate
    from vico.train.start import open_evaluation

    inputs, checkpoint = open_evaluation(replace(config, text=(), keep=None), checkpoint, world)
    engine = build_engine(config, inputs, checkpoint.weights, world)
    kind = config.quantize or config.precision
    world.print_rank0(f"linear layers in {kind}, {inputs.stage}")
    evaluation = evaluate(engine, inputs, config.split, config, world)
    del engine  # before the next model is built
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return evaluation


if __name__ == "__main__":  # `python -m vico.cli.quantize_eval`, or this file
    from vico.cli.main import console

    console(command="quantize-eval")
