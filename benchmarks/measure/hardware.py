"""What a record says about its machine."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.spreads import UNKNOWN
from vico.planner.gpu_specs import GIB


def hardware() -> dict[str, Any]:
    """Processor, load, and the first GPU (all are assumed equal)."""
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
        return platform.processor() or UNKNOWN
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return UNKNOWN
