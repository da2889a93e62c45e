"""What the rendezvous says and believes, by a store in this process; and who speaks to whom."""

import json
import os
import signal
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from vico.distributed import rendezvous, signals, store_words, watchdog
from vico.distributed.store_words import read_word
from vico.distributed.topology import Member
from vico.distributed.watchdog import (
    SAVING,
    SECONDS_AFTER_EXIT,
    WAITING,
    Watchdog,
    _Heartbeat,
)
from vico.errors import StartFailedError, UserError

MEMBER = Member.of_this_process(0, torch.device("cpu"))
CHECK_PROGRESS = Watchdog._check_progress  # which the fixture `dog` switches off


def test_missing_ranks_in_words() -> None:
    """All of them up to eight; of more the first eight, and their number."""

    def said(size: int, *joined: int) -> str:
        store = HashStore()
        keys = [f"rank {rank}" for rank in range(size)]
        for rank in joined:
            store.set(keys[rank], "")
        return rendezvous._missing_ranks(store, keys)

    assert said(4, 0, 1, 2) == "rank 3 of 4"
    assert said(4, 0, 2) == "ranks 1, 3 of 4"
    assert said(9, 0) == "ranks 1, 2, 3, 4, 5, 6, 7, 8 of 9"
    assert said(10, 0) == "ranks 1, 2, 3, 4, 5, 6, 7, 8, ... of 10 (9 in all)"


def test_durations_and_first_lines() -> None:
    seconds = {0.5: "0.5 s", 59: "59 s", 60: "1 min", 90: "1.5 min", 1800: "30 min"}
    for number, said in seconds.items():
        assert rendezvous._format_duration(timedelta(seconds=number)) == said
    lines = [rendezvous.first_line(ValueError(text)) for text in ("\n a \nb", "", " ")]
    assert lines == ["a ", "ValueError", "ValueError"]


def test_the_address_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one host that of its loopback interface, which no other host reaches."""
    for size, local_size, address in ((2, 2, "127.0.0.1"), (2, 1, "gpu07"), (1, 1, "127.0.0.1")):
        monkeypatch.setenv("MASTER_ADDR", "gpu07")
        monkeypatch.setenv("MASTER_PORT", "29400")
        monkeypatch.setenv("WORLD_SIZE", str(size))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
        assert rendezvous._master() == (address, 29400)
        assert rendezvous._address() == f"{address}:29400"
        for name in rendezvous.INTERFACE_VARIABLES:
            monkeypatch.delenv(name, raising=False)
        rendezvous.use_loopback()
        found = [os.environ.get(name) for name in rendezvous.INTERFACE_VARIABLES]
        assert found == (["lo", "lo"] if address == "127.0.0.1" else [None, None])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    rendezvous.use_loopback()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth0", "the user's choice"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME"), monkeypatch.delenv("NCCL_SOCKET_IFNAME")


def test_the_failure_of_another_rank() -> None:
    """Is told with its host, and confirmed; a word that is no rank's counts as one of rank 0."""
    store = HashStore()
    rendezvous._raise_failure(store, 1, 2)
    word = {"rank": 3, "host": "gpu9", "line": "no such file", "code": 2}
    for text, expected in (
        (json.dumps(word), ("rank 3 on gpu9: no such file", "gpu9", 2)),
        (
            json.dumps(word | {"code": 77}),
            ("rank 0 on unknown: its word cannot be read; see its log", "unknown", 1),
        ),
    ):
        store.set(rendezvous.FAILURE, text)
        with pytest.raises(StartFailedError) as failed:
            rendezvous._raise_failure(store, 1, 2)
        error = failed.value
        assert str(error).startswith(expected[0]) and error.exit_code == expected[2]
        assert store.check(["rank 1 done"]) and not store.check(["rank 0 done"])


def test_a_stop_before_the_ranks_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    rendezvous._raise_if_stop_requested()
    monkeypatch.setattr(signals, "_number", signal.SIGUSR1)
    with pytest.raises(signals.Stopped) as stopped:
        rendezvous._raise_if_stop_requested()
    assert stopped.value.line == (
        "stopped by SIGUSR1 before the rendezvous; rerun the same command to start"
    )
    assert (stopped.value.number, stopped.value.exit_code) == (signal.SIGUSR1, 75)
    assert signals.Stopped(signal.SIGINT, "").exit_code == 130


