"""Asked to stop: SIGTERM, SIGUSR1 and Ctrl-C are a wish, which training grants behind the step under way.

Schedulers send them before a time limit or a preemption, to some or all processes of a job. Imports no torch: the wish
must be heard from the first moment on.
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

from vico.errors import INTERRUPTED, RESUMABLE

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A signal can come twice for one wish: to the whole job and once more through its launcher.
ECHO_SECONDS = 2.0


class Stopped(Exception):
    """Training has ended because it was asked to; `number` is the signal's, `line` what the user reads."""

    def __init__(self, number: int, line: str) -> None:
        super().__init__(line)
        self.number, self.line = number, line

    @property
    def exit_code(self) -> int:
        return INTERRUPTED if self.number == signal.SIGINT else RESUMABLE


_number, _since = 0, 0.0


def _hear(number: int, frame: FrameType | None) -> None:
    global _number, _since
    if not _number:
        _number, _since = number, time.monotonic()
    elif number != signal.SIGUSR1 and time.monotonic() - _since > ECHO_SECONDS:
        os._exit(128 + number)  # asked twice: at once; what is on the disk is whole at any moment


def install_handlers() -> None:
    """From now on the signals are remembered instead of ending this process; a second one, later, does end it."""
    for number in SIGNALS:
        signal.signal(number, _hear)
    unblock()


def unblock() -> None:
    """Unblock the signals, which launch/start.py holds back from the ranks until they can be heard."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def ignore_all() -> None:
    """In helper processes: they end with the process that they work for, which hears the signals itself."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def die_with_parent(parent: int) -> None:
    """From now on this process is killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
        if os.getppid() != parent:  # it has ended just before
            os._exit(128 + signal.SIGKILL)


def restore_default_handlers() -> None:
    """Back to ending by signals: behind an error nothing is left to save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def stop_requested() -> int:
    """The number of the signal that this process was asked to stop by; 0: none."""
    return _number
