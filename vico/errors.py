"""Every way a run can end badly, its exit code, and the one line the user reads.

A mistake of the user's (a flag, a file, a row) is a `UserError`: it carries one line that says where, what and what to
do, and the command ends with its exit code and without a traceback. Mistakes of ours stay ordinary exceptions.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input or configuration; nothing was trained. Exit code 2."""

    exit_code = 2


class CheckpointError(UserError):
    """A checkpoint (ours, or a lineage `.pth`) that cannot be used. Exit code 3."""

    exit_code = 3


class TrainingFault(UserError):
    """The run cannot go on: a loss, gradient or score that is not finite. Exit code 4."""

    exit_code = 4


def one_line(message: str) -> str:
    """`message` with control characters escaped: text from files must not forge or break log lines."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word closest to `word`, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""
