"""Which rank says why a run ended, after how long, and with which exit code.

The table of vico/cli/exit_cause.py, row by row, without a process that ends.
"""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed import DistError, HashStore

from vico.checkpoint import restart_limit
from vico.cli import exit_cause
from vico.cli.exit_cause import CAUSE_SECONDS, EXIT_SECONDS, KEY, LINGER_SECONDS, report
from vico.distributed.topology import machine_id
from vico.distributed.world import World
from vico.errors import CheckpointError, TrainingError, UserError

CPU = torch.device("cpu")
LOST = RuntimeError("Connection closed by peer [127.0.0.1]:1234")
HOST = socket.gethostname()


class Ended:
    """What `report` has slept for, said and counted, in its order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.events: list[Any] = []
        self._capfd = capfd
        monkeypatch.setattr(exit_cause.time, "sleep", self._note)
        monkeypatch.setattr(restart_limit, "record_failure", lambda: self._note("counted"))

    def _note(self, event: Any) -> None:
        self._note_output()
        self.events.append(event)

    def _note_output(self) -> None:
        self.events += self._capfd.readouterr().err.splitlines()

    def by(self, world: World, error: Exception, debug: bool = False) -> int:
        self.events.clear()
        code = report(world, error, debug)
        self._note_output()
        return code


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ended:
    return Ended(monkeypatch, capfd)


def watched(exited: tuple[str, ...] = (), speaks: bool = False) -> Any:
    return SimpleNamespace(
        phase="in step 7", exited_ranks=lambda: list(exited), speaks_for_host=lambda: speaks
    )


def ranks(size: int, **given: Any) -> list[World]:
    store = HashStore()
    return [World(rank, size, CPU, None, store=store, **given) for rank in range(size)]


def published(world: World) -> dict[str, Any]:
    assert world.store is not None
    content: dict[str, Any] = json.loads(world.store.get(KEY))
    return content


def publish(world: World, **others: Any) -> None:
    """A cause, of another host unless it is said otherwise."""
    cause = {"host": "far", "line": "it broke", "code": 4, "pid": 1, "machine": "other"}
    assert world.store is not None
    world.store.set(KEY, json.dumps(cause | others))


# This rank failed


def test_an_error_of_bad_input(ended: Ended) -> None:
    """Rank 0 goes first, and stays for the others; who comes later with the same says nothing."""
    first, second, third = ranks(3)
    error = CheckpointError("bad; mend it")
    said = "vico: error: bad; mend it"
    assert ended.by(first, error) == 3
    assert ended.events == ["counted", said, LINGER_SECONDS]
    own = {"line": "bad; mend it", "code": 3, "host": HOST, "machine": machine_id()}
    assert published(first) == {**own, "pid": os.getpid()}
    publish(first, **{**own, "pid": 1})
    assert ended.by(second, error) == 3 and ended.events == [EXIT_SECONDS, "counted"]
    assert ended.by(third, UserError("other")) == 2
    assert ended.events == [EXIT_SECONDS, "counted", "vico: error: other"]
    publish(first, **{**own, "pid": 1, "machine": "other"})
    assert ended.by(second, error) == 3 and ended.events == [EXIT_SECONDS, "counted", said]


def test_an_error_of_bad_input_in_full(ended: Ended) -> None:
    """A lone rank waits for nobody. --debug shows the traceback before it."""
    (alone,) = ranks(1)
    error = UserError("bad", [("a", "b")])
    assert ended.by(alone, error) == 2
    assert ended.events == ["counted", "vico: error: bad", "  a  b"]
    assert ended.by(replace(alone, store=None), error, debug=True) == 2
    assert ended.events[0] == "counted" and ended.events[-2:] == ["vico: error: bad", "  a  b"]
    assert any("UserError: bad" in str(event) for event in ended.events[1:-2])


def test_a_bug(ended: Ended) -> None:
    """Its traceback at once; others say where it is."""
    first, second = ranks(2, watchdog=watched())
    assert ended.by(second, ZeroDivisionError("a\nb")) == 1
    assert ended.events == ["ZeroDivisionError: a", "b", "counted"]
    line = "rank 1 failed with ZeroDivisionError: a; its traceback is in its log"
    assert (published(first)["line"], published(first)["code"]) == (line, 1)
    assert ended.by(first, ZeroDivisionError("a")) == 1
    assert ended.events == ["ZeroDivisionError: a", "counted", LINGER_SECONDS]


def test_a_known_cause(ended: Ended) -> None:
    """Said at once by each rank that has it; what a whole host has, once per host."""
    first, second = ranks(2, watchdog=watched())
    assert ended.by(second, MemoryError()) == 4
    counted, line = ended.events
    assert counted == "counted"
    assert line.startswith(f"vico: error: rank 1 on {HOST} is out of host memory while in step 7")
    assert published(first)["line"] == line.removeprefix("vico: error: ")
    assert ended.by(first, MemoryError()) == 4
    assert ended.events[2] == LINGER_SECONDS and "rank 0 on" in ended.events[1]
    full = OSError(28, "No space left", "/dev/shm")
    for other, is_said in (({"pid": 1}, False), ({"pid": 1, "machine": "other"}, True)):
        assert first.store is not None
        first.store.set(KEY, "")
        assert ended.by(second, full) == 4
        counted, said = ended.events
        assert said.startswith(f"vico: error: /dev/shm of {HOST} has no room")
        publish(first, **{**published(first), **other})
        assert ended.by(second, full) == 4
        assert ended.events == (["counted", said] if is_said else ["counted"])


class GoneStore:
    """Of rank 0, which has ended."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise RuntimeError("Connection reset by peer")


