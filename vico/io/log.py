"""ViCo's log: notes go to stdout, warnings and errors to stderr, each as one line.

The lines pass through Python's `logging` under the name "vico", so that a program that imports ViCo
can redirect or silence them.
"""

import logging
import os
import sys
from collections.abc import Mapping

LOGGER = logging.getLogger("vico")


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
