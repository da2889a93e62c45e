"""Measuring on this machine: process CPU time, ceilings, medians, peak memory. Nothing here knows the model."""

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
import torch

GIB = 2**30


def cpu_seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """(process CPU time, result): not what others on the machine take, but what the kernel does for us is in it."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def spread(values: Items[float]) -> dict[str, float]:
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "rounds": len(values)}


def ratio_spread(numerators: Items[float], denominators: Items[float]) -> dict[str, float]:
    """Of the ratios within each round, so that what slows a whole round cancels."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def cpu_ceilings(repeats: int = 5) -> dict[str, float]:
    """What one thread can do here: the best of a few fp32 matrix products, and copying."""
    a, b = torch.randn(1536, 1536), torch.randn(1536, 1536)
    product = min(cpu_seconds(lambda: a @ b)[0] for _ in range(repeats))
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source).fill_(0)
    copy = min(cpu_seconds(lambda: target.copy_(source))[0] for _ in range(repeats))
    return {"matmul_gflops": 2 * 1536**3 / product / 1e9, "copy_gb_per_second": 2 * source.numel() * 4 / copy / 1e9}


def hardware() -> dict[str, Any]:
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "cpu": _cpu_name(), "load": list(os.getloadavg())}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "gpu_gib": round(properties.total_memory / GIB, 1)}
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "n/a"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "n/a")


def peak_growth(run: Callable[[], Any]) -> dict[str, float]:
    """MiB by which `run` raises this process's peak resident memory (VmHWM) above what is resident before it.

    Start the process with MALLOC_ENVIRONMENT: else glibc keeps freed blocks, and they count as use.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    reset = _reset_peak()
    before = _status("VmRSS")
    run()
    return {"before_mib": before, "peak_mib": _status("VmHWM"), "growth_mib": _status("VmHWM") - before, "peak_was_reset": float(reset)}


MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def _status(field: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) / 1024 for line in text.splitlines() if line.startswith(field + ":"))


def _reset_peak() -> bool:
    """VmHWM back to what is resident now; where the kernel refuses, it stays what the warm-up left."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