def test_a_call_that_lasts_is_paced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it returns or raises is passed on; a pause may give up."""
    monkeypatch.setattr(rendezvous, "POLL_SECONDS", 0.01)
    pauses: list[int] = []

    def pause() -> None:
        pauses.append(1)
        time.sleep(0.01)

    def slow() -> str:
        time.sleep(0.1)
        return "done"

    assert rendezvous._call_in_thread(slow, pause) == "done" and pauses
    pauses.clear()
    assert rendezvous._call_in_thread(lambda: 7, pause) == 7 and not pauses

    def gives_up() -> None:
        raise UserError("enough")

    with pytest.raises(UserError, match="enough"):
        rendezvous._call_in_thread(lambda: time.sleep(0.2), gives_up)
    with pytest.raises(ZeroDivisionError):
        rendezvous._call_in_thread(lambda: 1 / 0, pause)


def test_a_hint_where_connecting_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By rank 0 alone; and with the error of a collective."""
    monkeypatch.setattr(rendezvous, "SILENT_SECONDS", 0.05)
    for rank in (1, 0):
        with rendezvous.hint_when_slow("connecting", rank):
            time.sleep(0.15)
        said = capsys.readouterr().err
        assert ("connecting takes more than 0 s; if it does not end, name the" in said) == (
            rank == 0
        )
    with pytest.raises(UserError) as failed, rendezvous.hint_when_slow("connecting", 0):
        raise RuntimeError("no route\nframe 7")
    assert "connecting failed on " in str(failed.value) and "(no route); name" in str(failed.value)
    time.sleep(0.1)
    assert capsys.readouterr().err == "", "it has ended"


# ---- words of the store --------------------------------------------------------------------------


def test_the_bounds_of_words() -> None:
    """Numbers below 2^63, of their type; a word of 64 KiB at most."""
    beat = {"tick": 0, "idle_seconds": 0.0, "phase": "p"}

    def read(**changes: Any) -> Any:
        return read_word(_Heartbeat, json.dumps(beat | changes))

    assert read() == _Heartbeat(0, 0.0, "p") and read(tick=2**63 - 1).tick == 2**63 - 1
    assert [read(tick=2**63), read(tick=-1), read(idle_seconds=1), read(phase=None)] == [None] * 4
    frame = len(json.dumps(beat)) - 1
    longest = store_words.MAX_WORD_BYTES - frame
    assert longest == 65536 - frame
    assert read(phase="x" * longest) is not None and read(phase="x" * (longest + 1)) is None


# ---- the watchdog's report -----------------------------------------------------------------------


@pytest.fixture
def dog(monkeypatch: pytest.MonkeyPatch) -> Watchdog:
    """Of rank 1 of four, whose threads do nothing, on one host."""
    monkeypatch.setattr(Watchdog, "_exchange_heartbeats", lambda dog: None)
    monkeypatch.setattr(Watchdog, "_check_progress", lambda dog: None)
    monkeypatch.setattr(watchdog, "_process_of", lambda member: None)
    members = [replace(MEMBER, rank=rank, host=f"n{rank}", pid=40 + rank) for rank in range(4)]
    monkeypatch.setattr(watchdog, "_has_ended", lambda pid: False)
    return Watchdog(1, members, HashStore(), 80.0)


def test_who_is_to_blame(dog: Watchdog) -> None:
    """Silent ranks, else those that do not wait for others, else nobody."""
    phases = [WAITING + "step 3", "batch 4", WAITING + "step 3", WAITING + "step 3"]
    for rank, phase in enumerate(phases):
        dog._heartbeats[rank] = _Heartbeat(9, 7.6, phase)
    reports = [f"rank {rank} (n{rank}): {phase}, for 8 s" for rank, phase in enumerate(phases)]
    end = (
        f"; last reports: {'; '.join(reports)}; stacks are above; rerun the same command to "
        "resume from the latest checkpoint"
    )
    begin = "nothing has moved for 80 s (--hang_timeout): "
    names = [f"rank {rank} on n{rank} (process {40 + rank})" for rank in range(4)]
    assert dog.verdict({2}) == f"{begin}{names[2]} is not responding{end}"
    assert dog.verdict({3, 0}) == f"{begin}{names[0]}, {names[3]} are not responding{end}"
    stuck = f"{names[1]} is stuck; all other ranks are waiting for it"
    assert dog.verdict(set()) == f"{begin}{stuck}{end}"
    dog._heartbeats[2] = _Heartbeat(9, 1.0, "batch 4")
    stuck = f"{names[1]}, {names[2]} are stuck; all other ranks are waiting for them; last reports"
    assert stuck in dog.verdict(set())
    for phase in ("batch 4", WAITING + "step 3"):
        for rank in range(4):
            dog._heartbeats[rank] = _Heartbeat(9, 1.0, phase)
        assert f"{begin}every process runs, but none makes progress; last" in dog.verdict(set())


