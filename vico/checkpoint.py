"""Checkpoints: the trainables, Adam's moments and where the run stood; ours (a folder), and the lineage's (a .pth file).

Ours hold whole tensors under the lineage's names, so they fit any number of ranks and any ZeRO stage.
"""

import argparse
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vico.config import RunConfig, settings_from
from vico.errors import CheckpointError
from vico.files import write_folder
from vico.optim import MOMENTS
from vico.safeload import load_tensors

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1
STEP_FOLDER = re.compile(r"checkpoint-(\d+)")
GATE = re.compile(r"layers\.(\d+)\.attention\.gate[12]")


@dataclass
class Progress:
    """Where a run stands; all that resuming needs besides tensors and settings."""

    step: int = 0  # optimizer steps done
    questions_per_step: int = 0
    num_updates: int = 0  # updates Adam has seen; differs from `step` after a lineage checkpoint on another batch size
    best_accuracy: float | None = None
    epoch_loss_sums: list[float] = field(default_factory=list)  # of the epoch under way, per task
    epoch_target_counts: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    weights: dict[str, Tensor]
    moments: dict[str, Tensor] | None  # "name.exp_avg", "name.exp_avg_sq"; None: weights alone, a new run starts from them
    progress: Progress
    settings: dict[str, Any]  # of the run that wrote it, as far as it says
    lineage_epoch: int | None = None  # the last finished epoch of a lineage file with an optimizer
    notes: tuple[str, ...] = ()


