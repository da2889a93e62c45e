"""Checkpoints: the trainables, Adam's moments and where the run stood; ours (a folder), and the lineage's (a .pth file).

Ours hold whole tensors under the lineage's names, so they fit any number of ranks and any ZeRO stage.
"""

import argparse
import contextlib
import hashlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vico.checkpoint.format import (
    FORMAT,
    GATE,
    MAX_EPOCHS,
    MAX_STEPS,
    OPTIMIZER,
    REMEDY,
    STATE,
    STEP_FOLDER,
    WEIGHTS,
    Checkpoint,
    TrainState,
    step_folders,
    with_checksum,
)
from vico.errors import CheckpointError, UserError, show
from vico.io.atomic import read_bytes
from vico.io.safe_load import is_float_tensor, load_tensors
from vico.io.text import as_object, parse_json, read_text
from vico.train.config import RunConfig, settings_from
from vico.train.optim import MOMENTS


def read(path: Path, run: str = "") -> Checkpoint:
    """A checkpoint of ours or of the lineage; with `run`, only one that this run has written (or one that says no run).

    Raises CheckpointError when it cannot be used; never runs code from it.
    """
    if not os.path.exists(path):
        raise CheckpointError(
            f"{path}: no such checkpoint; --resume takes a checkpoint folder or a .pth file"
        )
    if path.is_dir():
        return _read_folder(path, run)
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path), None, TrainState(), {})
    return _read_lineage(path)


def _read_folder(path: Path, run: str) -> Checkpoint:
    where = path / STATE
    if not os.path.exists(where):
        inner = step_folders(path)
        hint = f"did you mean {inner[0]}?" if inner else "a checkpoint is a folder with state.json"
        raise CheckpointError(f"{where}: no such file; {hint}")
    text = read_text(where, "the state of the checkpoint", CheckpointError)
    state = as_object(parse_json(text, where, 1, CheckpointError), where, CheckpointError)
    state.pop("sha256", None)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: 'format' is {show(state.get('format'))} and not {FORMAT}, so another version wrote it; {REMEDY}"
        )
    if text != with_checksum(state):
        raise CheckpointError(f"{where}: damaged (its sha256 is not the recorded one); {REMEDY}")
    _check_state(state, where)
    try:
        settings = settings_from(state["settings"], str(where))
    except UserError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from None
    progress = TrainState(**state["progress"])
    named = STEP_FOLDER.fullmatch(path.name)
    if named and int(named[1]) != progress.step:
        raise CheckpointError(
            f"{path}: holds the checkpoint of step {progress.step}, so it was renamed or copied over; {REMEDY}"
        )
    if run and state.get("run", run) != run:
        raise CheckpointError(
            f"{path}: is of another run ({show(state['run'])} and not {run}), so it was copied here; move it away"
        )
    if extra := sorted({entry.name for entry in path.iterdir()} - {WEIGHTS, OPTIMIZER, STATE}):
        raise CheckpointError(
            f"{path}: holds '{extra[0]}', which is no part of a checkpoint; move it away"
        )
    weights, moments = (
        _read_safetensors(path / name, state["files"][name]) for name in (WEIGHTS, OPTIMIZER)
    )
    return Checkpoint(
        path, weights, moments, progress, settings, fingerprints=dict(state.get("fingerprints", {}))
    )


