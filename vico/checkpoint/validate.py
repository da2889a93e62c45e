"""Whether a checkpoint fits a model: its tensors' names, shapes and numbers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from vico.checkpoint import published
from vico.checkpoint.format import MOMENTS, Checkpoint
from vico.checkpoint.state_dict import GATE
from vico.errors import CheckpointError
from vico.io.safe_load import is_float_tensor

Shapes = Mapping[str, tuple[int, ...]]
MAX_SHOWN = 5
VISUAL_PROJECTION = "visual_proj.weight"  # [width of the model, width of the features]


def validate_for_model(checkpoint: Checkpoint, shapes: Shapes, num_layers: int) -> Checkpoint:
    """`checkpoint` with exactly the tensors of `shapes`, in fp32. Raises CheckpointError.

    Published files hold gates of all layers. Those below the adapted layers were never used;
    they are left out and noted.
    """
    unused = _unused_gates(checkpoint.weights, shapes, num_layers)
    weights = {name: v for name, v in checkpoint.weights.items() if name not in unused}
    weights, reshaped = _with_gate_shapes(weights, shapes)
    _require_feature_width(weights, shapes, checkpoint.path)
    if faults := _faults(weights, shapes):
        raise CheckpointError(
            f"{checkpoint.path}: does not fit --model, --adapter_layer, --adapter_len and "
            f"--max_feats (tensors: {'; '.join(faults)}); give those of the run that wrote it"
        )
    for name, value in weights.items():
        require_finite(value, name, checkpoint.path)
    notes = list(checkpoint.notes)
    if unused:
        notes.append(
            f"{checkpoint.path}: ignored {len(unused)} gates of layers below the adapted ones, "
            "which nothing uses"
        )
    if reshaped:
        notes.append(f"{checkpoint.path}: {reshaped}")
    used = {name: checkpoint.weights[name] for name in weights}
    fitted = _with_published_moments(replace(checkpoint, notes=tuple(notes)), used)
    moments = fitted.moments
    if moments is not None:
        moments = _validated_moments(_with_gate_shapes(moments, shapes)[0], shapes, checkpoint.path)
    ordered = {name: weights[name].float() for name in shapes}
    return replace(fitted, weights=ordered, moments=moments)


def _with_published_moments(checkpoint: Checkpoint, used: Mapping[str, Tensor]) -> Checkpoint:
    """`checkpoint` with the moments of its published optimizer, or with a note why it has none."""
    if checkpoint.published_optimizer is None:
        return checkpoint
    found = published.adam_moments(checkpoint.published_optimizer, checkpoint.weights, used)
    if isinstance(found, str):
        note = published.not_used(checkpoint.path, found)
        return replace(checkpoint, published_optimizer=None, notes=(*checkpoint.notes, note))
    moments, num_updates = found
    state = replace(checkpoint.state, num_updates=num_updates)
    return replace(checkpoint, moments=moments, state=state)


def _with_gate_shapes(
    tensors: Mapping[str, Tensor], shapes: Shapes
) -> tuple[dict[str, Tensor], str]:
    """(`tensors` with the model's shapes of gates, what was changed).

    A gate has a number per head; [4] and [1, 4, 1] are [1, 4, 1, 1] written otherwise. A name may
    end in that of a moment.
    """
    result, changes = dict(tensors), list[str]()
    for name, value in tensors.items():
        gate = next((g for g in (name, name.rpartition(".")[0]) if GATE.fullmatch(g)), None)
        shape = shapes.get(gate or "")
        if shape is None or not isinstance(value, Tensor) or tuple(value.shape) == shape:
            continue
        if [n for n in value.shape if n != 1] == [n for n in shape if n != 1]:
            result[name] = value.reshape(shape)
            changes.append(f"of shape {list(value.shape)} taken as {list(shape)}")
    return result, f"{len(changes)} gates {changes[0]}" if changes else ""


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


def _require_feature_width(weights: Mapping[str, Tensor], shapes: Shapes, path: Path) -> None:
    """Raise CheckpointError where features are of another encoder than those of its training."""
    found, expected = weights.get(VISUAL_PROJECTION), shapes.get(VISUAL_PROJECTION)
    if found is None or expected is None or tuple(found.shape[:1]) != expected[:1]:
        return
    if found.ndim == 2 and found.shape[1] != expected[1]:
        raise CheckpointError(
            f"{path}: was trained on features {found.shape[1]} wide, and these are {expected[1]} "
            "wide; name those of the same encoder by --features, or train anew"
        )


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
