"""The file of the published code, as `vico convert` and --save_legacy write it: {"model", "args"}, plain values only."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ENDS = (
    "adapter_query.weight",
    "visual_proj.weight",
    "temporal_emb.weight",
)  # what comes before the layers' gates
BEST = "checkpoint_best.pth"  # in OUTPUT_DIR


def ordered(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainables in the published order, each with a storage of its own: torch.save writes whole storages."""
    gates = sorted(weights.keys() - {*ENDS}, key=lambda name: (int(name.split(".")[1]), name))
    return {
        name: weights[name].clone(memory_format=torch.contiguous_format) for name in (*ENDS, *gates)
    }


def to_bytes(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    """`settings` become a dict of plain values, which any torch loads without being allowed anything."""
    plain = {
        name: str(value) if isinstance(value, Path) else value for name, value in settings.items()
    }
    buffer = io.BytesIO()
    torch.save({"model": ordered(weights), "args": plain}, buffer)
    return buffer.getvalue()
