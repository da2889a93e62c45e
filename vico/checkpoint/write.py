"""Writing checkpoints: beside their place, flushed, renamed, read back; only then older ones go."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
from torch import Tensor

from vico.checkpoint.format import (
    FORMAT,
    LATEST,
    OPTIMIZER,
    STATE,
    WEIGHTS,
    TrainState,
    step_folders,
    step_of,
    with_checksum,
)
from vico.checkpoint.read import read
from vico.errors import CheckpointError, DiskError
from vico.io.atomic import remove_folder, write_folder, write_json
from vico.io.failpoints import reached
from vico.train.config import RunConfig


def save(
    target: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    progress: TrainState,
    config: RunConfig,
    fingerprints: Mapping[str, str] | None = None,
    run: str = "",
) -> None:
    """Written aside, flushed, renamed, and read back: what is there under its name is whole. Raises DiskError.

    state.json is written last, and binds the other files to one step of one `run` by their sha256.
    """

    def fill(folder: Path) -> None:
        files = {}
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
            (folder / name).write_bytes(data)
            files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            reached("save:file")
        state = {
            "format": FORMAT,
            "run": run,
            "progress": asdict(progress),
            "settings": config.to_json(),
        }
        state |= {"fingerprints": dict(fingerprints or {}), "files": files}
        (folder / STATE).write_text(with_checksum(state), encoding="utf-8")

    def check(folder: Path) -> None:
        try:
            read(folder)
        except CheckpointError as fault:
            raise DiskError(
                f"{fault}; it was written a moment ago, so the disk does not keep what it is given"
            ) from None

    write_folder(target, fill, check)
    reached("save:verified")


def save_step(
    output_dir: Path,
    keep: int | None,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    progress: TrainState,
    config: RunConfig,
    fingerprints: Mapping[str, str],
    run: str,
) -> None:
    """The checkpoint of a step under its name, noted as the latest one; only then the older ones go, but for the newest `keep`."""
    save(
        output_dir / f"checkpoint-{progress.step}",
        weights,
        moments,
        progress,
        config,
        fingerprints,
        run,
    )
    write_json(output_dir / LATEST, {"step": progress.step})
    reached("save:noted")
    if keep is not None:
        prune(output_dir, keep, progress.step)
    reached("save:pruned")


def prune(output_dir: Path, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoint-<step> folders up to the one of `step`, which was just saved; checkpoint_best stays.

    What bears a higher step is none that this run goes on from: the start passed it over, or it was put there since.
    """
    for folder in [f for f in step_folders(output_dir) if step_of(f) <= step][keep:]:
        remove_folder(folder)