def _check_state(state: Mapping[str, Any], where: Path) -> None:
    """Whoever wrote it has with_checksum it too, so that the seal says nothing of what is in it."""

    def is_count(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63

    def is_number(value: object) -> bool:
        return (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        )

    def is_list_of(kind: Callable[[object], bool], value: object) -> bool:
        return isinstance(value, list) and all(map(kind, value))

    rules: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(("step", "questions_per_step", "num_updates"), is_count),
        "best_accuracy": lambda value: value is None or is_number(value),
        "epoch_loss_sums": partial(is_list_of, is_number),
        "epoch_target_counts": partial(is_list_of, is_count),
        "evaluation_due": lambda value: isinstance(value, bool),
    }
    parts: dict[str, Any] = {
        name: state.get(name) for name in ("progress", "settings", "files")
    } | {"fingerprints": state.get("fingerprints", {})}
    for name, part in parts.items():
        if not isinstance(part, dict):
            raise CheckpointError(
                f"{where}: '{name}' is {show(part)} and must be an object; {REMEDY}"
            )
    progress, files, prints = parts["progress"], parts["files"], parts["fingerprints"]
    wrong = [
        name
        for name in {**rules, **progress}
        if name not in rules or name not in progress or not rules[name](progress[name])
    ]
    wrong += [name for name in (WEIGHTS, OPTIMIZER) if not isinstance(files.get(name), dict)]
    wrong += [name for name, value in prints.items() if not isinstance(value, str)]
    if wrong:
        raise CheckpointError(
            f"{where}: the entry {show(wrong[0])} is missing, unknown or of another kind; {REMEDY}"
        )


