"""The .pth file of the published code: {"model", "optimizer", "epoch", "args", ...}.

Read without executing anything; written by `vico convert` and --save_legacy with plain values only.
"""

import argparse
import io
import pathlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.checkpoint.format import MOMENTS, Checkpoint, PublishedOptimizer
from vico.errors import CheckpointError, show
from vico.io.digest import digest_files
from vico.io.safe_load import is_float_tensor, load_tensors

# These come before the gates of the layers.
FIRST = ("adapter_query.weight", "visual_proj.weight", "temporal_emb.weight")
MAX_EPOCHS, MAX_STEPS = 10**6, 10**12  # a larger number means a damaged file
# Under every name: Python 3.13 writes pathlib's classes as pathlib._local's. A path of another
# system is no path here, and is built as a pure one.
ALLOWED_CLASSES = [
    (argparse.Namespace, "argparse.Namespace"),
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *(
        (pathlib.PureWindowsPath, f"{module}.WindowsPath")
        for module in ("pathlib", "pathlib._local")
    ),
]


def read(path: Path) -> Checkpoint:
    """The weights of a published file and, where it holds them, its optimizer and epoch.

    `settings` of the result are the plain values of "args", unchecked. Raises CheckpointError.
    """
    content = load_tensors(
        path,
        "the checkpoint",
        ALLOWED_CLASSES,
        allow_old_format=True,
        verify_checksums=True,
        error=CheckpointError,
    )
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{path}: has no 'model' dict of tensors; a published checkpoint has one"
        )
    for name, value in content["model"].items():
        if not isinstance(name, str) or not is_float_tensor(value):
            raise CheckpointError(
                f"{path}: 'model' entry {show(name)} is no dense tensor of floating-point numbers"
            )
    weights = {name: value.detach() for name, value in content["model"].items()}
    return Checkpoint(
        path,
        weights,
        settings=_plain_settings(content.get("args")),
        digest=digest_files([path]),
        published=True,
        published_optimizer=_optimizer(content, path),
    )


def _optimizer(content: Mapping[str, Any], path: Path) -> PublishedOptimizer | None:
    state, epoch = content.get("optimizer"), content.get("epoch")
    if state is None or epoch is None:
        return None
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < MAX_EPOCHS:
        raise CheckpointError(
            f"{path}: 'epoch' is {show(epoch)}, not a whole number below {MAX_EPOCHS:,}"
        )
    return PublishedOptimizer(epoch, state)


def _plain_settings(args: object) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, dict):
        return {}
    plain = str | int | float | bool
    return {k: v for k, v in args.items() if isinstance(k, str) and isinstance(v, plain)}


def adam_moments(
    optimizer: PublishedOptimizer, weights: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], int]:
    """(Adam's moments by "NAME.moment", the number of updates). Raises CheckpointError.

    torch numbers parameters in the order of the optimizer's groups, which is that of 'model'.
    """
    moments: dict[str, Tensor] = {}
    updates = set()
    try:
        assert isinstance(optimizer.state, dict)
        numbers: list[Any] = []
        for group in optimizer.state["param_groups"]:
            numbers += group["params"]
        states = optimizer.state["state"]
        for number, name in zip(numbers, weights, strict=True):
            if number in states:
                for moment in MOMENTS:
                    moments[f"{name}.{moment}"] = states[number][moment]
                updates.add(int(states[number]["step"]))
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        raise CheckpointError(
            f"{path}: 'optimizer' is not AdamW's state for the tensors of 'model'; "
            "drop it to start anew from 'model'"
        ) from None
    if len(updates) != 1 or not 1 <= min(updates) < MAX_STEPS:
        raise CheckpointError(
            f"{path}: 'optimizer' holds states of steps {sorted(updates)}, not of one; "
            "drop it to start anew from 'model'"
        )
    return moments, updates.pop()


def in_published_order(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trainables in the order of the published files.

    Each gets its own storage, because torch.save writes whole storages.
    """
    gates = sorted(weights.keys() - {*FIRST}, key=lambda name: (int(name.split(".")[1]), name))
    layout = torch.contiguous_format
    return {name: weights[name].clone(memory_format=layout) for name in (*FIRST, *gates)}


def to_bytes(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> bytes:
    """The content of a .pth file. `settings` become plain values, which any torch loads."""
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    buffer = io.BytesIO()
    torch.save({"model": in_published_order(weights), "args": plain}, buffer)
    return buffer.getvalue()
