"""Progress of a long task: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from types import TracebackType
from typing import Any

PLAIN_SECONDS = 20.0  # between progress lines where there is no terminal


class ProgressBar:
    """A bar on a terminal; elsewhere a line now and then, with the time that is left. Only the main rank shows it."""

    def __init__(self, what: str, total: int, unit: str, shown: bool, done: int = 0) -> None:
        self._what, self._total, self._unit, self._shown = what, total, unit, shown
        self._done = self._first = done
        self._start = self._last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "ProgressBar":
        if self._shown and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total, initial=self._done, desc=self._what, unit=self._unit, leave=False
            )
        elif self._shown:
            print(f"{self._what}: {self._total - self._done} {self._unit}(s) to do", flush=True)
        return self

    def advance(self, note: str = "") -> None:
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()
        elif self._shown:
            self._line(note)

    def _line(self, note: str) -> None:
        now = time.monotonic()
        early = self._done - self._first in (
            1,
            10,
        )  # soon after the start: does it run, and how long will it take
        if not early and now - self._last < PLAIN_SECONDS:
            return
        self._last = now
        left = (now - self._start) / (self._done - self._first) * (self._total - self._done)
        print(
            f"{self._what}: {self._unit} {self._done}/{self._total}  {note}  {duration(left)} left",
            flush=True,
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60} h {minutes % 60} min"
        if minutes >= 60
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )
