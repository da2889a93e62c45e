"""Measuring on this machine: clocks, ceilings, medians, peak memory. Nothing here knows the model, but for its choice of a product."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vico.model.ops.autograd import linear

GIB = 2**30


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """(process CPU time, result): not what others on the machine take, but what the kernel does for us is in it."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def spread(values: Sequence[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "rounds": len(values)}


def ratio_spread(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """Of the ratios within each round, so that what slows a whole round cancels."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def cpu_ceilings(repeats: int = 5) -> dict[str, float]:
    """What one thread can do here: the best of a few fp32 matrix products, by torch's default library and by ViCo's choice, and copying."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    rates = [
        2 * 1536**3 / min(cpu_seconds(run)[0] for _ in range(repeats)) / 1e9
        for run in (lambda: a @ b, lambda: linear(a, b))
    ]
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source).fill_(0)
    copy = min(cpu_seconds(lambda: target.copy_(source))[0] for _ in range(repeats))
    return {
        "matmul_gflops": max(rates),
        "default_matmul_gflops": rates[0],
        "vico_matmul_gflops": rates[1],
        "copy_gb_per_second": 2 * source.numel() * 4 / copy / 1e9,
    }


@dataclass(frozen=True)
class Clock:
    """Moments on a device: events in its stream on a GPU (read later, nobody waits), process or wall time on a CPU."""

    device: torch.device
    wall: bool = False  # where ranks wait for each other, process time says nothing

    def now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter() if self.wall else time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds; on a GPU waits until `stop` has happened."""
        if self.device.type != "cuda":
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def time(self, run: Callable[[], Any]) -> float:
        start = self.now()
        run()
        return self.between(start, self.now())

    @property
    def kind(self) -> str:
        return (
            "device events"
            if self.device.type == "cuda"
            else "wall time"
            if self.wall
            else "process time"
        )


def device_ceilings(
    device: torch.device, dtype: torch.dtype, size: int, copy_mib: int, repeats: int = 20
) -> dict[str, Any]:
    """The median rate of a square product in `dtype`, and of copying within the device's memory (bytes read and written)."""
    clock = Clock(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(copy_mib * 2**18, device=device)
    target = torch.empty_like(source)
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        for _ in range(3):
            run()
    product = spread([clock.time(lambda: a @ b) for _ in range(repeats)])
    copy = spread([clock.time(lambda: target.copy_(source)) for _ in range(repeats)])
    return {
        "product": f"{str(dtype).removeprefix('torch.')} {size} x {size} x {size}",
        "matmul_tflops": 2 * size**3 / product["median"] / 1e12,
        "matmul_seconds": product,
        "copy_gb_per_second": 2 * source.numel() * 4 / copy["median"] / 1e9,
        "copy_seconds": copy,
    }


def device_peak(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Peak memory while `run` runs, GiB: allocated and reserved on a GPU, else the growth of this process, and "n/a"."""
    if device.type != "cuda":
        return {
            "allocated_gib": peak_growth(run)["growth_mib"] / 1024,
            "reserved_gib": "n/a",
            "of": "growth of the process",
        }
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    allocated, reserved = (
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
    )
    return {
        "before_gib": before / GIB,
        "allocated_gib": allocated / GIB,
        "reserved_gib": reserved / GIB,
        "of": "the device",
    }


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "load": list(os.getloadavg()),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_gib": round(properties.total_memory / GIB, 1),
        }
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "n/a"
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "n/a"
    )


def peak_growth(run: Callable[[], Any]) -> dict[str, float]:
    """MiB by which `run` raises this process's peak resident memory (VmHWM) above what is resident before it.

    Start the process with MALLOC_ENVIRONMENT: else glibc keeps freed blocks, and they count as use.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset = _reset_peak()
    before = _status("VmRSS")
    run()
    return {
        "before_mib": before,
        "peak_mib": _status("VmHWM"),
        "growth_mib": _status("VmHWM") - before,
        "peak_was_reset": float(reset),
    }


def resident_peak_gib() -> float:
    """Of this process, since its start."""
    return _status("VmHWM") / 1024


MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(
        int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field + ":")
    )


def _reset_peak() -> bool:
    """VmHWM back to what is resident now; where the kernel refuses, it stays what the warm-up left."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
