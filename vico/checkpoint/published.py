"""Writes the published code's checkpoint, for `vico convert` and --save_legacy.

It is one .pth file, {"model": tensors, "args": settings}, that holds plain values only.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Trainable tensors outside the layers; the gates of the layers follow them in the file.
NON_LAYER_NAMES = ("adapter_query.weight", "visual_proj.weight", "temporal_emb.weight")
# In the run's output_dir.
BEST_FILE = "checkpoint_best.pth"


def in_published_order(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainables in the published order, copied: torch.save writes a view's whole storage."""
    gates = weights.keys() - {*NON_LAYER_NAMES}
    gates_by_layer = sorted(gates, key=lambda name: (int(name.split(".")[1]), name))
    names = (*NON_LAYER_NAMES, *gates_by_layer)
    return {name: weights[name].clone(memory_format=torch.contiguous_format) for name in names}


def to_bytes(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    """The file's content. `settings` become plain values, which torch loads with weights_only."""
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    buffer = io.BytesIO()
    torch.save({"model": in_published_order(weights), "args": plain}, buffer)
    return buffer.getvalue()
