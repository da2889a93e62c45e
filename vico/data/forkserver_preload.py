"""Imported only by the server that data workers are forked from: it changes the server and them."""

import pickle
import sys
from types import TracebackType


def _silence_lost_rank(
    kind: type[BaseException], value: BaseException, trace: TracebackType | None
) -> None:
    """Hide the traceback of a worker whose rank was killed while it started the worker.

    The worker received nothing, or half of what it needs, and ends. Nobody has to read about it.
    """
    if not issubclass(kind, EOFError | pickle.UnpicklingError | ConnectionError):
        sys.__excepthook__(kind, value, trace)


sys.excepthook = _silence_lost_rank
