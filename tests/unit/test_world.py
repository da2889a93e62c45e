"""What ranks exchange, here of one: values, errors, phases for the watchdog; and how it ends."""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as torch_dist

from vico.distributed import signals, world
from vico.distributed.launcher_env import host_name
from vico.distributed.topology import Member
from vico.distributed.watchdog import WAITING
from vico.distributed.world import World
from vico.errors import UserError


class Dog:
    """In the watchdog's place: the phases it is told."""

    def __init__(self) -> None:
        self.phase, self.seen = "step 3", list[str]()
        self.is_closed = False

    def set_phase(self, phase: str) -> None:
        self.seen.append(phase)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def dog() -> Dog:
    return Dog()


@pytest.fixture
def watched(alone: World, dog: Dog) -> World:
    return replace(alone, watchdog=dog)  # type: ignore[arg-type]


def test_values_of_one_rank(watched: World, dog: Dog) -> None:
    """They are its own. A rank that waits for others says so, and afterwards goes on."""
    values = torch.tensor([1.5, 2.5])
    assert watched.sum(values) is values and values.tolist() == [1.5, 2.5]
    assert watched.gather(values).tolist() == [[1.5, 2.5]]
    assert watched.max(-7) == -7 and type(watched.max(3)) is int
    watched.barrier()
    assert dog.seen == [f"{WAITING}step 3", "step 3"] * 5
    assert watched.gather_objects({"a": 1}) == [{"a": 1}]
    assert len(dog.seen) == 10, "nothing to wait for"


def test_phases(alone: World, watched: World, dog: Dog) -> None:
    assert (alone.phase, watched.phase) == ("starting", "step 3")
    alone.set_phase("ignored")
    watched.set_phase("saving")
    assert dog.seen == ["saving"]


def test_errors_are_of_all_ranks(alone: World) -> None:
    """Only those that a user can mend."""
    with alone.raise_together():
        pass
    error = UserError("bad file")
    with pytest.raises(UserError) as raised, alone.raise_together():
        raise error
    assert raised.value is error and error.of_all_ranks
    with pytest.raises(ZeroDivisionError), alone.raise_together():
        _ = 1 / 0


def test_a_stop_is_of_all_ranks(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    alone.raise_if_stopped("line")
    monkeypatch.setattr(signals, "_number", 15)
    with pytest.raises(signals.Stopped) as stopped:
        alone.raise_if_stopped("between two steps")
    assert (stopped.value.number, stopped.value.line) == (15, "between two steps")


def test_who_writes(alone: World, capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 prints; of each host its lowest rank keeps the cache."""
    hosts = ("other", host_name(), host_name())
    members = tuple(Member(i, host, "cpu", None, 0, True, 1) for i, host in enumerate(hosts))
    ranks = [replace(alone, rank=rank, members=members) for rank in range(3)]
    assert [rank.is_first_of_host for rank in ranks] == [False, True, False]
    assert [rank.is_main for rank in ranks] == [True, False, False]
    for rank in ranks:
        rank.print_rank0(f"by {rank.rank}")
    assert capsys.readouterr().out == "by 0\n"
    assert [replace(alone, rank=r, members=()).is_first_of_host for r in (0, 1)] == [True, False]


def test_the_group_of_a_node(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All nodes' groups are made by all ranks, with the run's timeout."""
    made: list[Any] = []

    def enumerate_groups(ranks: Any, timeout: Any) -> tuple[str, None]:
        made.append((ranks, timeout))
        return "own", None

    monkeypatch.setattr(torch_dist, "new_subgroups_by_enumeration", enumerate_groups)
    members = tuple(Member(i, f"n{i % 2}", "cpu", None, 0, True, 2) for i in range(4))
    minute = timedelta(minutes=1)
    assert replace(alone, members=members, timeout=minute).node_group() == "own"
    assert made == [([[0, 2], [1, 3]], minute)]
    assert timedelta(minutes=30) == world.TIMEOUT


def test_a_sum_over_the_ranks_of_a_group(alone: World) -> None:
    """1 + 2 + ... and the number of ranks; else they are several groups, as here of one each."""
    world._check_sum(0, 1, alone.device)
    for rank, size, found in ((0, 2, [1, 1]), (2, 1, [3, 1])):
        with pytest.raises(UserError) as refused:
            world._check_sum(rank, size, alone.device)
        assert str(refused.value) == (
            f"the sum over {size} ranks is {found}: the ranks do not form one group; start all of "
            "them with one launcher"
        )


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is done to leave the group."""
    import deepspeed.comm

    done: list[str] = []
    monkeypatch.setattr(deepspeed.comm, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(World, "barrier", lambda world: done.append("barrier"))
    yield done


@pytest.mark.parametrize(
    ("size", "together", "expected"),
    [
        (1, True, ["barrier", "destroyed"]),
        (2, True, ["barrier", "destroyed"]),
        (1, False, ["destroyed"]),
        (2, False, []),
    ],
)
def test_how_a_rank_leaves(
    size: int, together: bool, expected: list[str], watched: World, dog: Dog, left: list[str]
) -> None:
    """Together, or after an error alone, where it waits for nobody. No watchdog is left."""
    world.disconnect(replace(watched, size=size), together)
    assert left == expected and dog.is_closed


def test_a_rank_that_is_lost_at_the_end(
    watched: World, dog: Dog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No result is lost with it."""

    def lost(of: World) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(World, "barrier", lost)
    world.disconnect(watched)
    assert dog.is_closed


def test_timeouts_of_all_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that DeepSpeed has made too; a torch without the private call only warns."""
    set_to: list[tuple[Any, Any]] = []
    c10d: Any = torch_dist.distributed_c10d
    monkeypatch.setattr(c10d, "_set_pg_timeout", lambda *given: set_to.append(given))
    minute = timedelta(minutes=1)
    world.set_collective_timeout(minute)
    assert set_to == [(minute, group) for group in c10d._world.pg_map]
    for name in ("_set_pg_timeout", "_world"):
        with monkeypatch.context() as missing:
            missing.delattr(c10d, name)
            with pytest.warns(UserWarning, match="cannot change the timeout of DeepSpeed's"):
                world.set_collective_timeout(minute)


def test_the_device_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its local number; where it sees fewer GPUs than the host has, modulo these."""
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("VICO_NUMA", "off")
    for local_rank, index in (("0", 0), ("3", 3), ("6", 2), (None, 0)):
        monkeypatch.setenv("LOCAL_RANK", local_rank or "")
        if local_rank is None:
            monkeypatch.delenv("LOCAL_RANK")
        assert world.choose_device() == chosen.pop() == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert world.choose_device() == torch.device("cpu") and chosen == []


def test_a_free_port() -> None:
    port = world._free_port()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
    assert 1024 <= port < 65536


def test_what_deepspeed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device, unless the user says another; and not to compile an operator."""
    import deepspeed.ops

    monkeypatch.setattr(deepspeed.ops, "__compatible_ops__", {"deepspeed_shm_comm": True})
    monkeypatch.delenv("DS_ACCELERATOR")
    world.prepare_deepspeed(torch.device("cpu"))
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    world.prepare_deepspeed(torch.device("cuda"))
    assert os.environ["DS_ACCELERATOR"] == "cpu"
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
