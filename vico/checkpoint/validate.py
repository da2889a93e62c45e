"""Whether a checkpoint fits a model: its tensors' names, shapes and numbers."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vico.checkpoint import published
from vico.checkpoint.format import MOMENTS, Checkpoint
from vico.errors import CheckpointError
from vico.io.safe_load import is_float_tensor

Shapes = Mapping[str, tuple[int, ...]]
GATE = re.compile(r"layers\.(\d+)\.attention\.gate[12]")
MAX_SHOWN = 5


def validate_for_model(checkpoint: Checkpoint, shapes: Shapes, num_layers: int) -> Checkpoint:
    """`checkpoint` with exactly the tensors of `shapes`, in fp32. Raises CheckpointError.

    Published files hold gates of all layers. Those below the adapted layers were never used;
    they are left out and noted.
    """
    unused = _unused_gates(checkpoint.weights, shapes, num_layers)
    weights = {name: v for name, v in checkpoint.weights.items() if name not in unused}
    if faults := _faults(weights, shapes):
        raise CheckpointError(
            f"{checkpoint.path}: does not fit --model, --adapter_layer, --adapter_len and "
            f"--max_feats (tensors: {'; '.join(faults)}); give those of the run that wrote it"
        )
    for name, value in weights.items():
        require_finite(value, name, checkpoint.path)
    moments, state = checkpoint.moments, checkpoint.state
    if checkpoint.published_optimizer is not None:
        moments, num_updates = published.adam_moments(
            checkpoint.published_optimizer, checkpoint.weights, checkpoint.path
        )
        state = replace(state, num_updates=num_updates)
    if moments is not None:
        moments = _validated_moments(moments, shapes, checkpoint.path)
    notes: tuple[str, ...] = ()
    if unused:
        notes = (
            f"{checkpoint.path}: ignored {len(unused)} gates of layers below the adapted ones, "
            "which nothing uses",
        )
    ordered = {name: weights[name].float() for name in shapes}
    return replace(checkpoint, weights=ordered, moments=moments, state=state, notes=notes)


def _layer_of_gate(name: str) -> int | None:
    match = GATE.fullmatch(name)
    return int(match[1]) if match else None


def _unused_gates(weights: Mapping[str, Tensor], shapes: Shapes, num_layers: int) -> set[str]:
    """Gates that belong to layers of the model below the adapted ones."""
    adapted = [layer for layer in map(_layer_of_gate, shapes) if layer is not None]
    # A gate of a layer that the model does not have is not unused but wrong.
    lowest = min(min(adapted, default=0), num_layers)
    unused = set()
    for name in weights:
        layer = _layer_of_gate(name)
        if name not in shapes and layer is not None and layer < lowest:
            unused.add(name)
    return unused


def _faults(weights: Mapping[str, Tensor], shapes: Shapes) -> list[str]:
    misshapen = []
    for name, shape in shapes.items():
        if name in weights and tuple(weights[name].shape) != shape:
            misshapen.append(f"{name} {list(weights[name].shape)} instead of {list(shape)}")
    kinds = {
        "missing": [name for name in shapes if name not in weights],
        "unexpected": [name for name in weights if name not in shapes],
        "misshapen": misshapen,
    }
    faults = []
    for kind, names in kinds.items():
        if names:
            more = ", ..." if len(names) > MAX_SHOWN else ""
            faults.append(f"{len(names)} {kind} ({', '.join(names[:MAX_SHOWN])}{more})")
    return faults


def require_finite(value: object, name: str, path: Path) -> None:
    """Raises CheckpointError for anything but a dense tensor of finite floating-point numbers."""
    if not is_float_tensor(value):
        raise CheckpointError(
            f"{path}: '{name}' is no dense tensor of floating-point numbers; use another checkpoint"
        )
    assert isinstance(value, Tensor)
    if not torch.isfinite(value.float()).all():
        raise CheckpointError(
            f"{path}: '{name}' holds NaN or infinite values; use another checkpoint"
        )


def _validated_moments(
    moments: Mapping[str, Tensor], shapes: Shapes, path: Path
) -> dict[str, Tensor]:
    validated = {}
    for name, shape in shapes.items():
        for moment in MOMENTS:
            key = f"{name}.{moment}"
            _check_moment(moments, key, shape, path)
            validated[key] = moments[key].float()
    return validated


def _check_moment(
    moments: Mapping[str, Tensor], key: str, shape: tuple[int, ...], path: Path
) -> None:
    if key not in moments:
        raise CheckpointError(
            f"{path}: the optimizer's state lacks '{key}'; use another checkpoint"
        )
    value = moments[key]
    require_finite(value, key, path)
    if tuple(value.shape) != shape:
        raise CheckpointError(
            f"{path}: '{key}' of the optimizer's state has shape {list(value.shape)}, "
            "unlike its tensor; use another checkpoint"
        )
    if key.endswith(".exp_avg_sq") and (value < 0).any():
        raise CheckpointError(
            f"{path}: '{key}' of the optimizer's state, a mean of squares, is negative; "
            "use another checkpoint"
        )
