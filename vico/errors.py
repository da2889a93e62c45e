"""The errors that end a run, their exit codes, and helpers for one-line error messages.

A `UserError` is caused by the user's input (a flag, a file, a row). Its message is one line that
says where the problem is, what it is and what to do. The command prints that line without a
traceback and ends with the error's exit code. Bugs in ViCo itself stay ordinary exceptions.

Once the ranks are connected, a UserError should be every rank's: raise it inside
`World.raise_together`. Then only rank 0 prints it. One that a rank has alone ends the run too.
"""

import difflib
import reprlib
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

DONE, INTERNAL_ERROR, RESUMABLE, INTERRUPTED = 0, 1, 75, 130
EXIT_CODES = {
    DONE: "done",
    INTERNAL_ERROR: "internal error (bug), with its traceback; or a self-test scenario that failed",
    2: "bad input or settings: nothing was trained",
    3: "a checkpoint or weights that cannot be used",
    4: "training failed: non-finite numbers, out of memory, a killed data worker, "
    "or the same step failed repeatedly",
    5: "a peer rank exited, hung or failed to join",
    6: "the disk is full, or another run uses the output_dir or the port",
    RESUMABLE: "stopped by SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU, and saved: "
    "rerun the same command to resume",
    INTERRUPTED: "stopped by Ctrl-C; training has saved: rerun the same command to resume",
}

MAX_SHOWN_CHARACTERS = 60
# Of a line. Each of its ends is kept: the place of the problem, and what to do.
MAX_LINE_CHARACTERS = 4000
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxlevel, _SHORT_REPR.maxstring, _SHORT_REPR.maxother = 2, 100, 100


class UserError(ValueError):
    """Bad input or settings; nothing was trained. Exit code 2.

    `table`: rows of cells that are printed below the message.
    """

    exit_code = 2
    of_all_ranks = False  # then rank 0 prints it, and the others need not

    def __init__(self, message: str, table: Sequence[Sequence[str]] = ()) -> None:
        super().__init__(message)
        self.table = tuple(tuple(row) for row in table)

    @property
    def rows(self) -> list[str]:
        """The table as text, one line per row, in aligned columns."""
        widths = [max(map(len, column)) for column in zip(*self.table, strict=True)]
        lines = []
        for row in self.table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  ".join(cells).rstrip())
        return lines

    @property
    def details(self) -> str:
        """What is printed: the message and the rows, a line each."""
        return "\n  ".join(one_line(line) for line in (str(self), *self.rows))


class UnreachableError(UserError):
    """This rank has no way to rank 0, which cannot learn of the error. Exit code 2."""


class NoAnswerError(UnreachableError):
    """Rank 0 did not join. Exit code 5."""

    exit_code = 5


class StartFailedError(UserError):
    """Another rank failed before the ranks had met. It has that rank's exit code."""

    of_all_ranks = True

    def __init__(self, message: str, host: str, exit_code: int) -> None:
        super().__init__(message)
        self.host, self.exit_code = host, exit_code


class CheckpointError(UserError):
    """A checkpoint or weights that cannot be used, in any supported format. Exit code 3."""

    exit_code = 3


class TrainingError(UserError):
    """Training failed: non-finite numbers, out of memory, a killed data worker. Exit code 4."""

    exit_code = 4


class PeerLostError(UserError):
    """A peer rank exited, hung or failed to join. Exit code 5."""

    exit_code = 5


class InUseError(UserError):
    """Another run holds the output_dir or the port. Exit code 6."""

    exit_code = 6


class DiskError(UserError):
    """The disk is full, or a write failed during the run. Exit code 6."""

    exit_code = 6


def fail(message: str, error: type[UserError] = UserError) -> NoReturn:
    """Raises `error` with `message` on one line."""
    raise error(one_line(message))


def missing_package(error: ModuleNotFoundError) -> UserError:
    """The message for a Python without one of ViCo's dependencies."""
    remedy = "run 'bash launch/environment.sh', or use a Python that has it"
    return UserError(f"{sys.executable} has no module '{error.name}'; {remedy}")


def show(value: object) -> str:
    """`repr` of a value read from a file, cut to at most 60 characters.

    The value may be huge or deeply nested (a YAML bomb): only its beginning is visited.
    """
    text = _SHORT_REPR.repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def one_line(message: str) -> str:
    """`message` with control characters escaped: text from files must not break or forge lines.

    A longer one than MAX_LINE_CHARACTERS loses its middle: an id may be as long as its file.
    """
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
    line = "".join(escaped)
    num_left_out = len(line) - MAX_LINE_CHARACTERS
    if num_left_out <= 0:
        return line
    begin, end = line[: MAX_LINE_CHARACTERS // 2], line[-MAX_LINE_CHARACTERS // 2 :]
    return f"{begin} ... ({num_left_out:,} characters left out) ... {end}"


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`; empty when none is close.

    The dashes of flags, which all have, make none closer.
    """
    words = {name.lstrip("-"): name for name in known}
    close = difflib.get_close_matches(word.lstrip("-"), list(words), n=1)
    return f"; did you mean '{words[close[0]]}'?" if close else ""
