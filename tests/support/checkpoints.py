"""For tests of checkpoints: the state of a tiny model, error messages, a pickle with code."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vico.checkpoint.format import MOMENTS
from vico.checkpoint.read import read
from vico.checkpoint.validate import validate_for_model
from vico.errors import CheckpointError
from vico.model.config import LlamaConfig, trainable_shapes

LLAMA = LlamaConfig(dim=32, n_layers=3, n_heads=4, vocab_size=400)
SHAPES = trainable_shapes(LLAMA, num_adapted=3, adapter_len=10, num_slots=10)


def random_state(
    shapes: dict[str, tuple[int, ...]], seed: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and Adam's moments of these shapes."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    moments = {}
    for name, shape in shapes.items():
        for moment in MOMENTS:
            moments[f"{name}.{moment}"] = torch.rand(shape, generator=generator)
    return weights, moments


def validation_error(path: Path, shapes: dict[str, tuple[int, ...]] = SHAPES) -> str:
    """The message with which this checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        validate_for_model(read(path), shapes, LLAMA.n_layers)
    assert caught.value.exit_code == 3
    return str(caught.value)


def same(a: dict[str, Tensor] | None, b: dict[str, Tensor] | None) -> bool:
    """Whether the names, types and bits are equal."""
    if a is None or b is None:
        return a is b
    if a.keys() != b.keys():
        return False
    return all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


class Payload:
    """Pickled, this is a call of os.mkdir with the canary's path."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.canary),)
