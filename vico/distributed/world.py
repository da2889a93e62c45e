"""The ranks of a run: how they rendezvous, who they are, and the few things they say to each other on the host.

Host talk (counts, errors, scores) goes over a gloo group of its own, so that on GPUs it never waits for the device.
"""

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
from torch._C._distributed_c10d import Store

from vico.distributed import launcher_env, topology
from vico.distributed.rendezvous import clone_store, hint_when_slow, rendezvous
from vico.distributed.watchdog import WAITING, Watchdog
from vico.errors import UserError

TIMEOUT = timedelta(minutes=30)  # for every collective, unless --collective_timeout says another


@dataclass(frozen=True)
class World:
    rank: int
    size: int
    device: torch.device
    host_group: Any  # gloo, for tensors and objects on the host
    timeout: timedelta = TIMEOUT
    watchdog: Watchdog | None = None
    store: Store | None = None
    members: tuple[
        topology.Member, ...
    ] = ()  # of all ranks, in their order; the same on every rank

    def set_phase(self, what: str) -> None:
        """Tell the watchdog that this rank has got on, and with what."""
        if self.watchdog is not None:
            self.watchdog.set_phase(what)

    @property
    def phase(self) -> str:
        """What this rank is doing, as far as it said."""
        return "starting" if self.watchdog is None else self.watchdog.phase

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around every exchange on the host: who waits in one is not the rank that does not get on."""
        phase = self.phase
        self.set_phase(WAITING + phase)
        yield
        self.set_phase(phase)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum of a host tensor over the ranks."""
        with self._waiting():
            torch_dist.all_reduce(values, group=self.host_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[ranks, ...]: every rank's host tensor, in the order of ranks."""
        found = [torch.empty_like(values) for _ in range(self.size)]
        with self._waiting():
            torch_dist.all_gather(found, values, group=self.host_group)
        return torch.stack(found)

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        held = torch.tensor([value])
        with self._waiting():
            torch_dist.all_reduce(held, torch_dist.ReduceOp.MAX, group=self.host_group)
        return int(held)

    def barrier(self) -> None:
        with self._waiting():
            torch_dist.barrier(group=self.host_group)

    def print_rank0(self, message: str) -> None:
        if self.is_main:
            print(message, flush=True)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A UserError of any rank inside the block becomes every rank's, after the block: the lowest rank's is kept.

        No collective may run inside: the rank that failed would miss it.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as problem:
            error = problem
        errors: list[UserError | None] = [None] * self.size
        with self._waiting():
            torch_dist.all_gather_object(errors, error, group=self.host_group)
        for found in errors:
            if found is not None:
                raise found from None


def connect(
    timeout: timedelta = TIMEOUT, expected: int | None = None, hang_seconds: float | None = None
) -> World:
    """Join the process group that the launcher described; alone, without a launcher, a group of one.

    `hang_seconds`: the run ends when a rank has not got on for so long (None: it waits).
    Raises UserError when the world is not the one it was given; no group is made then.
    """
    if "RANK" not in os.environ:
        os.environ.update(launcher_env.SINGLE_RANK)
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _choose_device()
    os.environ.setdefault(
        "DS_ACCELERATOR", device.type
    )  # else DeepSpeed guesses, and warns of its guess
    # DeepSpeed 0.19.8 calls names that torch 2.13 renamed; once per call is too often to be told.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    import deepspeed

    _disable_shm_op()
    store, words = rendezvous(
        rank, size, timeout, topology.Member.of_this_process(rank, device).to_text()
    )
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(
            device.index
        )  # DeepSpeed takes it for the number of the device; until here it said who speaks
    members = [topology.Member.from_text(text) for text in words]
    if rank == 0:
        print(topology.describe(members), flush=True)
    topology.check_topology(members, launcher_env.slurm_allocation(), expected)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with hint_when_slow(f"connecting the ranks over {backend}", rank):
        # As DeepSpeed would: a group that is bound to its device connects at once; alone there is nobody to reach.
        bound = device if device.type == "cuda" and size > 1 else None
        torch_dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=timeout, device_id=bound
        )
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
        host_group = torch_dist.new_group(backend="gloo", timeout=timeout)
        _check_sum(rank, size, device)
    watchdog = (
        None if hang_seconds is None else Watchdog(rank, members, clone_store(store), hang_seconds)
    )
    return World(rank, size, device, host_group, timeout, watchdog, store, tuple(members))


def _choose_device() -> torch.device:
    """This rank's GPU. SLURM can show each task its own alone, so that its number is not that of the rank on the host."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    device = torch.device(
        "cuda", local_rank % count
    )  # ranks that share a GPU are found, and named, by topology.check_topology
    torch.cuda.set_device(device)
    return device


def _check_sum(rank: int, size: int, device: torch.device) -> None:
    """One exchange over the group that training uses, before anything is read: whether all numbers arrive."""
    numbers = torch.tensor([rank + 1, 1], device=device)
    torch_dist.all_reduce(numbers)
    if numbers.tolist() != [size * (size + 1) // 2, size]:
        raise UserError(
            f"the sum over {size} ranks is {numbers.tolist()}: the ranks do not form one world; start them by one launcher"
        )


def set_collective_timeout(timeout: timedelta) -> None:
    """Give every process group this timeout, also those that DeepSpeed has made meanwhile.

    DeepSpeed (0.19.8, utils/groups.py, _clone_world_group) makes its groups without the timeout it was given, and those
    then wait 30 minutes under gloo and 10 under NCCL. Ends when DeepSpeed passes its timeout on. The call is torch's
    own and private, so that a torch without it must not end a run: the groups then keep their defaults.
    """
    c10d = torch_dist.distributed_c10d
    set_timeout = getattr(c10d, "_set_pg_timeout", None)
    groups = getattr(getattr(c10d, "_world", None), "pg_map", None)
    if set_timeout is None or groups is None:
        warnings.warn(
            "this torch lets nobody change the timeout of DeepSpeed's process groups; they keep their own",
            stacklevel=2,
        )
        return
    for group in list(groups):
        set_timeout(timeout, group)


def disconnect(world: World, together: bool = True) -> None:
    """Leave together: a rank that tears its group down while another still uses it aborts the other.

    Not `together`, after an error: nobody can be waited for, nor for the threads of an exchange with a rank that is lost. The
    caller then ends the process without Python's own end (cli.console), where such threads abort it or are waited for for ever.
    """
    try:
        if together:
            world.barrier()
            torch_dist.destroy_process_group()
    except RuntimeError:  # a rank was lost behind the run's end: nothing is lost with it
        pass
    finally:
        if world.watchdog is not None:
            world.watchdog.close()


def _disable_shm_op() -> None:
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
