"""Writing files that are whole or not there: a temporary name beside the target, flushed to the disk, then renamed."""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vico.errors import DiskError, UserError
from vico.io.failpoints import reached

TEMPORARY, REPLACED = (
    ".vico-tmp",
    ".vico-old",
)  # no other program's, for `repair_folder` removes what bears them
REMEDY = "free space or mend the permissions, then start again"


def require_writable(folder: Path, called: str = "--output_dir") -> None:
    """Known before any work: files can be made in `folder`, which need not exist yet. Creates nothing. Raises UserError."""
    try:
        there = next(path for path in (folder, *folder.parents) if _exists(path))
        if not there.is_dir():
            raise NotADirectoryError(0, f"'{there}' is not a folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise PermissionError(0, f"'{there}' may not be written to")
    except OSError as problem:
        raise UserError(f"{called} {folder}: {problem.strerror}; choose another") from None


def read_bytes(path: Path) -> bytes:
    """All of a file; an OSError also where it is none."""
    require_file(path)
    return path.read_bytes()


def require_file(path: Path) -> None:
    """Raises OSError for a device or a pipe: it would be read without end, or waited for."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a device or a pipe, not a file")


def _exists(path: Path) -> bool:
    """Links that lead nowhere included. Raises OSError for a path that can never be."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(
            f"{folder}: cannot be made ({problem.strerror}); choose another --output_dir"
        ) from None


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    temporary = path.with_name(
        f".{path.name}.{os.getpid()}{TEMPORARY}"
    )  # an evaluation may write beside a training
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        why = _why(error, path.parent)
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise DiskError(f"{path}: cannot be written ({why}); {REMEDY}") from None
    _flush_folder(path.parent)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_folder(
    target: Path, fill: Callable[[Path], None], check: Callable[[Path], None] = lambda folder: None
) -> None:
    """`fill` writes files into a new folder, which then takes the place of `target`.

    `check` may refuse what came to lie there, by a UserError: an older `target` goes for good only behind it, or comes back.
    """
    temporary, old = (
        target.with_name(f".{target.name}{suffix}") for suffix in (TEMPORARY, REPLACED)
    )
    try:
        _discard(temporary)
        temporary.mkdir(parents=True)
        reached("save:begun")
        fill(temporary)
        reached("save:written")
        for path in temporary.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        _flush_folder(temporary)
        reached("save:flushed")
        if target.exists():
            _discard(old)
            target.rename(old)
        reached("save:aside")
        temporary.rename(target)
    except OSError as error:
        why = _why(error, target.parent)
        _discard(temporary)
        with contextlib.suppress(OSError):  # else the next start puts it back
            if old.exists() and not target.exists():
                old.rename(target)
        raise DiskError(f"{target}: cannot be written ({why}); {REMEDY}") from None
    _flush_folder(target.parent)
    reached("save:renamed")
    try:
        check(target)
    except UserError:
        if old.exists():
            _discard(target)
            old.rename(target)
        raise
    _discard(old)


def remove_folder(target: Path) -> None:
    """Out of sight at once by its name, so that a kill in between leaves no half of it under that name."""
    doomed = target.with_name(f".{target.name}{TEMPORARY}")
    try:
        _discard(doomed)
        target.rename(doomed)
    except OSError as error:
        raise DiskError(f"{target}: cannot be removed ({error.strerror}); {REMEDY}") from None
    reached("save:doomed")
    _discard(doomed)


def _discard(path: Path) -> None:
    """A file, a link, or a folder with all that is in it; what cannot go stays."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def repair_folder(parent: Path) -> list[str]:
    """Undo what a run that was killed while it wrote left: half-written files and folders go, a replaced folder comes back.

    Returns what was found, for the user to read. Raises DiskError where that is not allowed.
    """
    try:
        return _repair(parent)
    except OSError as problem:
        raise DiskError(
            f"{problem.filename}: cannot be moved or removed ({problem.strerror}); {REMEDY}"
        ) from None


def _repair(parent: Path) -> list[str]:
    found = []
    for old in sorted(parent.glob(f".*{REPLACED}")):
        target = parent / old.name[1 : -len(REPLACED)]
        if not target.exists():
            old.rename(target)
            found.append(f"{target.name} put back")
        else:
            _discard(old)
            found.append(f"{old.name} removed")
    for temporary in sorted(parent.glob(f".*{TEMPORARY}")):
        _discard(temporary)
        found.append(f"{temporary.name} removed")
    return found


def _why(error: OSError, folder: Path) -> str:
    """What the system says; of a full disk also how much room there was, when what was half-written had not gone yet."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return str(error.strerror)
    return f"{error.strerror}: {shutil.disk_usage(folder).free:,} bytes free"


def _flush_folder(folder: Path) -> None:
    with contextlib.suppress(
        OSError
    ):  # some network file systems cannot; what counts, the files, is flushed
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
