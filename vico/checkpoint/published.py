"""The .pth file of the published code: {"model", "optimizer", "epoch", "args", ...}.

state_dict.py says which other layouts are taken, too.

Read without executing anything; written by `vico convert` and --save_legacy with plain values only.
"""

import argparse
import io
import pathlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.checkpoint.format import MOMENTS, Checkpoint, PublishedOptimizer
from vico.checkpoint.state_dict import FIRST, adapter_tensors, find_tensors
from vico.errors import CheckpointError, show
from vico.io import numpy_scalars
from vico.io.digest import digest_files
from vico.io.safe_load import load_tensors

MAX_EPOCHS, MAX_STEPS = 10**6, 10**12  # a larger number means a damaged file
# Under every name: Python 3.13 writes pathlib's classes as pathlib._local's. A path of another
# system is no path here, and is built as a pure one.
ALLOWED_CLASSES: list[type | tuple[Callable[..., Any], str]] = [
    (argparse.Namespace, "argparse.Namespace"),
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *(
        (pathlib.PureWindowsPath, f"{module}.WindowsPath")
        for module in ("pathlib", "pathlib._local")
    ),
    *numpy_scalars.ALLOWED_CLASSES,
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
    tensors, entry, notes = find_tensors(content, path)
    weights, more = adapter_tensors(tensors, path, entry)
    optimizer, without = _optimizer(content, path)
    return Checkpoint(
        path,
        weights,
        settings=_plain_settings(content.get("args")),
        digest=digest_files([path]),
        published=True,
        published_optimizer=optimizer,
        notes=(*notes, *more, *without),
    )


def _optimizer(
    content: Mapping[str, Any], path: Path
) -> tuple[PublishedOptimizer | None, tuple[str, ...]]:
    """(the optimizer of the file, notes); None without one, or without the epoch it belongs to."""
    state, epoch = content.get("optimizer"), content.get("epoch")
    if state is None:
        return None, ()
    if epoch is None:
        return None, (not_used(path, "the file has no 'epoch', which says where to go on"),)
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < MAX_EPOCHS:
        raise CheckpointError(
            f"{path}: 'epoch' is {show(epoch)}, not a whole number below {MAX_EPOCHS:,}"
        )
    return PublishedOptimizer(epoch, state), ()


def not_used(path: Path, reason: str) -> str:
    """The note where a file's optimizer cannot be gone on with."""
    return f"{path}: its 'optimizer' is not used: {reason}; training starts anew from 'model'"


def _plain_settings(args: object) -> dict[str, Any]:
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if not isinstance(args, dict):
        return {}
    plain = str | int | float | bool
    return {k: v for k, v in args.items() if isinstance(k, str) and isinstance(v, plain)}


def adam_moments(
    optimizer: PublishedOptimizer, names: Collection[str], used: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int] | str:
    """(Adam's moments by "NAME.moment", the number of updates), or why the state is not AdamW's.

    `names`: of all tensors of 'model'. `used`: those that have a state. torch numbers parameters
    in the order of the optimizer's groups, which is that of 'model'.
    """
    try:
        assert isinstance(optimizer.state, dict)
        numbers: list[Any] = []
        for group in optimizer.state["param_groups"]:
            numbers += group["params"]
        states = optimizer.state["state"]
        if not states:
            return "it holds no state of AdamW, because it is empty"
        if len(numbers) != len(names):
            return f"it is of {len(numbers)} tensors, and 'model' has {len(names)}"
        pairs = zip(names, numbers, strict=True)
        return _moments_of({name: states[i] for name, i in pairs if i in states}, used)
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        return "it holds no state of AdamW for the tensors of 'model'"


def _moments_of(
    states: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], int] | str:
    moments: dict[str, Tensor] = {}
    updates = set()
    for name, weight in weights.items():
        if name not in states:
            return f"it lacks the state of {name}"
        state = states[name]
        if "step" not in state or not {*MOMENTS} <= {*state} or "max_exp_avg_sq" in state:
            expected = "step, exp_avg, exp_avg_sq"
            return f"it holds {', '.join(map(str, state))} where AdamW's has {expected}"
        for moment in MOMENTS:
            value = state[moment]
            if isinstance(value, Tensor) and value.shape != weight.shape:
                shapes = f"{list(value.shape)}, and the tensor {list(weight.shape)}"
                return f"the {moment} of {name} has shape {shapes}"
            moments[f"{name}.{moment}"] = value
        updates.add(int(state["step"]))
    if len(updates) != 1 or not 1 <= min(updates) < MAX_STEPS:
        return f"it holds states of steps {sorted(updates)[:5]}, not of one"
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