def _read_safetensors(path: Path, recorded: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of a file; `recorded`: its size and sha256, checked on the very bytes that are then taken."""
    try:
        data = read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path}: damaged ({error.strerror}); {REMEDY}") from None
    fault = ""
    if recorded is not None and len(data) != recorded.get("bytes"):
        fault = f"{len(data)} of {show(recorded.get('bytes'))} bytes"
    elif recorded is not None and hashlib.sha256(data).hexdigest() != recorded.get("sha256"):
        fault = "its sha256 is not the recorded one"
    if not fault:
        try:
            return safetensors.torch.load(data)
        except SafetensorError as error:
            fault = str(error)
    raise CheckpointError(f"{path}: damaged ({fault}); {REMEDY}")


def _read_lineage(path: Path) -> Checkpoint:
    allowed = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]
    content = load_tensors(
        path,
        "the checkpoint",
        allowed,
        allow_old_format=True,
        verify_checksums=True,
        error=CheckpointError,
    )
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(
            f"{path}: has no 'model' dict of tensors; a lineage checkpoint has one"
        )
    weights = content["model"]
    for name, value in weights.items():
        if not isinstance(name, str) or not is_float_tensor(value):
            raise CheckpointError(
                f"{path}: 'model' entry {show(name)} is no dense tensor of floating-point numbers"
            )
    weights, settings = (
        {name: value.detach() for name, value in weights.items()},
        _lineage_settings(content.get("args"), path),
    )
    optimizer, epoch = content.get("optimizer"), content.get("epoch")
    if optimizer is None or epoch is None:
        return Checkpoint(path, weights, None, TrainState(), settings)
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < MAX_EPOCHS:
        raise CheckpointError(
            f"{path}: 'epoch' is {show(epoch)}, not a whole number below {MAX_EPOCHS:,}"
        )
    return Checkpoint(
        path,
        weights,
        None,
        TrainState(),
        settings,
        lineage_epoch=epoch,
        lineage_optimizer=optimizer,
    )


def _lineage_settings(args: object, path: Path) -> dict[str, Any]:
    """What the file's Namespace, or dict, says under our names. The lineage's flags are not ours to judge: what cannot be is left out."""
    settings: dict[str, Any] = {}
    said = (
        vars(args)
        if isinstance(args, argparse.Namespace)
        else args
        if isinstance(args, dict)
        else {}
    )
    for name, value in said.items():
        if (
            isinstance(name, str)
            and isinstance(value, str | int | float | bool)
            and name not in ("resume", "output_dir", "device")
        ):
            with contextlib.suppress(UserError):
                typed = settings_from({name: value}, str(path))
                RunConfig(**{"dataset": "tvqa", **typed})
                settings |= typed
    if settings.get("dataset") != "tvqa":
        settings.pop("sub", None)  # which changed nothing there
    return settings


def _lineage_moments(
    optimizer: object, weights: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, Tensor], int]:
    """Adam's moments by name. torch numbers parameters in the order of the optimizer's groups, which is that of 'model'."""
    try:
        assert isinstance(optimizer, dict)
        numbers = [n for group in optimizer["param_groups"] for n in group["params"]]
        states = {
            name: optimizer["state"][n]
            for n, name in zip(numbers, weights, strict=True)
            if n in optimizer["state"]
        }
        moments = {
            f"{name}.{moment}": state[moment]
            for name, state in states.items()
            for moment in MOMENTS
        }
        steps = {int(state["step"]) for state in states.values()}
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        raise CheckpointError(
            f"{path}: 'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'"
        ) from None
    if len(steps) != 1 or not 1 <= min(steps) < MAX_STEPS:
        raise CheckpointError(
            f"{path}: 'optimizer' holds states of steps {sorted(steps)}, not of one; drop it to start anew from 'model'"
        )
    return moments, steps.pop()


def validate_for_model(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], num_layers: int
) -> Checkpoint:
    """`checkpoint` with exactly the tensors that `shapes` asks for. Raises CheckpointError naming what differs.

    Gates of layers below the adapted ones, which lineage files hold although nothing used them, are left out and noted.
    """
    unused = {
        n
        for n in checkpoint.weights
        if n not in shapes and (m := GATE.fullmatch(n)) and int(m[1]) < num_layers
    }
    lowest = min((int(m[1]) for n in shapes if (m := GATE.fullmatch(n))), default=0)
    unused = {n for n in unused if int(n.split(".")[1]) < lowest}
    weights = {n: v for n, v in checkpoint.weights.items() if n not in unused}
    missing, unexpected = (
        [n for n in shapes if n not in weights],
        [n for n in weights if n not in shapes],
    )
    misshapen = [
        f"{n} {list(weights[n].shape)} instead of {list(s)}"
        for n, s in shapes.items()
        if n in weights and tuple(weights[n].shape) != s
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("misshapen", misshapen),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{checkpoint.path}: does not fit --model, --adapter_layer, --adapter_len and --max_feats (tensors: {'; '.join(faults)}); "
            "give those of the run that wrote it"
        )
    for name, value in weights.items():
        require_numbers(value, name, checkpoint.path)
    moments, progress = checkpoint.moments, checkpoint.progress
    if checkpoint.lineage_optimizer is not None:
        moments, updates = _lineage_moments(
            checkpoint.lineage_optimizer, checkpoint.weights, checkpoint.path
        )
        progress = replace(progress, num_updates=updates)
    if moments is not None:
        moments = {
            f"{n}.{moment}": _moment(moments, n, moment, shape, checkpoint.path)
            for n, shape in shapes.items()
            for moment in MOMENTS
        }
    notes = (
        (
            f"{checkpoint.path}: ignored {len(unused)} gates of layers below the adapted ones, which nothing uses",
        )
        if unused
        else ()
    )
    return replace(
        checkpoint,
        weights={n: weights[n].float() for n in shapes},
        moments=moments,
        progress=progress,
        notes=notes,
    )


def require_numbers(value: object, name: str, path: Path) -> None:
    if not is_float_tensor(value):
        raise CheckpointError(
            f"{path}: '{name}' is no dense tensor of floating-point numbers; use another checkpoint"
        )
    assert isinstance(value, Tensor)
    if not torch.isfinite(value.float()).all():
        raise CheckpointError(
            f"{path}: '{name}' holds NaN or infinite values; use another checkpoint"
        )


def _moment(
    moments: Mapping[str, Tensor], name: str, moment: str, shape: tuple[int, ...], path: Path
) -> Tensor:
    key = f"{name}.{moment}"
    if key not in moments:
        raise CheckpointError(
            f"{path}: the optimizer's state lacks '{key}'; use another checkpoint"
        )
    require_numbers(moments[key], key, path)
    if tuple(moments[key].shape) != shape:
        raise CheckpointError(
            f"{path}: '{key}' of the optimizer's state has shape {list(moments[key].shape)}, unlike its tensor; use another checkpoint"
        )
    if moment == "exp_avg_sq" and (moments[key] < 0).any():
        raise CheckpointError(
            f"{path}: '{key}' of the optimizer's state, a mean of squares, is negative; use another checkpoint"
        )
    return moments[key].float()
