"""`vico cost`: what --quantize costs. Scores the same questions on the backbone as it is and packed, and says how far apart they are."""

import gc
import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from vico.checkpoint import format
from vico.checkpoint import read as checkpoints
from vico.cli.evaluate import settings_of
from vico.cli.flags import CommandLine
from vico.distributed.world import World
from vico.errors import UserError
from vico.train.build import build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import Evaluation, evaluate
from vico.train.rank_consistency import require_same_files


@dataclass(frozen=True)
class Cost:
    """Scores are mean losses per answer token."""

    whole: Evaluation
    packed: Evaluation

    def to_json(self) -> dict[str, Any]:
        """`right_option` only where the split has answers."""
        scores = [
            (np.array(a), np.array(b))
            for a, b in zip(self.whole.scores, self.packed.scores, strict=True)
        ]
        apart = np.concatenate([np.abs(b - a) for a, b in scores])
        changed = sum(
            a != b for a, b in zip(self.whole.predictions, self.packed.predictions, strict=True)
        )
        found: dict[str, Any] = {
            "n": len(scores),
            "mean_score": float(np.concatenate([a for a, _ in scores]).mean()),
        }
        found |= {
            "mean_score_distance": float(apart.mean()),
            "largest_score_distance": float(apart.max()),
            "predictions_changed": changed,
        }
        if self.whole.accuracies:
            gains = [
                b[q.answer] - a[q.answer]
                for (a, b), q in zip(scores, self.whole.questions, strict=True)
            ]
            found |= {"right_option_loss_change": float(np.mean(gains))}
            found |= {
                "acc": self.whole.accuracies["acc"],
                "acc_quantized": self.packed.accuracies["acc"],
            }
        return found


def describe(found: dict[str, Any], kind: str, precision: str) -> str:
    lines = [
        f"{found['n']} questions, products in {precision} and in {kind}:",
        f"  scores apart     {found['mean_score_distance']:.4f} on average, {found['largest_score_distance']:.4f} at most; "
        f"a score is {found['mean_score']:.4f} on average",
        f"  other answers    {found['predictions_changed']} of {found['n']} questions",
    ]
    if "acc" in found:
        lines += [
            f"  right option     its loss changes by {found['right_option_loss_change']:+.4f} on average",
            f"  accuracy         {found['acc']:.2%} -> {found['acc_quantized']:.2%}",
        ]
    return "\n".join(lines)


def measure(line: CommandLine, world: World) -> None:
    """Evaluate --resume on --split twice. The backbone as it is must fit too, by whatever ZeRO stage the planner finds."""
    with world.raise_together():
        found = checkpoints.read(line.given["resume"])
        config, notes = settings_of(found, line)
        if config.quantize is None:
            raise UserError(
                "--quantize is missing: name what is to be compared with the weights as they are, 8bit or nf4"
            )
    require_same_files(world, config)
    for note in notes:
        world.print_rank0(note)
    cost = Cost(
        *(
            _evaluated(found, replace(config, quantize=kind), world)
            for kind in (None, config.quantize)
        )
    )
    result = cost.to_json()
    world.print_rank0(describe(result, config.quantize, config.precision))
    world.print_rank0(json.dumps({"split": config.split, "quantize": config.quantize, **result}))


def _evaluated(found: format.Checkpoint, config: RunConfig, world: World) -> Evaluation:
    with world.raise_together():
        inputs = read_inputs(config, (config.split,), world)
        fitted = checkpoints.validate_for_model(
            found, inputs.trainable_shapes, inputs.weights.config.n_layers
        )
    engine = build_engine(config, inputs, fitted.weights, world)
    world.print_rank0(f"products in {config.quantize or config.precision}, {inputs.stage}")
    evaluation = evaluate(engine, inputs, config.split, config, world)
    del engine  # before the next is built
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
    return evaluation
