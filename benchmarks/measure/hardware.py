"""What a record says about its machine."""

import os
import platform
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.measure.spreads import UNKNOWN
from vico.planner.gpu_specs import GIB

# Of nvidia-smi --query-gpu, with its own units.
STATE = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "power.draw", "power.limit"),
    *("temperature.gpu", "clocks_throttle_reasons.active"),
)

# The same while steps are timed: of each GPU, numbers without units, then the reasons.
WATCHED = (
    *("index", "clocks.sm", "power.draw", "temperature.gpu"),
    "clocks_throttle_reasons.active",
)
WATCH_MILLISECONDS = 500


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


@contextmanager
def watched_gpus(watches: bool = True) -> Iterator[dict[str, Any]]:
    """Clocks, power, temperature and throttle reasons of this host's GPUs during the block.

    The dict has "gpu_samples" after the block: by GPU, the lowest, the median and the highest value
    of what nvidia-smi printed twice a second; "n/a" where it does not run. It is a process beside
    this one, which starts and reads nothing in the block. Nothing is done unless `watches`.
    """
    if not watches:
        yield {}
        return
    out: dict[str, Any] = {"gpu_samples": UNKNOWN}
    query = (f"--query-gpu={','.join(WATCHED)}", "--format=csv,noheader,nounits")
    with tempfile.TemporaryFile() as file:
        try:
            process = subprocess.Popen(
                ["nvidia-smi", *query, "-lms", str(WATCH_MILLISECONDS)],
                stdout=file,
                stderr=subprocess.DEVNULL,
            )
        except OSError:
            yield out
            return
        try:
            yield out
        finally:
            process.terminate()
            process.wait()
        file.seek(0)
        out["gpu_samples"] = _by_gpu(file.read().decode("utf-8", "replace")) or UNKNOWN


def _by_gpu(text: str) -> dict[str, Any]:
    """The samples that nvidia-smi printed; lines of another form, as a last one, are left out."""
    rows: dict[str, list[list[str]]] = defaultdict(list)
    for line in text.splitlines():
        index, *cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == len(WATCHED) - 1:
            rows[index].append(cells)
    samples: dict[str, Any] = {}
    for index, of_gpu in rows.items():
        *numbers, reasons = zip(*of_gpu, strict=True)
        samples[index] = {"samples": len(of_gpu), WATCHED[-1]: sorted(set(reasons))}
        for name, values in zip(WATCHED[1:], numbers, strict=False):
            samples[index][name] = _range(values)
    return samples


def _range(values: tuple[str, ...]) -> dict[str, float] | str:
    try:
        numbers = list(map(float, values))
    except ValueError:  # a GPU that does not say
        return UNKNOWN
    return {"min": min(numbers), "median": median(numbers), "max": max(numbers)}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or UNKNOWN
    for line in lines:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return UNKNOWN
