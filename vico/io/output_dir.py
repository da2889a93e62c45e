"""The folder of a run: the names of its files, its only writer, and its repair after a kill.

The kernel holds the lock and releases it when the process ends, however it ends.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vico.errors import DiskError, InUseError, UserError, fail, show
from vico.io.atomic import make_folder, repair_folder
from vico.io.paths import entries, exists, is_folder, open_to_write
from vico.io.text import read_json_object

LOCK = ".vico-lock"
_STEP_CHECKPOINT = re.compile(r"checkpoint-([0-9]{1,18})")  # more digits are no step
NO_LOCK = -1  # in place of a descriptor, on a file system without locks
_locks: dict[Path, int] = {}  # open descriptors: a lock lives as long as its descriptor
_repaired: set[Path] = set()  # folders that this process has claimed


class OutputDir:
    """Names, lock and repair of the --output_dir folder. Creating an object touches no file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.args = path / "args.json"  # every setting, resolved, and which run this is
        self.steps = path / "steps.jsonl"
        self.epochs = path / "log.txt"
        self.tensorboard = path / "runs"
        self.cognition = path / "cognition.json"  # what `vico cognition` has measured last
        self.lost_output = path / "output.txt"  # what stdout and stderr did not take
        self.attempts = path / "attempts.json"  # starts without progress
        self.latest = path / "latest.json"  # the step that was saved last
        self.best_checkpoint = path / "checkpoint_best"
        self.best_published = path / "checkpoint_best.pth"

    def __str__(self) -> str:
        return str(self.path)

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def predictions(self, split: str, datasets: Sequence[str] = ()) -> Path:
        """`datasets`: of an evaluation on others than those of the run, which has its own file."""
        of_others = f"{'+'.join(datasets)}_" if datasets else ""
        return self.path / f"predictions_{of_others}{split}.jsonl"

    def captions(self, split: str) -> Path:
        """Of each video of a split, by `vico caption`."""
        return self.path / f"captions_{split}.jsonl"

    def step_checkpoints(self) -> list[Path]:
        """The checkpoint-<step> folders, newest first."""
        found = entries(self.path, "checkpoint-*")
        found = [path for path in found if step_of(path) is not None and is_folder(path)]
        return sorted(found, key=lambda folder: step_of(folder) or 0, reverse=True)

    def latest_step(self) -> int | None:
        """The step that was saved last. Only a hint: the folders that exist decide."""
        if not exists(self.latest):
            return None
        try:
            step = read_json_object(self.latest, self.latest.name).get("step")
        except UserError:
            return None
        return step if isinstance(step, int) and not isinstance(step, bool) else None

    def has_run(self) -> bool:
        return exists(self.args)

    def read_args(self) -> dict[str, Any]:
        """The settings that the run here was started with. Raises UserError for a damaged file.

        `run` and `resume` are texts or None, whatever else the file holds.
        """
        try:
            saved = read_json_object(self.args, self.args.name)
            for name in ("run", "resume"):
                if not isinstance(saved.get(name, ""), str | None):
                    fail(f"{self.args}: '{name}' is {show(saved[name])}, not a text; correct it")
        except UserError as error:
            raise UserError(
                f"{error}, or choose another --output_dir: "
                "it is unknown which run this folder holds"
            ) from None
        return saved

    def lock(self) -> list[str]:
        """Become the folder's only writer, which creates the folder.

        Returns notes for the user; a second call changes nothing. Raises InUseError naming the run
        that uses the folder, DiskError where it cannot be written.
        """
        if self.path / LOCK in _locks:
            return []
        make_folder(self.path)
        return _lock(self.path)

    def claim(self) -> list[str]:
        """Lock the folder, and repair what a killed run left half-written.

        Returns and raises as `lock` does.
        """
        notes = self.lock()
        if self.path in _repaired:
            return notes
        if repaired := repair_folder(self.path):
            notes.append(f"{self.path}: a run was killed while it wrote; {', '.join(repaired)}")
        _repaired.add(self.path)
        return notes


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint-<step> folder; None for any other name."""
    match = _STEP_CHECKPOINT.fullmatch(folder.name)
    return int(match[1]) if match else None


def _lock(folder: Path) -> list[str]:
    """Lock the folder for this process; a note where its file system has no locks.

    POSIX locks: child processes do not inherit them, and network file systems pass them on.
    """
    path = folder / LOCK
    try:
        descriptor = open_to_write(path, os.O_RDWR)
    except OSError as problem:
        if problem.errno in (errno.ELOOP, errno.EINVAL, errno.EISDIR):
            raise UserError(
                f"{path}: is {problem.strerror}; remove it, or choose another --output_dir"
            ) from None
        raise DiskError(
            f"{path}: cannot be written ({problem.strerror}); "
            "correct the permissions, or choose another --output_dir"
        ) from None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        owner = os.read(descriptor, 200).decode(errors="replace").strip() or "another run"
        os.close(descriptor)
        raise InUseError(
            f"{folder}: in use by {owner}; wait for it, or choose another --output_dir"
        ) from None
    except OSError as problem:
        os.close(descriptor)
        _locks[path] = NO_LOCK
        return [
            f"{folder}: cannot be locked ({problem.strerror}); make sure that no second run uses it"
        ]
    _locks[path] = descriptor
    with contextlib.suppress(OSError):  # on a full disk, the lock works without a name
        # Nor is the name written to a file of two names: the other one may be any file of the user.
        if os.fstat(descriptor).st_nlink == 1:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, _owner().encode())
    return []


def _owner() -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return f"process {os.getpid()} on {socket.gethostname()} since {since}{job}\n"
