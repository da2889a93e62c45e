"""The one way to open a file, and to ask what lies at a path.

A folder of a run or of data may hold a pipe, whose reader waits for ever, or a symbolic link, whose
target must not be overwritten. Only regular files are opened, and nothing is written through a
link. A path that may not be looked at is an error of one line and never "not there".
"""

import errno
import fnmatch
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vico.errors import UserError, fail

# Of what is read whole: text, a checkpoint, a tokenizer. Real ones are below a tenth of this.
MAX_BYTES = 2 << 30
NOT_A_FILE = "a device or a pipe, not a file"
NOWHERE = (errno.ELOOP, errno.ENAMETOOLONG)  # a link to itself; a name that no file can have


# Opening


@contextmanager
def open_to_read(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a regular file. Raises OSError, also for a device or a pipe."""
    descriptor = _open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(path, "rb", opener=lambda *_: descriptor) as file:
        _require_regular(descriptor, path)
        yield file


def open_to_write(path: Path, flags: int) -> int:
    """The descriptor of a regular file, made if it is not there. Raises OSError.

    `flags`: of os.open, such as O_WRONLY and O_APPEND. A symbolic link is not followed.
    """
    safe_flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = _open(path, flags | safe_flags)
    except OSError as problem:
        if problem.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a symbolic link, not a file", str(path)) from None
        if problem.errno == errno.ENXIO:  # a pipe that nobody reads
            raise OSError(errno.EINVAL, NOT_A_FILE, str(path)) from None
        raise
    try:
        _require_regular(descriptor, path)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _open(path: Path, flags: int) -> int:
    """Without O_NONBLOCK, to open a pipe is to wait for its other end."""
    try:
        return os.open(path, flags | os.O_NONBLOCK, 0o666)
    except BlockingIOError:
        # A file server holds a lease on the file (an NFS client has it open): wait for its end.
        if not path.is_file():
            raise
        return os.open(path, flags, 0o666)


def _require_regular(descriptor: int, path: Path) -> None:
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, NOT_A_FILE, str(path))


def read_bytes(path: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The whole file. Raises OSError, also for one of more than `max_bytes`: memory is finite."""
    with open_to_read(path) as file:
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes > max_bytes:
            reason = f"{num_bytes:,} bytes, where at most {max_bytes:,} are expected"
            raise OSError(errno.EFBIG, reason, str(path))
        return file.read()


def append_text(path: Path, text: str) -> None:
    """Add `text` in UTF-8 to the end of a file. Raises OSError."""
    with open(open_to_write(path, os.O_WRONLY | os.O_APPEND), "w", encoding="utf-8") as file:
        file.write(text)


# Looking


def exists(path: Path, error: type[UserError] = UserError) -> bool:
    """Whether something lies at `path`. Raises `error` where that may not be looked at."""
    return _mode(path, error) is not None


def is_folder(path: Path, error: type[UserError] = UserError) -> bool:
    """Whether a folder, or a link to one, lies at `path`. Raises as `exists` does."""
    return stat.S_ISDIR(_mode(path, error) or 0)


def is_file(path: Path, error: type[UserError] = UserError) -> bool:
    """Whether a regular file, or a link to one, lies at `path`. Raises as `exists` does."""
    return stat.S_ISREG(_mode(path, error) or 0)


def _mode(path: Path, error: type[UserError]) -> int | None:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return None
    except OSError as problem:
        if problem.errno in NOWHERE:
            return None
        fail(f"{path}: cannot be looked at ({problem.strerror}); {_REMEDY}", error)


def entries(folder: Path, pattern: str = "*", error: type[UserError] = UserError) -> list[Path]:
    """What a folder holds under names that fit `pattern`, sorted; empty where there is no folder.

    Raises `error` for a folder that may not be read.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as problem:
        if problem.errno in NOWHERE:
            return []
        fail(f"{folder}: cannot be read ({problem.strerror}); {_REMEDY}", error)
    return [folder / name for name in sorted(names) if fnmatch.fnmatchcase(name, pattern)]


_REMEDY = "correct its permissions, or those of the folders above it, or name another"
