"""The cores of a rank: those of its GPU's NUMA node, where the host has several nodes.

Launches and copies from pinned memory would else cross from one socket to another. Threads and data
workers that a rank starts later inherit its cores, and its memory is taken from beside them.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

from vico.io.paths import read_bytes

SYS = Path("/sys")


@cache
def host_cores() -> int:
    """How many cores the ranks of this host have together, as asked before one binds itself."""
    return len(os.sched_getaffinity(0))


def pci_address(gpu: Any) -> str:
    """As in /sys/bus/pci/devices. `gpu`: torch's properties of it."""
    return f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"


def bind_beside(address: str, sys: Path = SYS) -> str | None:
    """Bind this thread to the cores of the node of the PCI device `address`; says to which.

    None: nothing was changed, because the host does not tell the node, all allowed cores are of
    this node, or none is (then someone chose others for the rank).
    """
    allowed, num_host_cores = os.sched_getaffinity(0), host_cores()
    try:
        node = int(read_bytes(sys / "bus/pci/devices" / address / "numa_node"))
        listed = read_bytes(sys / f"devices/system/node/node{node}/cpulist")
        cores = allowed & _numbers(listed.decode("ascii"))
    except (OSError, ValueError):  # a container may hide /sys; a host of one node may say -1
        return None
    if cores in (set(), allowed):
        return None
    os.sched_setaffinity(0, cores)
    return f"NUMA node {node}, {len(cores)} of {num_host_cores} cores"


def _numbers(ranges: str) -> set[int]:
    """Of Linux's lists of ranges: "0-2,8"."""
    numbers: set[int] = set()
    for part in filter(None, ranges.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
