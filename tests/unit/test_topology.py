"""The hosts and devices of a run: how they are described, and which are refused."""

import os
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace

import psutil
import pytest
import torch

from support.errors import refusal
from vico.distributed.launcher_env import SlurmAllocation
from vico.distributed.topology import (
    MAX_HOSTS_SHOWN,
    SLURM_GPU_VARIABLES,
    Member,
    _name_hosts,
    by_node,
    check_topology,
    describe,
    has_large_nodes,
    machine_id,
    sharing_a_gpu,
)
from vico.distributed.world import choose_backend

NO_SLURM = SlurmAllocation()


def members_on(*ranks: int, gpus: int = 0, explicit: bool = False) -> list[Member]:
    """Hosts n0, n1, ... with this many ranks each, on their own GPUs where a host has `gpus`."""
    members: list[Member] = []
    for node, count in enumerate(ranks):
        for local_rank in range(count):
            member = Member(
                rank=len(members),
                host=f"n{node}",
                device="H200" if gpus else "cpu",
                gpu_uuid=f"GPU-{node}-{local_rank}" if gpus else None,
                num_visible_gpus=gpus,
                is_selection_explicit=explicit or not gpus,
                local_size=count,
            )
            members.append(member)
    return members


def test_description() -> None:
    assert describe(members_on(1)) == "1 rank, n0: rank 0 on cpu"
    two_hosts = describe(members_on(3, 2, gpus=4))
    assert two_hosts == "5 ranks on 2 hosts\n  n0: ranks 0-2 on H200\n  n1: ranks 3-4 on H200"
    cyclic = [replace(member, host=f"n{member.rank % 2}") for member in members_on(4)]
    assert describe(cyclic).endswith("\n  n0: ranks 0,2 on cpu\n  n1: ranks 1,3 on cpu")


rank_of = attrgetter("rank")


def test_nodes_are_hosts_or_the_launchers_of_a_host() -> None:
    def ranks_of_nodes(members: list[Member]) -> list[list[int]]:
        return [list(map(rank_of, node)) for node in by_node(members)]

    assert ranks_of_nodes(members_on(2, 3)) == [[0, 1], [2, 3, 4]]
    unknown = [replace(member, local_size=None) for member in members_on(4)]
    assert ranks_of_nodes(unknown) == [[0, 1, 2, 3]]
    two_launchers = [replace(member, local_size=2) for member in members_on(4)]
    assert ranks_of_nodes(two_launchers) == [[0, 1], [2, 3]]
    cyclic = [replace(member, host=f"n{member.rank % 2}") for member in members_on(4)]
    assert ranks_of_nodes(cyclic) == [[0, 2], [1, 3]]
    assert has_large_nodes(two_launchers) and has_large_nodes(members_on(2, 3))
    assert not has_large_nodes(members_on(4)) and not has_large_nodes(members_on(1, 4))


@pytest.mark.parametrize("member", members_on(1, 1, gpus=2))
def test_member_survives_the_exchange(member: Member) -> None:
    assert Member.from_text(member.to_text(), member.rank) == member


SHARED_GPU = [replace(member, gpu_uuid="GPU-x") for member in members_on(2, gpus=2)]
ONE_GPU_PER_TASK = [replace(member, num_visible_gpus=1) for member in members_on(4, gpus=4)]


@pytest.mark.parametrize(
    ("members", "allocation", "expected"),
    [
        (members_on(1), NO_SLURM, None),
        (members_on(2, 2), SlurmAllocation(nodes=2, tasks=4), None),
        (members_on(8, 8, gpus=8), SlurmAllocation(nodes=2, tasks=2), None),
        (members_on(1, gpus=8, explicit=True), NO_SLURM, None),
        (members_on(1, gpus=8), NO_SLURM, 1),
        (members_on(2), SlurmAllocation(nodes=2), 2),
        (ONE_GPU_PER_TASK, SlurmAllocation(nodes=1, tasks=4), None),
        ([replace(member, may_share_gpu=True) for member in SHARED_GPU], NO_SLURM, None),
    ],
)
def test_matching_topology(
    members: list[Member], allocation: SlurmAllocation, expected: int | None
) -> None:
    check_topology(members, allocation, expected)


MISSING_RANKS = [replace(member, local_size=8) for member in members_on(2)]


