"""Converts adapters between ViCo's checkpoints and the published code's .pth files."""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor

from vico.checkpoint import published
from vico.checkpoint.format import Checkpoint
from vico.checkpoint.state_dict import FIRST, GATE
from vico.checkpoint.validate import require_finite
from vico.errors import CheckpointError, UserError
from vico.io.atomic import make_folder, write_bytes
from vico.io.paths import is_folder


def convert_adapter(checkpoint: Checkpoint, target: Path) -> str:
    """ViCo's checkpoint (folder or .safetensors) to a published .pth, and a .pth to .safetensors.

    Returns a description of what was done. Raises UserError or DiskError.
    """
    source = checkpoint.path
    check_adapter(checkpoint.weights, source)
    weights = published.in_published_order(checkpoint.weights)
    make_folder(target.parent)
    if is_folder(source) or source.suffix == ".safetensors":
        _require_suffix(target, ".pth")
        write_bytes(target, published.to_bytes(weights, checkpoint.settings))
        kind, omitted = "a published checkpoint", "the optimizer's state"
    else:
        _require_suffix(target, ".safetensors")
        write_bytes(target, safetensors.torch.save(weights))
        kind, omitted = "safetensors", "settings and the optimizer's state"
    return f"{source} as {kind}, {len(weights)} tensors, without {omitted}"


def _require_suffix(target: Path, suffix: str) -> None:
    if target.suffix != suffix:
        raise UserError(f"{target}: this conversion writes a {suffix} file; name the target so")


def check_adapter(weights: Mapping[str, Tensor], source: Path) -> None:
    """The weights are a whole adapter: the tensors outside the layers, and pairs of gates."""
    gates = {name for name in weights if GATE.fullmatch(name)}
    expected = {*FIRST}
    for gate in gates:
        stem = gate[:-1]
        expected |= {f"{stem}1", f"{stem}2"}
    missing, unknown = expected - weights.keys(), weights.keys() - expected
    if missing or unknown or not gates:
        problem = "lacks" if missing or not gates else "holds unknown"
        names = ", ".join(sorted(missing or unknown)[:3]) or "gates"
        raise CheckpointError(f"{source}: {problem} {names}; an adapter of ViCo's is expected")
    for name, value in weights.items():
        require_finite(value, name, source)
