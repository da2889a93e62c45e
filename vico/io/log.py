"""The one way to speak: notes go to stdout, warnings and errors to stderr, each as one line.

Python's `logging` carries the lines under the name "vico", so that a program that imports ViCo
can redirect or silence them.
"""

import logging
import os
import sys
from collections.abc import Mapping

LOGGER = logging.getLogger("vico")


class _LineHandler(logging.Handler):
    """Prints to the stream that stands there now: tests and notebooks replace sys.stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        print(self.format(record), file=stream, flush=True)


class _LineFormatter(logging.Formatter):
    """Notes are plain; "vico: " marks what goes to stderr; ranks other than 0 say who they are."""

    def format(self, record: logging.LogRecord) -> str:
        rank = os.environ.get("RANK", "0")
        speaker = "" if rank == "0" else f"[rank {rank}] "
        if record.levelno >= logging.ERROR:
            return f"vico: error: {record.getMessage()}"
        prefix = "vico: " if record.levelno >= logging.WARNING else ""
        return f"{prefix}{speaker}{record.getMessage()}"


def _set_up() -> None:
    handler = _LineHandler()
    handler.setFormatter(_LineFormatter())
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    LOGGER.propagate = False  # libraries that call basicConfig would print every line twice


_set_up()


def info(message: str) -> None:
    """A note for the user, on stdout."""
    LOGGER.info("%s", message)


def warning(message: str) -> None:
    """Something that needs attention and ends nothing, on stderr: `vico: MESSAGE`."""
    LOGGER.warning("%s", message)


def error(message: str) -> None:
    """What ends the run, on stderr: `vico: error: MESSAGE`."""
    LOGGER.error("%s", message)


def fields(values: Mapping[str, object]) -> None:
    """One `key: value` line per entry, for a reader who scans."""
    for key, value in values.items():
        info(f"{key}: {value}")
