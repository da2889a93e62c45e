"""stdout and stderr that cannot end a run: a run does not depend on who reads what it prints.

A pipe whose reader is gone (`| head`, a closed ssh), a full disk and a terminal that went away make
every write fail, those of libraries included. `guard` replaces both streams. What they do not take
goes to a file of the run's folder.
"""

import errno
import io
import os
import select
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from vico.io.paths import open_to_write

NAMES = {1: "stdout", 2: "stderr"}
PIECE_BYTES = select.PIPE_BUF  # a pipe that is ready takes this much without a wait
# A run whose output is not read for this long (a pager, a terminal that Ctrl-S stopped) goes on.
MAX_WAIT_SECONDS = 10.0
MAX_KEPT_BYTES = 1 << 16  # of what is lost before the run has a folder


class _LostOutput:
    """What the streams of this process did not take."""

    def __init__(self) -> None:
        self.path: Path | None = None  # None: no folder yet, or not a run
        self.reason: OSError | None = None  # of the first loss
        self._kept = b""

    def add(self, lost: bytes) -> None:
        self._kept = (self._kept + lost)[-MAX_KEPT_BYTES:]
        self.write()

    def write(self) -> None:
        """Append to the file what is kept. A failure keeps it: there is nobody to tell."""
        if self.path is None or not self._kept:
            return
        with suppress(OSError):
            descriptor = self.open(self.path)
            try:
                os.write(descriptor, self._kept)
                self._kept = b""
            finally:
                os.close(descriptor)

    def open(self, path: Path) -> int:
        """For appending. Raises OSError, also for a link, a FIFO or a device."""
        return open_to_write(path, os.O_WRONLY | os.O_APPEND)


_lost = _LostOutput()


class _Output(io.FileIO):
    """A descriptor to which every write succeeds."""

    is_lost = False  # whether the last piece was

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            piece = rest[:PIECE_BYTES]
            try:
                done = self._write_piece(piece)
            except OSError as problem:
                self._lose(bytes(piece), problem)
                done = len(piece)
            rest = rest[done:]
        return size

    def _write_piece(self, piece: memoryview) -> int:
        """Returns how many bytes were written. Raises OSError."""
        wait_seconds = 0.0 if self.is_lost else MAX_WAIT_SECONDS
        until = None if _lost.path is None else time.monotonic() + wait_seconds
        ready = select.poll()
        ready.register(self.fileno(), select.POLLOUT)
        while True:
            left = None if until is None else max(0.0, 1000 * (until - time.monotonic()))
            if not ready.poll(left):
                raise OSError(errno.EAGAIN, "nobody reads it")
            done = super().write(piece)
            if done is not None:  # None: another process made the descriptor non-blocking
                break
            time.sleep(0.01)
        if self.is_lost:
            self.is_lost = False
            super().write(f"vico: lines are missing here; see {_lost.path}\n".encode())
        return done

    def _lose(self, piece: bytes, problem: OSError) -> None:
        if not self.is_lost:
            self.is_lost = True
            _lost.reason = _lost.reason or problem
            who = f"rank {os.environ.get('RANK', '0')}, process {os.getpid()}"
            what = f"{NAMES[self.fileno()]} takes no output ({problem.strerror})"
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            _lost.add(f"vico: {now}: {who}: {what}; it follows here\n".encode())
        _lost.add(piece)


def guard() -> None:
    """Replace sys.stdout and sys.stderr by streams whose writes succeed."""
    open_closed_descriptors()
    sys.stdout = _guarded(sys.stdout, 1)
    sys.stderr = _guarded(sys.stderr, 2)


def open_closed_descriptors() -> None:
    """Otherwise the next file that is opened becomes stdout or stderr, and gets what is printed.

    In place of a closed one comes a pipe without a reader, so that a closed stream and one whose
    reader has gone are the same, also for child processes.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            reader, writer = os.pipe()
            os.dup2(writer if descriptor else reader, descriptor)
            os.set_inheritable(descriptor, True)
            for end in {reader, writer} - {descriptor}:
                os.close(end)


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:
        encoding, errors = "utf-8", "backslashreplace"
    elif isinstance(stream, io.TextIOWrapper) and stream.fileno() == descriptor:
        encoding, errors = stream.encoding, stream.errors or "strict"
        with suppress(OSError):
            stream.flush()
    else:  # a notebook's or a test's
        return stream
    buffer = io.BufferedWriter(_Output(descriptor, "wb", closefd=False))
    return io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=True)


def keep_lost_output(path: Path) -> None:
    """From now on write to `path` what the streams do not take, also what they did not before."""
    _lost.path = path
    _lost.write()


def is_lost(stream: TextIO | None) -> bool:
    """Whether what was last written to a guarded stream did not arrive."""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return isinstance(raw, _Output) and raw.is_lost


def loss() -> str | None:
    """Why output is missing that no file has; None: all of it arrived.

    A reader that has gone wanted no more: this is not a loss.
    """
    reason = _lost.reason
    if reason is None or _lost.path is not None or reason.errno == errno.EPIPE:
        return None
    return reason.strerror


def descriptor_for_stacks() -> int:
    """Where faulthandler can write: it uses no stream of Python."""
    if is_lost(sys.stderr) and _lost.path is not None:
        with suppress(OSError):
            return _lost.open(_lost.path)
    return 2
