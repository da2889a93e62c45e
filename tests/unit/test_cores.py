"""Ranks on the cores of their GPU's NUMA node, by a made /sys."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from vico.distributed.cores import _numbers, bind_beside, host_cores, pci_address

GPU = "0000:c1:00.0"
CORES = sorted(os.sched_getaffinity(0))
needs_two_cores = pytest.mark.skipif(len(CORES) < 2, reason="one core")


def made(folder: Path, node: int, **cpulists: str) -> Path:
    """A /sys with the GPU at `node`, and nodes with these cores."""
    gpu = folder / "bus/pci/devices" / GPU
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text(f"{node}\n")
    for name, cpulist in cpulists.items():
        of_node = folder / "devices/system/node" / name
        of_node.mkdir(parents=True)
        (of_node / "cpulist").write_text(f"{cpulist}\n")
    return folder


def bound(sys: Path) -> tuple[str | None, set[int]]:
    """What is said, and the cores afterwards: of a thread of its own, and one that it starts."""

    def bind() -> tuple[str | None, set[int]]:
        said = bind_beside(GPU, sys)
        with ThreadPoolExecutor(1) as later:
            return said, later.submit(os.sched_getaffinity, 0).result()

    with ThreadPoolExecutor(1) as thread:
        result = thread.submit(bind).result()
    assert os.sched_getaffinity(0) == set(CORES)
    return result


@needs_two_cores
def test_a_rank_keeps_to_the_node_of_its_gpu(tmp_path: Path) -> None:
    others = ",".join(map(str, CORES[1:]))
    sys = made(tmp_path, 1, node0=str(CORES[0]), node1=f"{others},{CORES[-1] + 1}-9999")
    said, cores = bound(sys)
    assert cores == set(CORES[1:])
    assert said == f"NUMA node 1, {len(CORES) - 1} of {len(CORES)} cores"
    assert host_cores() == len(CORES), "threads are divided as before"


@pytest.mark.parametrize(
    ("node", "cpulists"),
    [
        (0, {"node0": f"0-{CORES[-1]}"}),  # the only node
        (-1, {"node0": "0"}),  # the host does not say
        (1, {"node0": str(CORES[0])}),  # a node that is not shown
        (1, {"node1": "5000-5001"}),  # someone chose cores of another node
        (1, {"node1": ""}),  # a node of memory only
        (1, {"node1": "zero"}),
    ],
)
def test_nothing_is_changed(tmp_path: Path, node: int, cpulists: dict[str, str]) -> None:
    assert bound(made(tmp_path, node, **cpulists)) == (None, set(CORES))


def test_a_host_without_sys(tmp_path: Path) -> None:
    assert bound(tmp_path) == (None, set(CORES))


def test_address_of_a_gpu() -> None:
    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=193, pci_device_id=0)
    assert pci_address(gpu) == GPU


def test_lists_of_ranges() -> None:
    assert _numbers("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
