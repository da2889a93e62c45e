"""The optimizer of the trainables, and its schedule: a pure function of the step (METHOD 3)."""

import math
from collections.abc import Iterable

import torch
from torch import nn

BETAS = (0.9, 0.95)


def make_optimizer(trainables: Iterable[nn.Parameter], weight_decay: float) -> torch.optim.AdamW:
    """AdamW with decay on every trainable. The learning rate is set before each step."""
    return torch.optim.AdamW(trainables, lr=0.0, betas=BETAS, eps=1e-8, weight_decay=weight_decay)


def learning_rate(
    step: int, steps_per_epoch: int, peak: float, minimum: float, warmup_epochs: float, epochs: int
) -> float:
    """The learning rate of the update after `step` updates.

    Linear from 0 over the warm-up, then half a cosine down to `minimum` at the last epoch.
    """
    epoch = step / steps_per_epoch
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = 1.0
    if epochs > warmup_epochs:
        progress = min(1.0, (epoch - warmup_epochs) / (epochs - warmup_epochs))
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))


def peak_learning_rate(lr: float | None, blr: float, questions_per_step: int) -> float:
    """`--lr`, or `--blr` per 256 questions of a step."""
    return blr * questions_per_step / 256 if lr is None else lr
