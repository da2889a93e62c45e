"""Atomic writes: a file or folder is either whole or absent under its name.

Everything is written under a temporary name beside the target, flushed to the disk, then renamed.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from vico.errors import DiskError, UserError
from vico.io.failpoints import reached
from vico.io.paths import is_file, open_to_read, open_to_write

# Names with these endings belong to ViCo alone: `repair_folder` removes or renames them.
TEMPORARY_SUFFIX, REPLACED_SUFFIX = ".vico-tmp", ".vico-old"
REMEDY = "free space or fix the permissions, then start again"


# Checks before writing


def require_writable(folder: Path, name: str = "--output_dir") -> None:
    """Check that files can be created in `folder`, which need not exist yet. Creates nothing.

    `name` is what the message calls the folder. Raises UserError.
    """
    try:
        existing = folder
        while not _exists(existing) and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            raise NotADirectoryError(0, f"'{existing}' is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(0, f"'{existing}' may not be written to")
    except OSError as problem:
        raise UserError(f"{name} {folder}: {problem.strerror}; choose another") from None


def _exists(path: Path) -> bool:
    """True also for a dangling link. Raises OSError for a path that cannot exist."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def make_folder(folder: Path) -> None:
    """Create `folder` and its parents. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot be made ({problem.strerror}); choose another --output_dir"
        ) from None


# Files


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`, flushed to the disk. Raises DiskError."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the name `path` where the block ends without an error.

    For what is too large to be made in memory. It is flushed to the disk. Raises DiskError.
    """
    # The process id keeps an evaluation that writes beside a training run apart from it.
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with _new_file(temporary) as file:
            yield file
        _flush_file(temporary)
        temporary.replace(path)
    except OSError as error:
        # The free space is measured before the half-written file is removed.
        reason = _reason(error, path.parent)
        raise DiskError(f"{path}: cannot be written ({reason}); {REMEDY}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    _flush_folder(path.parent)


def write_new(path: Path, data: bytes) -> None:
    """Write a file under a name that ViCo alone uses. The caller flushes it. Raises OSError."""
    with _new_file(path) as file:
        file.write(data)


def _new_file(path: Path) -> IO[bytes]:
    path.unlink(missing_ok=True)  # a killed run's, or a link: it is not followed
    return open(open_to_write(path, os.O_RDWR | os.O_EXCL), "w+b")


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8, like `write_bytes`."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write one JSON object, like `write_bytes`."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines, one record per line, like `write_bytes`."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


# Folders


def write_folder(
    target: Path, fill: Callable[[Path], None], check: Callable[[Path], None] | None = None
) -> None:
    """`fill` writes files into a new folder, which then replaces `target`. Raises DiskError.

    `check` reads the written folder and may reject it with a UserError. An older `target` is
    removed only after `check` has passed; when it fails, the older one is restored.
    """
    temporary = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    replaced = target.with_name(f".{target.name}{REPLACED_SUFFIX}")
    try:
        _write_temporary(temporary, fill)
        if target.exists():
            _discard(replaced)
            target.rename(replaced)
        reached("save:aside")
        temporary.rename(target)
    except OSError as error:
        reason = _reason(error, target.parent)
        _discard(temporary)
        # A failure here is repaired by the next start.
        with contextlib.suppress(OSError):
            if replaced.exists() and not target.exists():
                replaced.rename(target)
        raise DiskError(f"{target}: cannot be written ({reason}); {REMEDY}") from None
    _flush_folder(target.parent)
    reached("save:renamed")
    try:
        if check is not None:
            check(target)
    except UserError:
        if replaced.exists():
            _discard(target)
            replaced.rename(target)
        raise
    _discard(replaced)


def _write_temporary(temporary: Path, fill: Callable[[Path], None]) -> None:
    """Fill a new folder and flush its files to the disk. Raises OSError."""
    _discard(temporary)
    temporary.mkdir(parents=True)
    reached("save:begun")
    fill(temporary)
    reached("save:written")
    for path in filter(is_file, temporary.iterdir()):
        _flush_file(path)
    _flush_folder(temporary)
    reached("save:flushed")


def remove_folder(target: Path) -> None:
    """Remove `target`. Raises DiskError.

    It is renamed first: a kill in between leaves no partial folder under its name.
    """
    doomed = target.with_name(f".{target.name}{TEMPORARY_SUFFIX}")
    try:
        _discard(doomed)
        target.rename(doomed)
    except OSError as error:
        raise DiskError(f"{target}: cannot be removed ({error.strerror}); {REMEDY}") from None
    reached("save:doomed")
    _discard(doomed)


def _discard(path: Path) -> None:
    """Remove a file, a link, or a folder with its content; what cannot be removed stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def repair_folder(parent: Path) -> list[str]:
    """Clean up after a run that was killed while writing.

    Partial files are removed, a replaced folder is restored. Returns one note per repair, for the
    user. Raises DiskError where the repair is not permitted.
    """
    try:
        return _repair(parent)
    except OSError as problem:
        raise DiskError(
            f"{problem.filename}: cannot be moved or removed ({problem.strerror}); {REMEDY}"
        ) from None


def _repair(parent: Path) -> list[str]:
    notes = []
    for replaced in sorted(parent.glob(f".*{REPLACED_SUFFIX}")):
        target = parent / replaced.name[1 : -len(REPLACED_SUFFIX)]
        if not target.exists():
            replaced.rename(target)
            notes.append(f"{target.name} put back")
        else:
            _discard(replaced)
            notes.append(f"{replaced.name} removed")
    for temporary in sorted(parent.glob(f".*{TEMPORARY_SUFFIX}")):
        _discard(temporary)
        notes.append(f"{temporary.name} removed")
    return notes


def _reason(error: OSError, folder: Path) -> str:
    """The system's message; for a full disk or quota, also the free space."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error.strerror)
    return f"{error.strerror}: {shutil.disk_usage(folder).free:,} bytes free"


def _flush_file(path: Path) -> None:
    with open_to_read(path) as file:
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    # Some network file systems cannot flush a folder; the files themselves have been flushed.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
