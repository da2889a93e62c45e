"""Reads checkpoints with typed settings: one by its path, or one of a run by the run's folder.

Training goes on from a run's newest checkpoint; its best one is evaluated, converted and exported.
"""

import contextlib
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vico.checkpoint.format import CONFIG, REMEDY, STATE, Checkpoint
from vico.checkpoint.read import read
from vico.errors import CheckpointError, UserError
from vico.io.output_dir import OutputDir
from vico.io.paths import exists
from vico.train.config import RunConfig
from vico.train.settings import settings_from

# Settings of a published file that mean nothing here, or something else.
IGNORED_SETTINGS = ("resume", "output_dir", "device")


@dataclass(frozen=True)
class Start:
    """The checkpoint to start from (None: a new run), notes for the user, and the run's id."""

    checkpoint: Checkpoint | None = None
    notes: tuple[str, ...] = ()
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex[:12])


def read_checkpoint(path: Path, run_id: str = "") -> Checkpoint:
    """The checkpoint at `path` with typed settings. Raises CheckpointError (checkpoint/read.py)."""
    checkpoint = read(path, run_id)
    if checkpoint.published:
        return replace(checkpoint, settings=_published_settings(checkpoint))
    try:
        record = STATE if checkpoint.moments is not None else CONFIG
        settings = settings_from(checkpoint.settings, str(path / record))
    except UserError as error:
        raise CheckpointError(f"{error}; {REMEDY}") from None
    return replace(checkpoint, settings=settings)


def _published_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The settings of a published file that exist here too and have an allowed value.

    The published code had other flags and no checks; the other settings are left out.
    """
    settings: dict[str, Any] = {}
    for name, value in checkpoint.settings.items():
        if name not in IGNORED_SETTINGS:
            with contextlib.suppress(UserError):
                typed = settings_from({name: value}, str(checkpoint.path))
                RunConfig(**{"dataset": "tvqa", **typed})  # checks the value; --sub needs TVQA
                settings |= typed
    if settings.get("dataset") != "tvqa":
        settings.pop("sub", None)  # it had no effect there
    return settings


def newest_usable(
    folders: Sequence[Path],
    output_dir: OutputDir,
    run_id: str = "",
    remedy: str = "choose another --output_dir to start anew",
) -> Start:
    """The first of `folders` (newest first) that is undamaged and of this run.

    Every file is checked. Raises CheckpointError, with the fault of each, when there is none.
    """
    faults: list[str] = []
    latest = output_dir.latest_step()
    if latest is not None and output_dir.checkpoint(latest) not in folders:
        faults.append(f"{output_dir.checkpoint(latest)}: is gone, though it was saved last")
    for folder in folders:
        try:
            checkpoint = read_checkpoint(folder, run_id)
        except CheckpointError as fault:
            faults.append(str(fault).removesuffix(f"; {REMEDY}"))
            continue
        notes = [f"passed over: {fault}" for fault in faults]
        if faults:
            notes.append(f"using {checkpoint.path}")
        return Start(checkpoint, tuple(notes), run_id)
    raise CheckpointError(
        f"{output_dir}: none of its {len(folders)} checkpoints can be used ({'; '.join(faults)}); "
        f"{remedy}"
    )


def is_run(path: Path) -> bool:
    """Whether `path` is the folder of a run that has saved, not one of its checkpoints."""
    run = OutputDir(path)
    is_checkpoint = exists(path / STATE, CheckpointError)
    return not is_checkpoint and (exists(run.best_checkpoint) or bool(run.step_checkpoints()))


def newest_of(folder: Path) -> Start:
    """The newest usable checkpoint of another run. Raises CheckpointError."""
    run = OutputDir(folder)
    found = newest_usable(
        run.step_checkpoints() or [run.best_checkpoint], run, remedy="name another by --resume"
    )
    assert found.checkpoint is not None
    note = f"--resume {folder}: its newest checkpoint, {found.checkpoint.path}"
    return replace(found, notes=(*found.notes, note))


def read_for_evaluation(path: Path) -> Checkpoint:
    """The checkpoint at `path`; of a run's folder its best, or the newest where it has none.

    A note says which. Raises CheckpointError.
    """
    if not is_run(path):
        return read_checkpoint(path)
    best = OutputDir(path).best_checkpoint
    if exists(best):
        return replace(
            read_checkpoint(best), notes=(f"--resume {path}: its best checkpoint, {best}",)
        )
    found = newest_of(path)
    assert found.checkpoint is not None
    return replace(found.checkpoint, notes=found.notes)
