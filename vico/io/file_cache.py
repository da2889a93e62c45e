"""What earlier starts found out about files, so that the next start is quick: one small file in the user's cache folder.

Nothing hangs on it. A file that is damaged, of other code, or cannot be written is passed over, and things are found out anew.
"""

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from vico.errors import UserError
from vico.io.atomic import write_text

MAX_ENTRIES = 200
SETTLED_SECONDS = (
    2.0  # a file younger than that may be written again within one tick of the clock of its times
)


def file_stamp(path: Path) -> str | None:
    """What changes when a file does; None: not to be relied on. Raises OSError."""
    status = path.stat()
    if time.time() - status.st_ctime < SETTLED_SECONDS:
        return None
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


class FileCache:
    """What is known by key. New findings are kept by `keep`, when everybody has agreed that nothing is wrong."""

    def __init__(self) -> None:
        self._entries = _read()
        self._new: dict[str, Any] = {}

    def get(self, key: str | None) -> Any:
        return None if key is None else self._entries.get(key)

    def put(self, key: str | None, value: Any) -> None:
        """`value`: what JSON can hold."""
        if key is not None:
            self._new[key] = value

    def flush(self) -> None:
        if not self._new:
            return
        entries = _read() | self._new  # another run may have written meanwhile
        entries = dict(list(entries.items())[-MAX_ENTRIES:])
        with contextlib.suppress(OSError, RuntimeError, UserError):
            path = _path()
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"entries": entries, "sha256": _seal(entries)}))
        self._new = {}


def cache_key(what: str, *parts: object) -> str | None:
    """A key of what the finding follows from, the code included; None when a part is not to be relied on."""
    return (
        None
        if None in parts
        else hashlib.sha256(json.dumps([_code(), what, *map(str, parts)]).encode()).hexdigest()
    )


def _code() -> str:
    """The findings are those of the readers as they are now."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).resolve().parents[1] / "data").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _path() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (folder if folder.is_absolute() else Path.home() / ".cache") / "vico" / "checked.json"


def _read() -> dict[str, Any]:
    with contextlib.suppress(
        OSError, RuntimeError, ValueError, KeyError, TypeError, RecursionError
    ):
        content = json.loads(_path().read_bytes())
        if content["sha256"] == _seal(content["entries"]):
            return dict(content["entries"])
    return {}


def _seal(entries: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
