"""ViCo's log: notes go to stdout, warnings and errors to stderr, each as one line.

The lines pass through Python's `logging` under the name "vico", so that a program that imports ViCo
can redirect or silence them.
"""

import logging
import os
import sys
import time
from collections.abc import Callable, Mapping

LOGGER = logging.getLogger("vico")
PROGRESS_SECONDS = 10.0  # between two lines of a ProgressLog


class _LineHandler(logging.Handler):
    """Prints to the current sys.stdout and sys.stderr: tests and notebooks replace them."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _LineFormatter(logging.Formatter):
    """Notes are plain. Lines on stderr begin with "vico: ", and ranks above 0 name themselves."""

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        if record.levelno >= logging.ERROR:
            return f"vico: error: {message}"
        if record.levelno < logging.WARNING:
            return message
        rank = os.environ.get("RANK", "0")
        return f"vico: {message}" if rank == "0" else f"vico: [rank {rank}] {message}"


def _set_up() -> None:
    handler = _LineHandler()
    handler.setFormatter(_LineFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    # Otherwise every line is printed twice when a library calls logging.basicConfig.
    LOGGER.propagate = False


_set_up()


def info(message: str) -> None:
    """A note for the user, on stdout."""
    LOGGER.info("%s", message)


def warning(message: str) -> None:
    """A problem that does not end the run, on stderr: `vico: MESSAGE`."""
    LOGGER.warning("%s", message)


def error(message: str) -> None:
    """An error that ends the run, on stderr: `vico: error: MESSAGE`."""
    LOGGER.error("%s", message)


def fields(values: Mapping[str, object]) -> None:
    """`key: value` for each entry, on stdout. A value may have more lines, indented."""
    for key, value in values.items():
        info(f"{key}: {value}")


def duration(seconds: float) -> str:
    """As people write it: 40 s, 2 min 5 s, 3 h 20 min."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


class ProgressLog:
    """What long work has done so far: for the watchdog at every call, now and then for the user."""

    def __init__(self, set_phase: Callable[[str], None], is_main: bool) -> None:
        self._set_phase, self._is_main = set_phase, is_main
        self._last_line = time.monotonic()

    def __call__(self, done: str) -> bool:
        """Report `done`. True if it was also printed: on the main rank, every PROGRESS_SECONDS."""
        self._set_phase(done)
        if not self._is_main or time.monotonic() - self._last_line < PROGRESS_SECONDS:
            return False
        info(done)
        self._last_line = time.monotonic()
        return True
