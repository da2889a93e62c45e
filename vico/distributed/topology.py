"""Which hosts and devices the ranks use, and whether these are the ones that were requested.

Two nodes that each train alone, or one rank on a node of eight GPUs, run without an error and waste
their allocation. So every start prints its ranks, hosts and devices, and refuses a mismatch.
"""

import json
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from vico.distributed.launcher_env import (
    LAUNCH_HINT,
    SHARED_GPU_VARIABLE,
    SlurmAllocation,
    host_name,
    local_world_size,
    may_share_gpu,
)
from vico.distributed.store_words import read_word
from vico.errors import UserError

# Set when SLURM, and not the user, chose CUDA_VISIBLE_DEVICES.
SLURM_GPU_VARIABLES = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS")
MAX_HOSTS_SHOWN = 4


@dataclass(frozen=True)
class Member:
    """What a rank tells the other ranks about itself."""

    rank: int
    host: str
    device: str  # "cpu", or the product name of the GPU
    gpu_uuid: str | None
    num_visible_gpus: int
    is_selection_explicit: bool  # the user chose the visible GPUs; else they are the host's default
    local_size: int | None  # ranks on this host, according to the launcher
    gpu_bytes: int = 0  # memory of its GPU
    host_bytes: int = 0  # memory of its host
    pid: int = 0
    machine: str = ""  # where `pid` means this process; see machine_id
    may_share_gpu: bool = False  # as SHARED_GPU_VARIABLE says

    @classmethod
    def of_this_process(
        cls, rank: int, device: torch.device, environment: Mapping[str, str] = os.environ
    ) -> "Member":
        host, pid, machine = host_name(environment), os.getpid(), machine_id()
        local_size = local_world_size(environment)
        if device.type == "cpu":
            return cls(rank, host, "cpu", None, 0, True, local_size, pid=pid, machine=machine)
        properties = torch.cuda.get_device_properties(device)
        by_slurm = any(name in environment for name in SLURM_GPU_VARIABLES)
        return cls(
            rank,
            host,
            device=properties.name,
            gpu_uuid=str(properties.uuid),
            num_visible_gpus=torch.cuda.device_count(),
            is_selection_explicit="CUDA_VISIBLE_DEVICES" in environment and not by_slurm,
            local_size=local_size,
            gpu_bytes=properties.total_memory,
            host_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            pid=pid,
            machine=machine,
            may_share_gpu=may_share_gpu(environment),
        )

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str | bytes, rank: int) -> "Member":
        """What `rank` published. Raises UserError where it is something else."""
        member = read_word(cls, text)
        if member is None or member.rank != rank:
            raise UserError(
                f"what rank {rank} published at the rendezvous is not what this version of ViCo "
                "does; run the same code on all hosts, and see that no other program uses "
                "MASTER_PORT"
            )
        return member


def machine_id() -> str:
    """Names the set of processes that a process number is unique in, on Linux.

    It is not the host's name: containers may share that, and number their processes from 1 each.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except (OSError, ValueError):
        return socket.gethostname()


def by_host(members: Iterable[Member]) -> dict[str, list[Member]]:
    """The members of each host, hosts in the order of their first rank."""
    hosts: dict[str, list[Member]] = {}
    for member in members:
        hosts.setdefault(member.host, []).append(member)
    return hosts


def by_node(members: Iterable[Member]) -> list[list[Member]]:
    """The members of each node: those of a host, as many as its launcher says that it started.

    Several launchers on one host start several nodes (LOCAL_WORLD_SIZE, as torchrun sets it).
    """
    nodes = []
    for ranks in by_host(members).values():
        size = ranks[0].local_size or len(ranks)
        nodes += [ranks[start : start + size] for start in range(0, len(ranks), size)]
    return nodes


def has_large_nodes(members: Iterable[Member]) -> bool:
    """Whether there are several nodes, each of several ranks."""
    sizes = [len(node) for node in by_node(members)]
    return len(sizes) > 1 and min(sizes) > 1


def describe(members: Sequence[Member]) -> str:
    """Number of ranks, hosts and devices: one line for one host, else one more line per host."""
    lines = []
    for host, ranks in by_host(members).items():
        devices = dict.fromkeys(member.device for member in ranks)
        lines.append(f"{host}: {_name_ranks(ranks)} on {', '.join(devices)}")
    count = f"{len(members)} rank{'s' if len(members) > 1 else ''}"
    if len(lines) == 1:
        return f"{count}, {lines[0]}"
    return "\n  ".join([f"{count} on {len(lines)} hosts", *lines])


def _name_ranks(members: Sequence[Member]) -> str:
    """For example "rank 3" or "ranks 0-3,8"."""
    runs: list[list[int]] = []
    for rank in sorted(member.rank for member in members):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    return f"rank{'s' if len(members) > 1 else ''} {','.join(texts)}"


def check_topology(
    members: Sequence[Member], allocation: SlurmAllocation, expected: int | None
) -> None:
    """Raises UserError, the same on every rank, where ranks are missing or GPUs idle or shared.

    `expected`, from --expect_world_size, overrides what SLURM and the visible GPUs suggest.
    """
    hosts = by_host(members)
    nodes = allocation.nodes
    if expected is None and nodes is not None and len(hosts) != nodes:
        raise UserError(
            f"SLURM started {nodes} node(s) and the ranks are on {len(hosts)} "
            f"({_name_hosts(hosts)}), so nodes idle or train separately; {LAUNCH_HINT}"
        )
    for host, ranks in hosts.items():
        num_launched = max(member.local_size or 0 for member in ranks)
        if num_launched > len(ranks):
            raise UserError(
                f"{host}: the launcher started {num_launched} ranks on this host and {len(ranks)} "
                f"joined ({_name_ranks(ranks)}); {LAUNCH_HINT}"
            )
        _check_gpus(host, ranks, expected)


def sharing_a_gpu(members: Iterable[Member]) -> list[Member]:
    """The members whose GPU is another one's as well. NCCL connects no such ranks, gloo does."""
    by_gpu: dict[str, list[Member]] = {}
    for member in members:
        if member.gpu_uuid is not None:
            by_gpu.setdefault(member.gpu_uuid, []).append(member)
    return [member for ranks in by_gpu.values() if len(ranks) > 1 for member in ranks]


def _check_gpus(host: str, ranks: Sequence[Member], expected: int | None) -> None:
    sharing = sharing_a_gpu(ranks)
    if not all(member.may_share_gpu for member in sharing):
        raise UserError(
            f"{host}: {_name_ranks(sharing)} share a GPU; start one rank per GPU of a host "
            f"(VICO_RANKS, --ntasks-per-node), or set {SHARED_GPU_VARIABLE}=on for a slow trial"
        )
    num_idle = max(member.num_visible_gpus for member in ranks) - len(ranks)
    is_explicit = expected is not None or all(member.is_selection_explicit for member in ranks)
    if num_idle > 0 and not is_explicit:
        raise UserError(
            f"{host}: {num_idle} GPU(s) are idle, this host runs only {_name_ranks(ranks)}; "
            "start one rank per GPU with 'bash launch/train.sh', or confirm with "
            f"CUDA_VISIBLE_DEVICES or --expect_world_size {len(ranks)}"
        )


def _name_hosts(hosts: Mapping[str, object]) -> str:
    names = list(hosts)[:MAX_HOSTS_SHOWN]
    if len(hosts) > MAX_HOSTS_SHOWN:
        names.append("...")
    return ", ".join(names)
