"""The ranks of a run: how they connect, and the few values they exchange on the host.

Host exchanges (counts, errors, scores) use a gloo group of their own, so that on GPUs they never
wait for the device.
"""

import functools
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch._C._distributed_c10d import Store

from vico.distributed import launcher_env, signals, topology
from vico.distributed.cores import bind_beside, pci_address
from vico.distributed.launcher_env import host_name
from vico.distributed.rendezvous import clone_store, hint_when_slow, rendezvous, use_loopback
from vico.distributed.watchdog import WAITING, Watchdog
from vico.errors import PeerLostError, UserError
from vico.io import log

TIMEOUT = timedelta(minutes=30)  # of every collective, unless --collective_timeout sets another


@dataclass(frozen=True)
class World:
    """This rank and its connection to the others. Methods that exchange values are collectives."""

    rank: int
    size: int
    device: torch.device
    host_group: Any  # a gloo process group, for tensors and objects on the host
    timeout: timedelta = TIMEOUT
    watchdog: Watchdog | None = None
    store: Store | None = None
    members: tuple[topology.Member, ...] = ()  # one per rank, the same on every rank

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_first_of_host(self) -> bool:
        """Whether this rank is the lowest of its host."""
        own = host_name()
        return self.rank == min((m.rank for m in self.members if m.host == own), default=0)

    @property
    def phase(self) -> str:
        """What this rank is doing, as last reported by `set_phase`."""
        return "starting" if self.watchdog is None else self.watchdog.phase

    def set_phase(self, phase: str) -> None:
        """Report progress to the watchdog: what this rank does from now on."""
        if self.watchdog is not None:
            self.watchdog.set_phase(phase)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Around every exchange: a rank that waits for others is not the one that is stuck."""
        phase = self.phase
        self.set_phase(WAITING + phase)
        yield
        self.set_phase(phase)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum of a host tensor over the ranks, in place."""
        with self._waiting():
            torch_dist.all_reduce(values, group=self.host_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """[ranks, ...]: the host tensor of every rank, in rank order."""
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        with self._waiting():
            torch_dist.all_gather(gathered, values, group=self.host_group)
        return torch.stack(gathered)

    def gather_objects(self, value: Any) -> list[Any]:
        """The (picklable) value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        with self._waiting():
            torch_dist.all_gather_object(gathered, value, group=self.host_group)
        return gathered

    def max(self, value: int) -> int:
        """The largest value of all ranks."""
        maximum = torch.tensor([value])
        with self._waiting():
            torch_dist.all_reduce(maximum, torch_dist.ReduceOp.MAX, group=self.host_group)
        return int(maximum)

    def raise_if_stopped(self, line: str) -> None:
        """Raise signals.Stopped with `line`, on all ranks, when one of them got a stop signal."""
        if stop_signal := self.max(signals.stop_requested()):
            raise signals.Stopped(stop_signal, line)

    def node_group(self) -> Any:
        """A new process group of this rank's node, for tensors on its device. A collective."""
        nodes = []
        for node in topology.by_node(self.members):
            nodes.append([member.rank for member in node])
        group, _ = torch_dist.new_subgroups_by_enumeration(nodes, timeout=self.timeout)
        return group

    def barrier(self) -> None:
        with self._waiting():
            torch_dist.barrier(group=self.host_group)

    def print_rank0(self, message: str) -> None:
        if self.is_main:
            log.info(message)

    @contextmanager
    def raise_together(self) -> Iterator[None]:
        """A UserError of any rank in the block is raised by all ranks at its end.

        Of several errors it is the lowest rank's. The block must not contain a collective, which
        the failed rank would miss.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as raised:
            error = raised
        for rank_error in self.gather_objects(error):
            if rank_error is not None:
                rank_error.of_all_ranks = True
                raise rank_error from None


def connect(
    timeout: timedelta = TIMEOUT,
    expected: int | None = None,
    hang_seconds: float | None = None,
    on_peer_exit: Callable[["World"], int] | None = None,
) -> World:
    """Join the process group that the launcher described; without a launcher, a group of one.

    `expected`: the number of ranks that the user asked for. `hang_seconds`: abort when any rank
    makes no progress for this long; None: wait. `on_peer_exit`: what the watchdog calls when a rank
    has exited and this one does not notice by itself; it returns the exit code. Raises UserError
    when the actual ranks differ from the requested ones; no group is made then.
    """
    if "RANK" not in os.environ:
        os.environ.update(launcher_env.SINGLE_RANK)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_ADDR", launcher_env.SINGLE_RANK["MASTER_ADDR"])
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = choose_device()
    prepare_deepspeed(device)
    own = topology.Member.of_this_process(rank, device)
    use_loopback()
    store, texts = rendezvous(rank, size, timeout, own.to_text())
    if device.type == "cuda":
        # DeepSpeed reads it as the device number. Until here it decided which rank prints.
        os.environ["LOCAL_RANK"] = str(device.index)
    members = tuple(topology.Member.from_text(text, other) for other, text in enumerate(texts))
    if rank == 0:
        log.fields({"world": topology.describe(members)})
    try:
        topology.check_topology(members, launcher_env.slurm_allocation(), expected)
    except UserError as error:
        error.of_all_ranks = True  # they check the same members
        raise
    world = World(rank, size, device, None, timeout, None, store, members)
    if hang_seconds is None:
        return replace(world, host_group=_init_process_groups(world))
    own_store = clone_store(store)
    watchdog = Watchdog(rank, members, own_store, hang_seconds)
    watchdog.set_phase("connecting the ranks")
    if on_peer_exit is not None:
        # By a store of its own: the main thread may be blocked in the other.
        seen_by_watchdog = replace(world, watchdog=watchdog, store=own_store)
        watchdog.on_peer_exit = functools.partial(on_peer_exit, seen_by_watchdog)
    try:
        host_group = _init_process_groups(world)
    except BaseException as error:
        watchdog.ignore_exits()
        watchdog.close()
        exited = watchdog.exited_ranks()
        if exited and isinstance(error, UserError):  # then no interface is to blame
            lost = f"{', '.join(exited)} exited while the ranks were connecting; see its log"
            raise PeerLostError(lost) from None
        raise
    watchdog.set_phase("starting")
    return replace(world, host_group=host_group, watchdog=watchdog)


def choose_device() -> torch.device:
    """The GPU of this rank, or the CPU.

    SLURM can show each task only its own GPU, whose index is then not the local rank: hence the
    modulo. `topology.check_topology` refuses ranks that share a GPU, unless the user wants that.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    if os.environ.get("VICO_NUMA") != "off":
        cores = bind_beside(pci_address(torch.cuda.get_device_properties(device)))
        if cores is not None and launcher_env.is_rank_0():
            log.fields({"cores": f"ranks keep to those beside their GPUs (rank 0: {cores})"})
    return device


def prepare_deepspeed(device: torch.device) -> None:
    # Without it DeepSpeed guesses the accelerator, and warns about that.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # DeepSpeed 0.19.8 calls functions that torch 2.13 renamed, and torch warns at every call.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    _disable_shm_op()


def _disable_shm_op() -> None:
    """Keep DeepSpeed from compiling its shared-memory all-reduce at the first start on a CPU.

    Only its inference engine uses that op. The build needs a compiler and up to 90 s, and a build
    that is killed leaves a lock on which every later start waits forever. To be removed when
    DeepSpeed builds the op at its first use.
    """
    import deepspeed.ops  # late: DS_ACCELERATOR and the warning filter are set before

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _init_process_groups(world: World) -> Any:
    """Make torch's default group, hand it to DeepSpeed, and return the gloo group of the hosts."""
    import deepspeed

    rank, size, device, timeout = world.rank, world.size, world.device, world.timeout
    backend = choose_backend(device, world.members)
    # As in DeepSpeed: a group that is bound to its device connects now, not at its first use.
    bound_device = device if backend == "nccl" and size > 1 else None
    with hint_when_slow(f"connecting the ranks over {backend}", rank):
        torch_dist.init_process_group(
            backend,
            store=world.store,
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=bound_device,
        )
        deepspeed.init_distributed(
            dist_backend=backend, auto_mpi_discovery=False, timeout=timeout, verbose=False
        )
        host_group = torch_dist.new_group(backend="gloo", timeout=timeout)
        _check_sum(rank, size, device)
    return host_group


def choose_backend(device: torch.device, members: Sequence[topology.Member]) -> str:
    """What carries tensors between the ranks' devices."""
    has_own_gpu = device.type == "cuda" and not topology.sharing_a_gpu(members)
    return "nccl" if has_own_gpu else "gloo"


def _check_sum(rank: int, size: int, device: torch.device) -> None:
    """One sum over the group that training uses: whether the values of all ranks arrive."""
    values = torch.tensor([rank + 1, 1], device=device)
    torch_dist.all_reduce(values)
    if values.tolist() != [size * (size + 1) // 2, size]:
        raise UserError(
            f"the sum over {size} ranks is {values.tolist()}: the ranks do not form one group; "
            "start all of them with one launcher"
        )


def set_collective_timeout(timeout: timedelta) -> None:
    """Give every process group this timeout, including those that DeepSpeed has made.

    DeepSpeed (0.19.8, utils/groups.py, _clone_world_group) ignores the timeout it was given, so its
    groups wait 30 minutes under gloo and 10 under NCCL. To be removed when DeepSpeed passes it on.
    The call is private to torch: where it is missing, the groups keep their defaults.
    """
    c10d = torch_dist.distributed_c10d
    set_timeout = getattr(c10d, "_set_pg_timeout", None)
    groups = getattr(getattr(c10d, "_world", None), "pg_map", None)
    if set_timeout is None or groups is None:
        warnings.warn(
            "this torch cannot change the timeout of DeepSpeed's process groups; they keep theirs",
            stacklevel=2,
        )
        return
    for group in list(groups):
        set_timeout(timeout, group)


def disconnect(world: World, together: bool = True) -> None:
    """Leave the group: a rank that destroys it while another still uses it aborts the other.

    `together` is False after an error: this rank, where it has others, then waits neither for them
    nor for the threads of a collective with a lost rank. The caller must end the process by
    os._exit (cli.main.console), as Python's own exit would wait for these threads, or abort in
    them. A group of one always ends here, so that its program can start another.
    """
    try:
        if together:
            world.barrier()
        if together or world.size == 1:
            import deepspeed.comm  # late, as above

            deepspeed.comm.destroy_process_group()  # and what DeepSpeed remembers of it
    except RuntimeError:  # a rank was lost after the end of the run: no result is lost
        pass
    finally:
        if world.watchdog is not None:
            world.watchdog.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
