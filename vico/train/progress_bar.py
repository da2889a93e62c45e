"""Progress of a long task: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

from vico.io import log, streams

PLAIN_SECONDS = 20.0  # between progress lines where there is no terminal
EARLY = (1, 10)  # items after which a plain line comes early: does it run, how long will it take


class ProgressBar:
    """Shows, on rank 0 (`shown`), how many of `total` items are done and the time left.

    `every`: a plain line after that many items, also where there is a terminal; None: now and then.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        shown: bool,
        done: int = 0,
        every: int | None = None,
    ) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._every = every
        self._done = self._first = done
        self._started = self._last_line = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "ProgressBar":
        if self._shown and self._every is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=self._done, desc=self._what, unit=self._unit, leave=False
            )
        elif self._shown:
            log.info(f"{self._what}: {self._total - self._done} {self._unit}(s) to do")
        return self

    def advance(self, note: str = "") -> None:
        """One more item is done."""
        self._done += 1
        if self._bar is not None and streams.is_lost(sys.stderr):
            self._bar.close()  # the terminal is gone: lines from now on
            self._bar = None
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._shown:
            self._print_line(note)

    def _print_line(self, note: str) -> None:
        now, done_here = time.monotonic(), self._done - self._first
        if self._every is not None:
            is_due = self._done % self._every == 0
        else:
            is_due = done_here in EARLY or now - self._last_line >= PLAIN_SECONDS
        if not is_due:
            return
        self._last_line = now
        seconds_left = (now - self._started) / done_here * (self._total - self._done)
        place = f"{self._unit} {self._done}/{self._total}"
        log.info(f"{self._what}: {place}  {note}  {log.duration(seconds_left)} left")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