@pytest.mark.parametrize(
    ("members", "allocation", "message"),
    [
        (
            members_on(2),
            SlurmAllocation(nodes=2),
            "SLURM started 2 node(s) and the ranks are on 1 (n0), so nodes idle or train",
        ),
        (
            members_on(1, 1),
            SlurmAllocation(nodes=1),
            "SLURM started 1 node(s) and the ranks are on 2 (n0, n1)",
        ),
        (
            members_on(1, gpus=8),
            NO_SLURM,
            "n0: 7 GPU(s) are idle, this host runs only rank 0;",
        ),
        (
            members_on(8, 2, gpus=8),
            NO_SLURM,
            "n1: 6 GPU(s) are idle, this host runs only ranks 8-9;",
        ),
        (SHARED_GPU, NO_SLURM, "n0: ranks 0-1 share a GPU"),
        # One of them was told so, and not the other.
        (
            [replace(SHARED_GPU[0], may_share_gpu=True), SHARED_GPU[1]],
            NO_SLURM,
            "n0: ranks 0-1 share a GPU",
        ),
        (
            MISSING_RANKS,
            NO_SLURM,
            "n0: the launcher started 8 ranks on this host and 2 joined (ranks 0-1)",
        ),
    ],
)
def test_other_topology_is_refused(
    members: list[Member], allocation: SlurmAllocation, message: str
) -> None:
    assert refusal(check_topology, members, allocation, None).startswith(message)


@pytest.mark.parametrize(
    ("device", "members", "backend"),
    [
        ("cpu", members_on(2), "gloo"),
        ("cuda", members_on(1, gpus=1), "nccl"),
        ("cuda", members_on(2, gpus=2), "nccl"),
        ("cuda", SHARED_GPU, "gloo"),  # NCCL refuses two ranks on one GPU
        ("cuda", [*members_on(1, gpus=1), *SHARED_GPU], "gloo"),
    ],
)
def test_the_backend_reaches_the_devices(device: str, members: list[Member], backend: str) -> None:
    assert choose_backend(torch.device(device), members) == backend


def test_who_shares_a_gpu() -> None:
    alone = replace(members_on(1, gpus=1)[0], rank=7)
    assert sharing_a_gpu([alone, *SHARED_GPU]) == SHARED_GPU
    assert sharing_a_gpu([alone, SHARED_GPU[1]]) == []
    assert sharing_a_gpu(members_on(2)) == []


def test_hosts_of_a_long_list() -> None:
    """The first of them are named."""
    hosts = {f"n{number}": 1 for number in range(MAX_HOSTS_SHOWN + 1)}
    *shown, last = _name_hosts(hosts).split(", ")
    assert shown == [*hosts][:-1] and last == "..."
    del hosts["n0"]
    assert _name_hosts(hosts).split(", ") == [*hosts]


def test_what_a_rank_says_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(name="H200", uuid="GPU-7", total_memory=141 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)

    def member(**environment: str) -> Member:
        return Member.of_this_process(3, torch.device("cuda", 0), environment)

    found = member(LOCAL_WORLD_SIZE="2", CUDA_VISIBLE_DEVICES="0,1")
    assert (found.rank, found.device, found.gpu_uuid, found.gpu_bytes) == (
        3,
        "H200",
        "GPU-7",
        141 << 30,
    )
    assert (found.num_visible_gpus, found.local_size, found.is_selection_explicit) == (4, 2, True)
    assert found.pid == os.getpid() and found.host_bytes == psutil.virtual_memory().total
    assert not member().is_selection_explicit
    assert member(VICO_SHARED_GPU="on").may_share_gpu and not found.may_share_gpu
    assert not member(VICO_SHARED_GPU="off").may_share_gpu
    by_slurm = {name: "0" for name in SLURM_GPU_VARIABLES}
    assert not member(CUDA_VISIBLE_DEVICES="0", **by_slurm).is_selection_explicit
    on_cpu = Member.of_this_process(1, torch.device("cpu"), {})
    assert (on_cpu.device, on_cpu.gpu_uuid, on_cpu.num_visible_gpus) == ("cpu", None, 0)
    assert on_cpu.is_selection_explicit and on_cpu.pid == os.getpid()
    assert found.machine == on_cpu.machine == machine_id()
