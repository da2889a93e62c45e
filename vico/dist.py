"""The ranks of a run: who they are, and the few things they say to each other on the host.

Host talk (counts, errors, scores) goes over a gloo group of its own, so that on GPUs it never waits for the device.
"""

import gc
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor

from vico.errors import UserError

TIMEOUT = timedelta(minutes=30)  # for every collective; DeepSpeed's own default has changed between versions


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    host_group: Any  # gloo, for tensors and objects on the host

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum of a host tensor over the ranks."""
        torch_dist.all_reduce(values, group=self.host_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[ranks, ...]: every rank's host tensor, in the order of ranks."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        torch_dist.all_gather(found, values, group=self.host_group)
        return torch.stack(found)

    def barrier(self) -> None:
        torch_dist.barrier(group=self.host_group)

    def say(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """A UserError of any rank inside the block becomes every rank's, after the block: the lowest rank's is kept.

        No collective may run inside: the rank that failed would miss it.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as problem:
            error = problem
        errors: list[UserError | None] = [None] * self.size
        torch_dist.all_gather_object(errors, error, group=self.host_group)
        for found in errors:
            if found is not None:
                raise found from None


def connect() -> World:
    """Join the process group that the launcher described; alone, without a launcher, a group of one."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # else DeepSpeed guesses, and warns of its guess
    # DeepSpeed 0.19.8 calls names that torch 2.13 renamed; once per call is too often to be told.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    import deepspeed

    _build_no_op()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, timeout=TIMEOUT, verbose=False)
    host_group = torch_dist.new_group(backend="gloo", timeout=TIMEOUT)
    return World(torch_dist.get_rank(), torch_dist.get_world_size(), device, host_group)


def disconnect(world: World, together: bool = True) -> None:
    """Leave together: a rank that tears its group down while another still uses it aborts the other.

    Not `together`, after an error: nobody can be waited for. But the threads of the host talk must end before Python does,
    and they end when nothing holds their group: one that is still letting go of a message's tensors when Python ends
    aborts the process (torch 2.13; seen in one of ten starts on a busy machine).
    """
    gc.collect()  # an error, its frames and their world hold each other
    if together:
        world.barrier()
        torch_dist.destroy_process_group()
    else:
        torch_dist.destroy_process_group(world.host_group)


def _build_no_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce at the first CPU start.

    Only its inference engine calls that op. Building it takes a compiler and up to 90 s, and a build that is killed
    leaves a lock on which every later start waits for ever. Ends when DeepSpeed builds it on first use.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
