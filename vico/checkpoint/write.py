"""Writing checkpoints: to a temporary folder, flushed, renamed, read back.

Only then are older ones removed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from vico.checkpoint.format import FORMAT, OPTIMIZER, STATE, WEIGHTS, TrainState, with_checksum
from vico.checkpoint.read import read
from vico.errors import CheckpointError, DiskError
from vico.io.atomic import remove_folder, write_folder, write_json, write_new
from vico.io.digest import digest_bytes
from vico.io.failpoints import reached
from vico.io.output_dir import OutputDir, step_of


@dataclass(frozen=True)
class RunIdentity:
    """What every checkpoint records about its run."""

    id: str  # empty: not recorded
    settings: Mapping[str, Any]
    fingerprints: Mapping[str, str]


def save(
    target: Path,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: TrainState,
    run: RunIdentity,
) -> None:
    """Write a checkpoint folder. At any time, `target` is complete or absent. Raises DiskError.

    Where a new folder cannot be read back, it stays for inspection, and the error says so; one
    that it was to replace comes back.
    state.json is written last. Its sha256 sums tie the other files to one step of one run.
    """

    def fill(folder: Path) -> None:
        files = {}
        for name, tensors in ((WEIGHTS, weights), (OPTIMIZER, moments)):
            data = safetensors.torch.save({k: v.contiguous() for k, v in tensors.items()})
            write_new(folder / name, data)
            files[name] = {"bytes": len(data), "sha256": digest_bytes(data)}
            reached("save:file")
        record = {
            "format": FORMAT,
            "run": run.id,
            "progress": asdict(state),
            "settings": dict(run.settings),
            "fingerprints": dict(run.fingerprints),
            "files": files,
        }
        write_new(folder / STATE, with_checksum(record).encode())

    write_folder(target, fill, check_written)
    reached("save:verified")


def check_written(folder: Path) -> None:
    """Read a new folder back. Raises DiskError if it is not what was written."""
    try:
        read(folder)
    except CheckpointError as fault:
        raise DiskError(
            f"{fault}; it was written a moment ago, so the disk does not store data correctly"
        ) from None


def save_step(
    output_dir: OutputDir,
    weights: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    state: TrainState,
    run: RunIdentity,
    keep: int | None,
) -> None:
    """Write checkpoint-<step>, record it as the latest, and remove all but the newest `keep`.

    `keep` None: nothing is removed. Raises DiskError.
    """
    save(output_dir.checkpoint(state.step), weights, moments, state, run)
    write_json(output_dir.latest, {"step": state.step})
    reached("save:noted")
    if keep is not None:
        prune(output_dir, keep, state.step)
    reached("save:pruned")


def prune(output_dir: OutputDir, keep: int, step: int) -> None:
    """Remove all but the newest `keep` checkpoint-<step> folders up to the one of `step`.

    checkpoint_best stays. A folder with a higher step stays: this run did not write it, or skipped
    it as damaged when it started.
    """
    assert keep >= 1, "the checkpoint that was just written stays"
    ours = [f for f in output_dir.step_checkpoints() if (step_of(f) or 0) <= step]
    for folder in ours[keep:]:
        remove_folder(folder)
