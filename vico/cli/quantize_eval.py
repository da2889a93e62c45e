"""`vico quantize-eval`: what --quantize costs in scores and accuracy.

Scores the same questions twice, with the frozen linear layers as they are and quantized, and
compares the scores.
"""

import gc
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vico.checkpoint import read as checkpoints
from vico.checkpoint.format import Checkpoint
from vico.cli.evaluate import settings_of
from vico.cli.flags import CommandLine
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import Evaluation, evaluate
from vico.train.rank_consistency import require_same_files


@dataclass(frozen=True)
class Comparison:
    """Two evaluations of the same questions. A score is an option's mean loss per answer token."""

    original: Evaluation
    quantized: Evaluation

    def to_json(self) -> dict[str, Any]:
        """The differences; those that need answers only where the split has them."""
        original = [np.array(scores) for scores in self.original.scores]
        quantized = [np.array(scores) for scores in self.quantized.scores]
        changes = [after - before for before, after in zip(original, quantized, strict=True)]
        distances = np.abs(np.concatenate(changes))
        predictions = zip(self.original.predictions, self.quantized.predictions, strict=True)
        values: dict[str, Any] = {
            "n": len(original),
            "mean_score": float(np.concatenate(original).mean()),
            "mean_score_distance": float(distances.mean()),
            "largest_score_distance": float(distances.max()),
            "predictions_changed": sum(before != after for before, after in predictions),
        }
        if self.original.accuracies:
            questions = self.original.questions
            losses = [change[q.answer] for change, q in zip(changes, questions, strict=True)]
            values["right_option_loss_change"] = float(np.mean(losses))
            values["acc"] = self.original.accuracies["acc"]
            values["acc_quantized"] = self.quantized.accuracies["acc"]
        return values


def describe(values: dict[str, Any], method: str, precision: str) -> str:
    """The comparison as text, for `values` of `Comparison.to_json`."""
    mean, largest = values["mean_score_distance"], values["largest_score_distance"]
    lines = [
        f"{values['n']} questions, linear layers in {precision} and in {method}:",
        f"  score distance   {mean:.4f} on average, {largest:.4f} at most; "
        f"a score is {values['mean_score']:.4f} on average",
        f"  other answers    {values['predictions_changed']} of {values['n']} questions",
    ]
    if "acc" in values:
        change = values["right_option_loss_change"]
        lines += [
            f"  right option     its loss changes by {change:+.4f} on average",
            f"  accuracy         {values['acc']:.2%} -> {values['acc_quantized']:.2%}",
        ]
    return "\n".join(lines)


def quantize_eval(line: CommandLine, world: World) -> None:
    """Evaluate --resume on --split without and with --quantize, and print the comparison.

    The model that is not quantized must fit too, in a ZeRO stage that the planner chooses.
    Raises UserError.
    """
    with world.raise_together():
        checkpoint = checkpoints.read(line.given["resume"])
        config, notes = settings_of(checkpoint, line)
        if config.quantize is None:
            raise UserError(
                "--quantize is missing: name what to compare with the weights as they are, "
                "8bit or nf4"
            )
    require_same_files(world, config)
    for note in notes:
        world.print_rank0(note)
    original = _evaluate(checkpoint, replace(config, quantize=None), world)
    quantized = _evaluate(checkpoint, config, world)
    values = Comparison(original, quantized).to_json()
    world.print_rank0(describe(values, config.quantize, config.precision))
    world.print_rank0(json.dumps({"split": config.split, "quantize": config.quantize, **values}))


def _evaluate(checkpoint: Checkpoint, config: RunConfig, world: World) -> Evaluation:
    with world.raise_together():
        inputs = read_inputs(config, (config.split,), world)
        num_layers = inputs.weights.config.n_layers
        trainables = checkpoints.validate_for_model(
            checkpoint, inputs.trainable_shapes, num_layers
        ).weights
    engine = build_engine(config, inputs, trainables, world)
    world.print_rank0(f"linear layers in {config.quantize or config.precision}, {inputs.stage}")
    evaluation = evaluate(engine, inputs, config.split, config, world)
    # Free the memory before the next model is built.
    del engine
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return evaluation
