"""Clocks for CPUs and GPUs."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """(process CPU time, result) of one call; includes the kernel's work for this process."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


@dataclass(frozen=True)
class Clock:
    """Points in time on a device.

    On a GPU they are events in its stream, which are read later, so that nothing waits. On a CPU
    they are process time, or wall time if `wall` is set: where ranks wait for each other, process
    time is too short.
    """

    device: torch.device
    wall: bool = False

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter() if self.wall else time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds between two points in time; on a GPU, waits until `stop` has happened."""
        if self.device.type != "cuda":
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def time(self, run: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self.now()
        run()
        return self.between(start, self.now())

    @property
    def kind(self) -> str:
        if self.device.type == "cuda":
            return "device events"
        return "wall time" if self.wall else "process time"
