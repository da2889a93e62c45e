"""Whether the ranks that came are those that were ordered: which hosts they are on, and what of each host they use.

Two nodes that each train alone, or one rank on a node of eight GPUs, run without an error and waste what they were
given. So every start says who came, and ends where it is not as told.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch

from vico.distributed.launcher_env import HINT, SlurmAllocation, host_name, int_variable
from vico.errors import UserError

OF_SLURM = (
    "SLURM_STEP_GPUS",
    "SLURM_JOB_GPUS",
)  # there when SLURM, and not a person, chose CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class Member:
    """What a rank tells the others of itself."""

    rank: int
    host: str
    device: str  # as a person calls it
    gpu: str | None  # which no other rank may use
    num_visible: int  # GPUs that its process sees
    chosen: bool  # that these are visible is somebody's word, and not the host's default
    local_size: int | None  # ranks on its host, as its launcher says
    gpu_bytes: int = 0  # of its GPU's memory
    host_bytes: int = 0  # of its host's memory
    pid: int = 0

    @classmethod
    def of_this_process(
        cls, rank: int, device: torch.device, environment: Mapping[str, str] = os.environ
    ) -> "Member":
        host = host_name(environment)
        local_size = int_variable(environment, "LOCAL_WORLD_SIZE") or int_variable(
            environment, "LOCAL_SIZE"
        )
        if device.type == "cpu":
            return cls(rank, host, "cpu", None, 0, True, local_size, pid=os.getpid())
        about = torch.cuda.get_device_properties(device)
        chosen = "CUDA_VISIBLE_DEVICES" in environment and not any(
            name in environment for name in OF_SLURM
        )
        host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count = torch.cuda.device_count()
        gpu = (about.name, str(about.uuid), count, chosen)
        return cls(rank, host, *gpu, local_size, about.total_memory, host_bytes, os.getpid())

    def to_text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> "Member":
        return cls(**json.loads(text))


def by_host(members: Sequence[Member]) -> dict[str, list[Member]]:
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(member.host, []).append(member)
    return found


def describe(members: Sequence[Member]) -> str:
    """The lines that every run begins with: ranks, hosts and devices."""
    hosts = by_host(members)
    where = [
        f"{host}: {_ranks(there)} on {', '.join(dict.fromkeys(m.device for m in there))}"
        for host, there in hosts.items()
    ]
    count = f"{len(members)} rank{'s' if len(members) > 1 else ''}"
    return (
        f"world: {count}, {where[0]}"
        if len(hosts) == 1
        else "\n  ".join([f"world: {count} on {len(hosts)} hosts", *where])
    )


def _ranks(members: Sequence[Member]) -> str:
    """ranks 0-3,8"""
    parts: list[list[int]] = []
    for rank in sorted(m.rank for m in members):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    text = ",".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(members) > 1 else ''} {text}"


def check_topology(members: Sequence[Member], there: SlurmAllocation, expected: int | None) -> None:
    """Raises UserError, the same on every rank, where those who came are not those who should have.

    `expected`, the user's own word on the number of ranks, stands above what SLURM and the visible GPUs suggest.
    """
    hosts = by_host(members)
    if expected is None and there.nodes is not None and len(hosts) != there.nodes:
        raise UserError(
            f"SLURM started {there.nodes} node(s) and the ranks of this world are on {len(hosts)} ({_list(hosts)}), "
            f"so nodes are idle or train apart; {HINT}"
        )
    for host, ranks in hosts.items():
        told = max(m.local_size or 0 for m in ranks)
        if told > len(ranks):
            raise UserError(
                f"{host}: the launcher speaks of {told} ranks on this host and {len(ranks)} came ({_ranks(ranks)}); {HINT}"
            )
        _check_gpus(host, ranks, expected)


def _check_gpus(host: str, ranks: Sequence[Member], expected: int | None) -> None:
    used = [m.gpu for m in ranks if m.gpu is not None]
    shared = [m for m in ranks if m.gpu is not None and used.count(m.gpu) > 1]
    if shared:
        raise UserError(
            f"{host}: {_ranks(shared)} share a GPU; start one rank per GPU of a host (VICO_RANKS, --ntasks-per-node)"
        )
    idle = max(m.num_visible for m in ranks) - len(ranks)
    if idle > 0 and expected is None and not all(m.chosen for m in ranks):
        raise UserError(
            f"{host}: {_ranks(ranks)} of this host leave {idle} of its GPUs idle; start one rank per GPU by 'bash launch/train.sh', or say "
            f"that this is meant by CUDA_VISIBLE_DEVICES or --expect_world_size {len(ranks)}"
        )


def _list(hosts: Mapping[str, object]) -> str:
    return ", ".join([*list(hosts)[:4], *(["..."] if len(hosts) > 4 else [])])
