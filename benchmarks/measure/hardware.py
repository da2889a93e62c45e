"""What a record says about its machine."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.spreads import UNKNOWN
from vico.planner.gpu_specs import GIB

# Of nvidia-smi --query-gpu, with its own units.
STATE = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit"),
    *("temperature.gpu", "clocks_throttle_reasons.active"),
)


def hardware() -> dict[str, Any]:
    """Processor, load, and the first GPU (all are assumed equal)."""
    facts: dict[str, Any] = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "cpu": _cpu_name(),
        "load": list(os.getloadavg()),
    }
    variables = {name: value for name, value in os.environ.items() if name.startswith("NCCL_")}
    facts["nccl_environment"] = variables
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpus": torch.cuda.device_count(),
            "gpu_gib": round(properties.total_memory / GIB, 1),
            "cuda": torch.version.cuda,
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "topology": smi("topo", "-m"),
        }
        facts |= gpu_state()
    return facts


def smi(*words: str) -> str:
    """What nvidia-smi says, or "n/a" where it does not run."""
    try:
        completed = subprocess.run(
            ["nvidia-smi", *words], capture_output=True, encoding="utf-8", check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return UNKNOWN
    return completed.stdout.strip()


def gpu_state() -> dict[str, Any]:
    """Driver, clocks, power and what holds the clocks down, a list with an entry per GPU."""
    lines = smi(f"--query-gpu={','.join(STATE)}", "--format=csv,noheader").splitlines()
    states = []
    for line in lines:
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(STATE):
            return {"gpu_state": UNKNOWN}
        states.append(dict(zip(STATE, cells, strict=True)))
    return {"gpu_state": states}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or UNKNOWN
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return UNKNOWN
