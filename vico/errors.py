"""Every way a run can end badly, its exit code, and the one line the user reads.

A mistake of the user's (a flag, a file, a row) is a `UserError`: it carries one line that says where, what and what to
do, and the command ends with its exit code and without a traceback. Mistakes of ours stay ordinary exceptions.
"""

import difflib
import reprlib
from collections.abc import Iterable, Sequence
from typing import NoReturn

DONE, INTERNAL_ERROR, RESUMABLE, INTERRUPTED = 0, 1, 75, 130
EXIT_CODES = {
    DONE: "done",
    INTERNAL_ERROR: "a mistake of ViCo's own, with its traceback; a figure of the self-test that did not pass",
    2: "bad input or settings: nothing was trained",
    3: "a checkpoint, or weights, that cannot be used",
    4: "training cannot go on: numbers that are not finite, no more memory, a killed data worker, the same step failing again and again",
    5: "another rank has ended, hangs or did not come",
    6: "a full disk; an output_dir or a port that another run uses",
    RESUMABLE: "stopped by SIGTERM or SIGUSR1, and saved: the same command goes on",
    INTERRUPTED: "stopped by Ctrl-C, and saved: the same command goes on",
}

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 100, 100


class UserError(ValueError):
    """Bad input or configuration; nothing was trained. Exit code 2. `table`: rows that are shown below the line."""

    exit_code = 2

    def __init__(self, message: str, table: Sequence[Sequence[str]] = ()) -> None:
        super().__init__(message)
        self.table = tuple(tuple(row) for row in table)

    @property
    def rows(self) -> list[str]:
        """The table as text, in columns."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        return [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in self.table
        ]


class UnreachableError(UserError):
    """Rank 0 cannot be asked, so that another rank, the first of its host, has to say it. Exit code 2."""


class NoAnswerError(UnreachableError):
    """Rank 0 did not come. Exit code 5."""

    exit_code = 5


class CheckpointError(UserError):
    """A checkpoint (ours, a lineage `.pth`, a shard of LLaMA's) that cannot be used. Exit code 3."""

    exit_code = 3


class TrainingError(UserError):
    """The run cannot go on: numbers that are not finite, no more memory, a killed data worker. Exit code 4."""

    exit_code = 4


class PeerLostError(UserError):
    """Another rank has ended, no longer answers or did not come. Exit code 5."""

    exit_code = 5


class InUseError(UserError):
    """An output_dir or a port that another run holds. Exit code 6."""

    exit_code = 6


class DiskError(UserError):
    """A disk that is full or refuses to be written in the middle of a run. Exit code 6."""

    exit_code = 6


def fail(message: str, error: type[UserError] = UserError) -> NoReturn:
    raise error(one_line(message))


def show(value: object) -> str:
    """A value from a file, quoted, escaped and short enough for a message, also when it is a YAML bomb."""
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def one_line(message: str) -> str:
    """`message` with control characters escaped: text from files must not forge or break log lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
