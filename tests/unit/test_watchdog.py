"""What ranks tell each other through the store: how much, and what of it is believed."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from support.errors import refusal
from support.processes import free_port, run_command, start_command
from vico.cli.exit_cause import Cause
from vico.distributed import launcher_env
from vico.distributed.rendezvous import clone_store
from vico.distributed.store_words import MAX_WORD_BYTES, read_word
from vico.distributed.topology import Member, machine_id
from vico.distributed.watchdog import Watchdog, _Heartbeat, _Peer

BEAT = {"tick": 3, "idle_seconds": 0.5, "phase": "batch 3"}
CAUSE = Cause("host", "out of memory", 4, 17, "machine")
NOT_BEATS = [
    b"",
    b"\xff\xfe",
    b"null",
    b"[]",
    b"[" * 50_000,
    b"9" * 5_000,
    json.dumps(BEAT | {"pid": 1}).encode(),
    json.dumps({"tick": 3}).encode(),
    json.dumps(BEAT | {"tick": True}).encode(),
    json.dumps(BEAT | {"tick": "3"}).encode(),
    json.dumps(BEAT | {"tick": 10**400}).encode(),
    json.dumps(BEAT | {"idle_seconds": float("nan")}).encode(),
    json.dumps(BEAT | {"idle_seconds": -1.0}).encode(),
    json.dumps(BEAT | {"phase": "x\n\x1b[2Jvico: error: forged"}).encode(),
    json.dumps(BEAT | {"phase": "x" * MAX_WORD_BYTES}).encode(),
]


class CountingStore:
    """A store that counts the requests to it, by kind."""

    def __init__(self, store: TCPStore) -> None:
        self._store, self.requests = store, Counter[str]()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        request: Callable[..., Any] = getattr(self._store, name)

        def call(*arguments: Any) -> Any:
            self.requests[name] += 1
            return request(*arguments)

        return call


@pytest.fixture
def store() -> TCPStore:
    timeout = timedelta(seconds=20)
    return TCPStore("127.0.0.1", free_port(), 1, True, timeout, False)


def members(count: int) -> list[Member]:
    own = Member.of_this_process(0, torch.device("cpu"))
    return [replace(own, rank=rank) for rank in range(count)]


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for child in started:
        child.kill()
        child.communicate()


def test_requests_do_not_grow_with_the_square_of_ranks(store: TCPStore) -> None:
    """64 ranks that make progress send two requests each; one that is silent sends two more."""
    stores = [CountingStore(store) for _ in range(64)]
    dogs = [Watchdog(n, members(64), stores[n], 600) for n in range(64)]  # type: ignore[arg-type]
    try:
        deadline = time.monotonic() + 20
        while (
            not all(counting.requests["check"] for counting in stores)
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        assert all(counting.requests == {"set": 1, "check": 1} for counting in stores)
        dogs[5]._read_heartbeats()
        assert stores[5].requests == {"set": 1, "check": 2, "multi_get": 1}
        assert [beat.tick for beat in dogs[5]._heartbeats.values()] == [1] * 64
        store.delete_key("watchdog 7")  # a rank that was lost before its first heartbeat
        dogs[5]._read_heartbeats()
        assert stores[5].requests["multi_get"] == 2
    finally:
        for dog in dogs:
            dog.close()


def test_a_silent_rank_reads_the_others_in_time(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 stops sending before rank 0 falls silent; at the timeout rank 0 knows which it is."""
    ended = threading.Event()
    monkeypatch.setattr(Watchdog, "_abort", lambda dog: ended.set())
    dog = Watchdog(0, members(3), store, 6.0)
    try:
        begin = time.monotonic()
        while not ended.wait(0.2):
            tick = int(10 * (time.monotonic() - begin))
            store.set("watchdog 2", json.dumps(BEAT | {"tick": tick}))
            store.set("watchdog 1", json.dumps(BEAT))
        assert dog._silent_ranks() == {1}
        assert "rank 1 on" in dog.verdict({1}) and "is not responding" in dog.verdict({1})
    finally:
        dog.close()