def save(target: Path, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor], progress: Progress, config: RunConfig) -> None:
    def fill(folder: Path) -> None:
        save_file({k: v.contiguous() for k, v in weights.items()}, folder / WEIGHTS)
        save_file({k: v.contiguous() for k, v in moments.items()}, folder / OPTIMIZER)
        files = {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in (WEIGHTS, OPTIMIZER)}
        state = {"format": FORMAT, "progress": asdict(progress), "settings": config.to_json(), "files": files}
        (folder / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")

    write_folder(target, fill)


def newest(output_dir: Path) -> Path | None:
    """The checkpoint-<step> folder with the highest step."""
    found = [(int(m[1]), path) for path in output_dir.glob("checkpoint-*") if (m := STEP_FOLDER.fullmatch(path.name))]
    return max(found)[1] if found else None


def read(path: Path) -> Checkpoint:
    """A checkpoint of ours or of the lineage. Raises CheckpointError when it cannot be used; never runs code from it."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such checkpoint; --resume takes a checkpoint folder or a .pth file")
    if path.is_dir():
        return _read_folder(path)
    if path.suffix == ".safetensors":
        return Checkpoint(path, _read_safetensors(path), None, Progress(), {})
    return _read_lineage(path)


def _read_folder(path: Path) -> Checkpoint:
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        progress, files = Progress(**state["progress"]), state["files"]
        settings = settings_from(state["settings"], str(path / STATE))
    except OSError as error:
        inner = newest(path)
        hint = f"; did you mean {inner}?" if inner else "; a checkpoint is a folder with state.json"
        raise CheckpointError(f"{path / STATE}: {error.strerror}{hint}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / STATE}: damaged or of another program ({error}); use another checkpoint") from None
    for name in (WEIGHTS, OPTIMIZER):
        _check_file(path / name, files.get(name, {}))
    return Checkpoint(path, _read_safetensors(path / WEIGHTS), _read_safetensors(path / OPTIMIZER), progress, settings)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged ({error}); use another checkpoint") from None


def _check_file(path: Path, recorded: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
        fault = f"{size} of {recorded.get('bytes')} bytes" if size != recorded.get("bytes") else ""
        if not fault and _digest(path) != recorded.get("sha256"):
            fault = "its sha256 is not the recorded one"
    except OSError as error:
        fault = str(error.strerror)
    if fault:
        raise CheckpointError(f"{path}: damaged ({fault}); use another checkpoint")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_lineage(path: Path) -> Checkpoint:
    allowed = [argparse.Namespace, pathlib.PosixPath, pathlib.WindowsPath]
    content = load_tensors(path, "checkpoint", allowed, legacy=True, error=CheckpointError)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise CheckpointError(f"{path}: has no 'model' dict of tensors; a lineage checkpoint has one")
    weights = content["model"]
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{path}: 'model' entry {name!r} is no floating-point tensor")
    weights = {name: value.detach().float() for name, value in weights.items()}
    settings = _lineage_settings(content.get("args"), path)
    if content.get("optimizer") is None or content.get("epoch") is None:
        return Checkpoint(path, weights, None, Progress(), settings)
    moments, num_updates = _lineage_moments(content["optimizer"], weights, path)
    epoch = content["epoch"]
    if not isinstance(epoch, int) or epoch < 0:
        raise CheckpointError(f"{path}: 'epoch' is {epoch!r}, not a whole number")
    return Checkpoint(path, weights, moments, Progress(num_updates=num_updates), settings, lineage_epoch=epoch)


def _lineage_settings(args: object, path: Path) -> dict[str, Any]:
    """What the file's Namespace says under our names; only plain values of the right type count."""
    settings = {}
    for name, value in (vars(args) if isinstance(args, argparse.Namespace) else {}).items():
        if isinstance(value, str | int | float | bool) and name not in ("resume", "output_dir", "device"):
            try:
                settings.update(settings_from({name: value}, str(path)))
            except ValueError:
                continue  # the lineage's flags are not ours to judge: what we do not know is not taken over
    return settings


def _lineage_moments(optimizer: object, weights: Mapping[str, Tensor], path: Path) -> tuple[dict[str, Tensor], int]:
    """Adam's moments by name. torch numbers parameters in the order of the optimizer's groups, which is that of 'model'."""
    try:
        assert isinstance(optimizer, dict)
        numbers = [n for group in optimizer["param_groups"] for n in group["params"]]
        states = {name: optimizer["state"][n] for n, name in zip(numbers, weights, strict=True) if n in optimizer["state"]}
        moments = {f"{name}.{moment}": state[moment].float() for name, state in states.items() for moment in MOMENTS}
        steps = {int(state["step"]) for state in states.values()}
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        raise CheckpointError(
            f"{path}: 'optimizer' is not AdamW's state for the tensors of 'model'; drop it to start anew from 'model'"
        ) from None
    for key, value in moments.items():
        if value.shape != weights[key.rpartition(".")[0]].shape:
            raise CheckpointError(f"{path}: optimizer state '{key}' has shape {list(value.shape)}, unlike its tensor")
    if len(steps) != 1:
        raise CheckpointError(f"{path}: 'optimizer' holds states of different steps; drop it to start anew from 'model'")
    return moments, steps.pop()


def fitted(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], num_layers: int) -> Checkpoint:
    """`checkpoint` with exactly the tensors that `shapes` asks for. Raises CheckpointError naming what differs.

    Gates of layers below the adapted ones, which lineage files hold although nothing used them, are left out and noted.
    """
    unused = {n for n in checkpoint.weights if n not in shapes and (m := GATE.fullmatch(n)) and int(m[1]) < num_layers}
    lowest = min((int(m[1]) for n in shapes if (m := GATE.fullmatch(n))), default=0)
    unused = {n for n in unused if int(n.split(".")[1]) < lowest}
    weights = {n: v for n, v in checkpoint.weights.items() if n not in unused}
    missing, unexpected = [n for n in shapes if n not in weights], [n for n in weights if n not in shapes]
    misshapen = [
        f"{n} {list(weights[n].shape)} instead of {list(s)}" for n, s in shapes.items() if n in weights and tuple(weights[n].shape) != s
    ]
    faults = [
        f"{len(names)} {what} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if faults:
        raise CheckpointError(
            f"{checkpoint.path}: does not fit --model, --adapter_layer, --adapter_len and --max_feats: tensors {'; '.join(faults)}"
        )
    if bad := next((n for n, v in weights.items() if not torch.isfinite(v).all()), None):
        raise CheckpointError(f"{checkpoint.path}: '{bad}' holds NaN or infinite values; use another checkpoint")
    moments = checkpoint.moments
    if moments is not None:
        keys = [f"{n}.{moment}" for n in shapes for moment in MOMENTS]
        if lost := [key for key in keys if key not in moments]:
            raise CheckpointError(f"{checkpoint.path}: optimizer state lacks {len(lost)} tensor(s), e.g. '{lost[0]}'")
        moments = {key: moments[key] for key in keys}
    notes = (f"{checkpoint.path}: ignored {len(unused)} gates of layers below the adapted ones, which nothing uses",) if unused else ()
    return Checkpoint(
        checkpoint.path, {n: weights[n] for n in shapes}, moments, checkpoint.progress, checkpoint.settings, checkpoint.lineage_epoch, notes
    )