def test_a_cause_that_cannot_be_published(ended: Ended) -> None:
    gone: Any = GoneStore()
    world = replace(ranks(2)[1], store=gone)
    assert ended.by(world, TrainingError("it")) == 4
    assert ended.events == [EXIT_SECONDS, "counted", "vico: error: it"]


# Another rank was lost

WAITS = [EXIT_SECONDS, CAUSE_SECONDS - EXIT_SECONDS]
HINT = f"see the lines above, or the log of that rank; {exit_cause.RESUME_HINT}"


def test_what_is_a_lost_rank() -> None:
    assert exit_cause.is_lost_peer(DistError("any"))
    for words in exit_cause.LOST_PEER_SIGNS:
        assert exit_cause.is_lost_peer(RuntimeError(f"a {words} b"))
        assert not exit_cause.is_lost_peer(ValueError(words))
    assert not exit_cause.is_lost_peer(RuntimeError("shape"))


def test_a_cause_that_another_rank_has_published(ended: Ended) -> None:
    """Rank 0 names it with its host, if the host is another; all end with its code."""
    first, second = ranks(2, watchdog=watched(("rank 1",), speaks=True))
    publish(first)
    assert ended.by(first, LOST) == 4
    assert ended.events == [*WAITS, "vico: error: far: it broke", LINGER_SECONDS]
    assert ended.by(second, LOST) == 4 and ended.events == WAITS
    publish(first, machine=machine_id(), code=6)
    assert ended.by(first, LOST) == 6 and ended.events == [*WAITS, LINGER_SECONDS]
    assert exit_cause.on_peer_exit(first) == 6


def test_no_cause_is_published(ended: Ended) -> None:
    first, second = ranks(2, watchdog=watched(("rank 1", "rank 3"), speaks=True))
    line = f"vico: error: rank 1, rank 3 exited while in step 7, which ends this run; {HINT}"
    assert ended.by(first, LOST) == 5 and ended.events == [*WAITS, line, LINGER_SECONDS]
    assert ended.by(second, LOST) == 5 and ended.events == WAITS
    unwatched = replace(first, watchdog=None)
    line = f"vico: error: a peer rank exited while starting, which ends this run; {HINT}"
    assert ended.by(unwatched, LOST) == 5 and ended.events == [*WAITS, line, LINGER_SECONDS]


def test_ranks_that_exit_while_one_waits(ended: Ended) -> None:
    """Asked again where none was seen at first."""
    answers = [[], ["rank 1"]]
    watchdog = watched()
    watchdog.exited_ranks = lambda: answers.pop(0)
    assert ended.by(ranks(2, watchdog=watchdog)[0], LOST) == 5
    assert ended.events[2].startswith("vico: error: rank 1 exited while in step 7") and not answers


@pytest.mark.parametrize("speaks", [True, False])
def test_rank_0_is_gone(ended: Ended, speaks: bool) -> None:
    """The lowest rank left on its host speaks, and stays."""
    gone: Any = GoneStore()
    watchdog = watched(("rank 0",), speaks)
    world = World(1, 3, CPU, None, store=gone, watchdog=watchdog)
    line = f"vico: error: rank 0 exited while in step 7, which ends this run; {HINT}"
    assert ended.by(world, LOST) == 5
    assert ended.events == ([*WAITS, line, LINGER_SECONDS] if speaks else WAITS)
    assert ended.by(replace(world, watchdog=None), LOST) == 5
    assert ended.events[2].startswith("vico: error: a peer rank exited while starting")


def test_debug_shows_a_lost_rank_as_it_is(ended: Ended) -> None:
    (alone,) = ranks(1)
    assert ended.by(alone, LOST, debug=True) == 1
    assert any("RuntimeError: Connection closed by peer" in str(e) for e in ended.events)


def test_how_long_ranks_wait() -> None:
    """As the table says; the cause is there before the others look for it."""
    assert (EXIT_SECONDS, CAUSE_SECONDS, LINGER_SECONDS) == (0.7, 2.0, 3.0)
    assert exit_cause.WORKER_EXIT_SECONDS == 1.0
