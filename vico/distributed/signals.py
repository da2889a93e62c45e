"""Stop requests: after SIGTERM, Ctrl-C and the like training finishes its step, saves and ends.

Schedulers send SIGTERM, SIGUSR1, SIGUSR2 or SIGXCPU before a time limit or a preemption, to some or
all processes of a job. A terminal or ssh connection that goes away sends SIGHUP. This module
imports no torch, so that the handlers are installed from the first moment on.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from vico.errors import INTERRUPTED, RESUMABLE

SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGHUP,
    signal.SIGXCPU,
)
# Those that end the process at once where they come a second time. The others are warnings, which
# may be repeated: the kernel sends SIGXCPU every second.
ENDING = (signal.SIGINT, signal.SIGTERM)
# launch/start.py blocks them until the ranks handle them. SIGQUIT asks for the stacks.
BLOCKED = (*SIGNALS, signal.SIGQUIT)
# One request can arrive twice: sent to the whole job, and passed on by the launcher.
ECHO_SECONDS = 2.0


class Stopped(Exception):
    """Training ended on request. `number` is the signal's, `line` is the message for the user."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number, self.line = number, line

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.number == signal.SIGINT else RESUMABLE


_number = 0  # of the first request
_ending_since: float | None = None  # when the first of ENDING arrived


def _handle(number: int, frame: FrameType | None) -> None:
    global _number, _ending_since
    _number = _number or number
    if number not in ENDING:
        return
    if _ending_since is None:
        _ending_since = time.monotonic()
    elif time.monotonic() - _ending_since > ECHO_SECONDS:
        # The second request ends the process at once. Files on disk are complete at any moment.
        os._exit(128 + number)


def install_handlers() -> None:
    """Record the signals from now on. A second SIGTERM or SIGINT, after 2 s, ends the process."""
    _handle_by({number: _handle for number in SIGNALS if not is_ignored_hangup(number)})
    unblock()


def handlers() -> dict[int, Any]:
    """The handler of each signal, for `put_back`."""
    return {number: signal.getsignal(number) for number in BLOCKED}


def put_back(earlier: dict[int, Any]) -> None:
    """End the work of this module in a program that goes on: a notebook, a test."""
    global _number, _ending_since
    _number, _ending_since = 0, None
    _handle_by({number: handler for number, handler in earlier.items() if handler is not None})


def _handle_by(chosen: dict[int, Any]) -> None:
    """Python lets the main thread alone choose handlers. In another one, its program decides."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in chosen.items():
            signal.signal(number, handler)


def unblock() -> None:
    """Unblock the signals: launch/start.py blocks them until the ranks can handle them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, BLOCKED)


def print_stacks_on_quit() -> None:
    """SIGQUIT (Ctrl-\\ on a terminal) prints the stacks of all threads, and the process goes on."""
    faulthandler.register(signal.SIGQUIT, file=2, all_threads=True)


def ignore_all() -> None:
    """For helper processes: they end with their rank, which handles the signals."""
    _handle_by(dict.fromkeys(BLOCKED, signal.SIG_IGN))


def restore_default_handlers() -> None:
    """Let the signals end the process again: after an error nothing is left to save."""
    _handle_by({n: signal.SIG_DFL for n in SIGNALS if not is_ignored_hangup(n)})


def blocked() -> list[int]:
    """Those of BLOCKED that a launcher blocks: a blocked one would arrive in spite of `nohup`."""
    return [number for number in BLOCKED if not is_ignored_hangup(number)]


def is_ignored_hangup(number: int) -> bool:
    """`nohup` has SIGHUP ignored."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def stop_requested() -> int:
    """The number of the signal that requested a stop; 0 for none."""
    return _number


def die_with_parent(parent: int) -> None:
    """From now on the kernel kills this process when its parent ends (Linux only)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            os._exit(128 + signal.SIGKILL)
