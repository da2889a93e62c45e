"""Caches slow results about files between starts, in one small file in the user's cache folder.

The cache only saves time. A file that is damaged, written by other code or not writable is
ignored, and the results are computed again.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from vico.errors import UserError
from vico.io.atomic import write_text
from vico.io.digest import digest_files, digest_json
from vico.io.input_files import stamp_of
from vico.io.paths import read_bytes

MAX_ENTRIES = 200
# A younger file may be written again without a change of its times, which have a finite resolution.
SETTLED_SECONDS = 2.0


def file_stamp(path: Path) -> str | None:
    """A text that changes when the file does; None: the file is too young, or gone."""
    try:
        size, mtime_ns, ctime_ns, inode = stamp_of(path)
    except OSError:  # who reads it says what is wrong
        return None
    if time.time() - ctime_ns / 1e9 < SETTLED_SECONDS:
        return None
    return f"{path.resolve()} {size} {mtime_ns} {ctime_ns} {inode}"


class FileCache:
    """Results by key. `put` results reach the disk by `flush`, once all ranks found no error.

    `reread`: nothing that is remembered is used, and all results are made anew.
    """

    def __init__(self, reread: bool = False) -> None:
        self._entries = {} if reread else _read()
        self._new: dict[str, Any] = {}

    def get(self, key: str | None) -> Any:
        """The stored result; None when there is none, or `key` is None."""
        return None if key is None else self._entries.get(key)

    def put(self, key: str | None, value: Any) -> None:
        """Remember a result that JSON can hold; ignored when `key` is None."""
        if key is not None:
            self._new[key] = value

    def save(self, key: str | None, value: Any) -> None:
        """Write one result at once: a part of slow work that is right whatever follows."""
        if key is not None:
            _write({key: value})

    def flush(self) -> None:
        """Add the new results to the file."""
        if self._new:
            _write(self._new)
        self._new = {}


def cache_key(name: str, *parts: object) -> str | None:
    """The key of the result `name`, which follows from `parts` and the code that reads data.

    None when a part is None: the result is not cached.
    """
    if None in parts:
        return None
    return digest_json([_code_digest(), name, *map(str, parts)])


def _code_digest() -> str:
    """Of the modules that read data: a change there invalidates the cache."""
    folder = Path(__file__).resolve().parents[1] / "data"
    return digest_files(sorted(folder.rglob("*.py")))


def _path() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "vico" / "checked.json"


def _read() -> dict[str, Any]:
    damages = (OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError)
    with contextlib.suppress(*damages):
        content = json.loads(read_bytes(_path()))
        if content["sha256"] == _checksum(content["entries"]):
            return dict(content["entries"])
    return {}


def _write(new: dict[str, Any]) -> None:
    """Add results to the file, which keeps the latest MAX_ENTRIES."""
    # Read again: another run may have written since.
    kept = {key: value for key, value in _read().items() if key not in new}
    entries = dict(list((kept | new).items())[-MAX_ENTRIES:])
    with contextlib.suppress(OSError, RuntimeError, UserError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"entries": entries, "sha256": _checksum(entries)}))


def _checksum(entries: dict[str, Any]) -> str:
    return digest_json(entries, sort_keys=False)
