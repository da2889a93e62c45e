"""Whether the input files of a run are still those that it opened.

Features and weights are mapped, so a file that is written over changes under a running process, and
a digest that is remembered for a replaced file would be that of another.
"""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

from vico.errors import TrainingError

Stamp = tuple[int, int, int, int]  # size, times of change of content and of entry, inode


def stamp_of(path: Path) -> Stamp:
    """Four numbers that change when the file is written or replaced. Raises OSError.

    No program can set the time of the entry (ctime), as `cp -p` and `touch` set the other.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def is_other_file(before: Stamp, now: Stamp) -> bool:
    """Whether it was written or replaced, and not only its entry changed (a chmod, a hard link).

    A program that puts the time of the content back after it has written is not noticed.
    """
    return (before[0], before[1], before[3]) != (now[0], now[1], now[3])


class InputFiles:
    """The files as they are now, before they are opened. Files that do not exist are left out."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._stamps: dict[Path, Stamp] = {}
        self._is_same: dict[Path, Callable[[Path], bool]] = {}
        for path in paths:
            with contextlib.suppress(OSError):  # who opens the file says what is wrong
                self._stamps[path] = stamp_of(path)

    def stamp(self, path: Path) -> Stamp | None:
        return self._stamps.get(path)

    def watch_only(self, paths: Iterable[Path]) -> None:
        """Forget the other files: they have been read, and what happens to them is no matter."""
        kept = set(paths)
        self._stamps = {path: stamp for path, stamp in self._stamps.items() if path in kept}

    def compare_by(self, paths: Iterable[Path], is_same: Callable[[Path], bool]) -> None:
        """How `check_unchanged` finds out whether the content is still that of the stamps.

        `is_same` gets the first of these paths whose entry has changed, and compares all of them.
        """
        self._is_same |= dict.fromkeys(paths, is_same)

    def check_unchanged(self) -> None:
        """Raise TrainingError if a file was written or replaced since. Costs one stat per file.

        Where only entries have changed, the content is compared, if that is known by now.
        """
        changed: dict[Path, Stamp] = {}
        for path, stamp in self._stamps.items():
            try:
                now = stamp_of(path)
            except OSError as problem:
                raise TrainingError(f"{path}: is gone ({problem.strerror}); {_REMEDY}") from None
            if now == stamp:
                continue
            if is_other_file(stamp, now) or path not in self._is_same:
                raise TrainingError(f"{path}: changed {_difference(stamp, now)}; {_REMEDY}")
            changed[path] = now
        first = {self._is_same[path]: path for path in reversed(changed)}
        for is_same, path in first.items():
            if not is_same(path):
                difference = _difference(self._stamps[path], changed[path])
                raise TrainingError(f"{path}: changed {difference}; {_REMEDY}")
        self._stamps |= changed


_REMEDY = (
    "nothing is saved of what came after; put the file back and start again, "
    "and leave the file alone while a run reads it"
)


def _difference(before: Stamp, now: Stamp) -> str:
    if before[0] != now[0]:
        return f"during the run, from {before[0]:,} to {now[0]:,} bytes"
    if before[3] != now[3]:
        return "during the run: another file of the same size lies there"
    return "during the run: it was written, or its entry was changed, at the same size"
