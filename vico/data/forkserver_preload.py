"""Imported by the server from which data workers are forked, and nowhere else: what it changes here holds in the server and in them."""

import pickle
import sys
from types import TracebackType


def _unless_the_rank_has_gone(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None
) -> None:
    """A rank that is killed while it starts a worker has told it nothing, or half: the worker ends, and nobody need read of it."""
    if not issubclass(kind, EOFError | pickle.UnpicklingError | ConnectionError):
        sys.__excepthook__(kind, value, trace)


sys.excepthook = _unless_the_rank_has_gone