def test_which_ranks_are_silent(dog: Watchdog) -> None:
    """Those whose heartbeats have not changed for three intervals and a second; never itself."""
    assert dog._interval == 5.0, "an eighth of the limit, 5 s at most"
    dog._run_seconds = dog._last_exchange = 100.0
    dog._last_change = {0: 84.0, 1: 0.0, 2: 83.9, 3: 90.0}
    assert dog._silent_ranks() == {2}
    dog._last_exchange = 84.0
    assert dog._silent_ranks() == {2}
    dog._last_exchange = 83.9
    assert dog._silent_ranks() == {0}, "rank 0's store does not answer"
    dog._rank = 0
    assert dog._silent_ranks() == {1, 2}


def test_time_of_a_suspension_does_not_count(
    dog: Watchdog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a long pause one interval counts."""
    times = iter([10.0, 12.0, 100.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    dog._looked_at, dog._run_seconds = 9.0, 0.0
    seconds = []
    for _ in range(3):
        dog._count_run_seconds()
        seconds.append(dog._run_seconds)
    assert seconds == [1.0, 3.0, 8.0]


def test_phases_are_those_before_a_wait(dog: Watchdog) -> None:
    dog._run_seconds = 3.0
    dog.set_phase(WAITING + "step 3")
    assert (dog.phase, dog._phase, dog._phase_since) == ("step 3", f"{WAITING}step 3", 3.0)
    assert dog._current_phase() == f"{WAITING}step 3"
    dog.set_phase("step 4")
    assert dog._current_phase() == "step 4" and dog.exited_ranks() == []


def test_what_a_slow_rank_reads(dog: Watchdog) -> None:
    """A tick that is new counts as a change; what is no heartbeat is as nothing."""
    for rank, word in ((0, '{"tick": 2, "idle_seconds": 1.0, "phase": "a"}'), (2, "x")):
        dog._store.set(f"watchdog {rank}", word)
    dog._run_seconds = 6.0
    dog._read_heartbeats()
    assert dog._heartbeats[0] == _Heartbeat(2, 1.0, "a")
    assert dog._last_change == {0: 6.0, 1: 0.0, 2: 0.0, 3: 0.0}
    dog._run_seconds = 9.0
    dog._read_heartbeats()
    assert dog._last_change[0] == 6.0 and dog._heartbeats[2] == _Heartbeat(0, 0.0, "starting")


def test_who_speaks_for_a_host(dog: Watchdog) -> None:
    """The lowest rank of it that still runs, rank 0 not counted; others are not seen."""

    class Peer:
        def __init__(self, exited: bool, process: Any = 1) -> None:
            self.exited, self.process = exited, process

        def has_exited(self) -> bool:
            return self.exited

    dog._rank = 3
    for lower, speaks in (
        ({0: Peer(False), 1: Peer(True), 2: Peer(True)}, True),
        ({0: Peer(True), 1: Peer(True), 2: Peer(False)}, False),
        ({0: Peer(True), 1: Peer(False, None), 2: Peer(True)}, True),
    ):
        dog._peers = {**lower, 3: Peer(False), 4: Peer(False)}  # type: ignore[dict-item]
        assert dog.speaks_for_host() == speaks


def test_a_rank_hears_of_exits(dog: Watchdog, tmp_path: Path) -> None:
    dog._exchange_exits()
    assert not dog._hears_of_exit
    dog._store.set("watchdog exited", "")
    dog._exchange_exits()
    assert dog._hears_of_exit


def test_an_exit_is_given_seconds(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> None:
    """From when it was seen: the main thread may notice it by itself. A save ends first."""

    class EndedError(Exception):
        pass

    def look() -> None:
        dog._run_seconds += 1
        if dog._run_seconds == 60:
            dog.set_phase("step 4")

    def end() -> None:
        raise EndedError

    monkeypatch.setattr(dog._closed, "wait", lambda seconds: False)
    monkeypatch.setattr(dog, "_count_run_seconds", look)
    monkeypatch.setattr(dog, "_end_after_exit", end)
    dog._hears_of_exit = True
    for phase, ended_at in (("step 3", 51 + SECONDS_AFTER_EXIT + 1), (f"{SAVING} step 3", 60)):
        dog._run_seconds = 50.0
        dog.set_phase(phase)
        with pytest.raises(EndedError):
            CHECK_PROGRESS(dog)
        assert dog._run_seconds == ended_at
