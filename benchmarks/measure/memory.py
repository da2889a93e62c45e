"""Peak memory: of a GPU's allocator, or of this process."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.spreads import UNKNOWN
from vico.planner.gpu_specs import GIB

# Without these, glibc keeps freed blocks, and they count as used.
MALLOC_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def device_peak(run: Callable[[], Any], device: torch.device) -> dict[str, Any]:
    """Peak memory in GiB during one call: allocated and reserved on a GPU.

    On a CPU, "allocated" is the growth of this process, and "reserved" is "n/a".
    """
    if device.type != "cuda":
        return {
            "allocated_gib": peak_growth(run)["growth_mib"] / 1024,
            "reserved_gib": UNKNOWN,
            "of": "growth of the process",
        }
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return {
        "before_gib": before / GIB,
        "allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "of": "the device",
    }


def peak_growth(run: Callable[[], Any]) -> dict[str, float]:
    """MiB by which one call raises the peak resident memory (VmHWM) above what was resident before.

    Start the process with MALLOC_ENVIRONMENT.
    """
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    was_reset = _reset_peak()
    before = _status_mib("VmRSS")
    run()
    peak = _status_mib("VmHWM")
    return {
        "before_mib": before,
        "peak_mib": peak,
        "growth_mib": peak - before,
        "peak_was_reset": float(was_reset),
    }


def resident_peak_gib() -> float:
    """Peak resident memory of this process since its start."""
    return _status_mib("VmHWM") / 1024


def _status_mib(field: str) -> float:
    """A field of /proc/self/status, which counts in kB."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def _reset_peak() -> bool:
    """Sets VmHWM to what is resident now. If the kernel refuses, the warm-up's peak stays."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return False
    return True