def test_an_exit_on_another_host_ends_this_rank(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank of that host tells it. A save is not cut off."""
    ended = threading.Event()
    monkeypatch.setattr(Watchdog, "_end_after_exit", lambda dog: ended.set())
    monkeypatch.setattr("vico.distributed.watchdog.SECONDS_AFTER_EXIT", 0.1)
    dog = Watchdog(0, members(2), store, 6.0)
    try:
        dog.set_phase("saving step 3")
        store.set("watchdog exited", "")
        assert not ended.wait(2.0)
        dog.set_phase("batch 4")
        assert ended.wait(2.0)
    finally:
        dog.close()


SUSPENDED = """
import sys, time
from datetime import timedelta
import torch
from torch._C._distributed_c10d import TCPStore
from vico.distributed.topology import Member
from vico.distributed.watchdog import Watchdog
store = TCPStore("127.0.0.1", int(sys.argv[1]), 1, True, timedelta(seconds=20), False)
Watchdog(0, [Member.of_this_process(0, torch.device("cpu"))], store, 2.0)
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    time.sleep(0.1)
print("done", flush=True)
"""


def test_time_that_nobody_ran_does_not_count() -> None:
    """A process that is suspended for longer than --hang_timeout goes on; one that waits ends."""
    python = [sys.executable, "-c", SUSPENDED, str(free_port())]
    run = start_command([*python, "10"])
    assert run.wait_until(lambda: "ready" in run.output, 60)
    run.processes[0].send_signal(signal.SIGSTOP)
    time.sleep(3)
    run.processes[0].send_signal(signal.SIGCONT)
    run.wait(60)
    assert run.codes == [0] and "done" in run.output, run.output
    stuck = start_command([*python, "100"])
    assert stuck.wait(60) == [5] and "nothing has moved for 2 s" in stuck.output, stuck.output


HANGS_AT_ITS_END = """
import sys, time
import torch
from torch._C._distributed_c10d import HashStore
from vico.distributed import watchdog
from vico.distributed.topology import Member
watchdog.MAX_REPORT_SECONDS = 0.2
members = [Member.of_this_process(0, torch.device("cpu"))]
dog = watchdog.Watchdog(0, members, HashStore(), 600)
dog.on_hang = dog.on_peer_exit = lambda: time.sleep(100)
getattr(dog, sys.argv[1])()
"""


@pytest.mark.parametrize("end", ["_abort", "_end_after_exit"])
def test_a_report_that_hangs_ends_too(end: str) -> None:
    """The store or the file system does not answer, and nothing else would end the rank."""
    run = run_command([sys.executable, "-c", HANGS_AT_ITS_END, end], seconds=60)
    assert run.codes == [5], run.output


CTRL_C = """
import threading
from vico.cli.flags import CommandLine
from vico.cli.with_world import with_world
from vico.distributed import launcher_env

def work(world):
    raise KeyboardInterrupt

launcher_env.set_rank_variables()
try:
    with_world(CommandLine({"hang_timeout": 0.1}, (), False), work)
except KeyboardInterrupt:
    for thread in threading.enumerate():
        if "watchdog" in thread.name:
            thread.join(30)
    print("nothing is left", flush=True)
"""


def test_no_watchdog_outlives_a_call() -> None:
    """A notebook's Ctrl-C: it would end the notebook after --hang_timeout, which is 6 s here."""
    run = run_command([sys.executable, "-c", CTRL_C], seconds=60)
    assert "nothing is left" in run.output, run.output


@pytest.mark.parametrize("word", NOT_BEATS)
def test_a_hostile_word_is_no_heartbeat(word: bytes, store: TCPStore) -> None:
    """It changes nothing, and raises nothing."""
    assert read_word(_Heartbeat, word) is None
    dog = Watchdog(0, members(2), clone_store(store), 600)
    try:
        store.wait(["watchdog 0"])  # its own first one, over its own connection
        store.set("watchdog 0", json.dumps(BEAT))
        store.set("watchdog 1", word)
        dog._read_heartbeats()
        assert dog._heartbeats[1] == _Heartbeat(0, 0.0, "starting")
        assert asdict(dog._heartbeats[0]) == BEAT
    finally:
        dog.close()


def test_a_cause_ends_no_run_with_success() -> None:
    assert read_word(Cause, json.dumps(asdict(CAUSE))) == CAUSE
    for code in (0, 75, 130, 7, "4", None):
        assert read_word(Cause, json.dumps(asdict(CAUSE) | {"code": code})) is None


def test_a_word_that_is_no_member_is_refused() -> None:
    own = members(1)[0]
    assert Member.from_text(own.to_text(), 0) == own
    for word in (b"\xff", b"{}", own.to_text().replace('"rank": 0', '"rank": 1')):
        message = refusal(lambda word=word: Member.from_text(word, 0))
        assert "what rank 0 published" in message and "MASTER_PORT" in message


def start_sleeper(**environment: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, **environment})
    assert child.stdout is not None and child.stdout.readline()
    return child


def test_only_a_rank_of_this_run_is_killed(
    children: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process number from the store is a claim; the process itself must show what it is."""
    for name, value in {"MASTER_ADDR": "h", "MASTER_PORT": "29500", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    rank_1, rank_0 = start_sleeper(RANK="1"), start_sleeper(RANK="0")
    of_another_run = start_sleeper(RANK="1", MASTER_PORT="29501")
    innocent = start_sleeper()
    children += [rank_1, rank_0, of_another_run, innocent]
    claim = replace(members(2)[1], pid=rank_1.pid)
    for child in (rank_0, of_another_run, innocent):
        peer = _Peer.of(replace(claim, pid=child.pid))
        peer.kill()
        assert peer.process is None and not peer.has_exited()
    # A container of the same host name numbers its processes from 1, as this one does.
    elsewhere = _Peer.of(replace(claim, machine="another"))
    elsewhere.kill()
    assert elsewhere.host == claim.host and elsewhere.process is None
    assert [child.poll() for child in children] == [None] * 4
    peer = _Peer.of(claim)
    assert not peer.has_exited()
    peer.kill()
    assert rank_1.wait(10) == -9 and peer.has_exited()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "gpu7", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": "gpu7", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}, True),
        ({"MASTER_ADDR": "gpu7", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "gpu7", "WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "localhost", "WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "localhost", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}, False),
        ({"MASTER_ADDR": "localhost", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, True),
    ],
)
def test_one_host(environment: dict[str, str], expected: bool) -> None:
    assert launcher_env.is_on_one_host(environment) == expected


def test_machine_is_not_the_name_of_the_host() -> None:
    assert machine_id() == machine_id() and machine_id() != socket.gethostname()
