"""Ends a run in which a rank makes no progress any more, and names that rank.

A rank that is stopped, or waits for something that never happens, leaves the others in a collective
that never returns, or that fails after half an hour without naming anybody. So the main thread of
each rank reports its phase at every step. Two threads beside it run the watchdog: one exchanges
heartbeats with the other ranks, one ends the process when its main thread has been silent for too
long.
"""

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil
from torch._C._distributed_c10d import Store

from vico.distributed.topology import Member
from vico.errors import PeerLostError
from vico.io import streams

WAITING = "waiting for other ranks after: "  # the prefix of a phase that is spent in a collective
# A rank whose innermost stack frames are in these folders waits for other ranks.
COLLECTIVE_CODE = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
NUM_INNERMOST_FRAMES = 4
MAX_HEARTBEAT_SECONDS = 5.0
MAX_REPORTS_SHOWN = 16


@dataclass(frozen=True)
class _Heartbeat:
    """The last report of a rank. `tick` counts up as long as its process runs at all."""

    tick: int
    idle_seconds: float  # since its main thread last reported a phase
    phase: str
    host: str
    pid: int

    @property
    def name(self) -> str:
        return f"on {self.host} (process {self.pid})"

    @property
    def is_waiting(self) -> bool:
        return self.phase.startswith(WAITING)

    @property
    def is_on_this_host(self) -> bool:
        return self.host == socket.gethostname()

    def has_exited(self) -> bool:
        """Whether the process has ended, zombies included; False for one of another host."""
        if not self.is_on_this_host:
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Watchdog:
    """The main thread calls `set_phase`; at most `timeout_seconds` may pass between two calls."""

    def __init__(
        self, rank: int, members: Sequence[Member], store: Store, timeout_seconds: float
    ) -> None:
        self._rank, self._size, self._store = rank, len(members), store
        self._timeout_seconds = timeout_seconds
        self._interval = min(MAX_HEARTBEAT_SECONDS, timeout_seconds / 8)
        now = time.monotonic()
        self._phase, self._phase_since = "starting", now
        self._tick = 0
        # A rank can be lost before its first heartbeat; its host and process are known already.
        self._heartbeats = _initial_heartbeats(rank, members)
        self._last_change = dict.fromkeys(self._heartbeats, now)  # when a rank's tick last changed
        self._last_exchange = now
        self._closed = threading.Event()
        for work in (self._exchange_heartbeats, self._check_progress):
            name = f"vico watchdog {work.__name__}"
            threading.Thread(target=work, daemon=True, name=name).start()

    def set_phase(self, phase: str) -> None:
        self._phase, self._phase_since = phase, time.monotonic()

    @property
    def phase(self) -> str:
        return self._phase.removeprefix(WAITING)

    def exited_ranks(self) -> list[str]:
        """The ranks of this host whose processes have ended, with host and process number."""
        heartbeats = sorted(self._heartbeats.items())
        return [f"rank {rank} {beat.name}" for rank, beat in heartbeats if beat.has_exited()]

    def speaks_for_host(self) -> bool:
        """Whether this rank is the lowest that still runs on its host, rank 0 not counted.

        Only meaningful after rank 0 has exited.
        """
        lower = [beat for rank, beat in self._heartbeats.items() if 0 < rank < self._rank]
        return all(beat.has_exited() for beat in lower if beat.is_on_this_host)

    def close(self) -> None:
        self._closed.set()

    def _exchange_heartbeats(self) -> None:
        """Publish this rank's heartbeat and read the others'.

        It blocks when the host of the store hangs. Hence progress is checked by another thread.
        """
        pause = 0.0
        while not self._closed.wait(pause):
            pause = self._interval
            self._tick += 1
            with suppress(RuntimeError):  # the store is gone: the missing heartbeats show it
                self._publish_heartbeat()
                self._read_heartbeats()
                self._last_exchange = time.monotonic()

    def _publish_heartbeat(self) -> None:
        idle_seconds = time.monotonic() - self._phase_since
        host, pid = socket.gethostname(), os.getpid()
        beat = _Heartbeat(self._tick, idle_seconds, self._current_phase(), host, pid)
        self._store.set(f"watchdog {self._rank}", json.dumps(asdict(beat)))

    def _read_heartbeats(self) -> None:
        for rank in range(self._size):
            key = f"watchdog {rank}"
            if not self._store.check([key]):
                continue
            beat = _Heartbeat(**json.loads(self._store.get(key)))
            if self._heartbeats[rank].tick != beat.tick:
                self._last_change[rank] = time.monotonic()
            self._heartbeats[rank] = beat

    def _current_phase(self) -> str:
        """The phase, marked as waiting where the stack shows a collective.

        DeepSpeed enters its collectives without reporting it.
        """
        waits = self._phase.startswith(WAITING)
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        for _ in range(NUM_INNERMOST_FRAMES):
            if frame is None:
                break
            filename = frame.f_code.co_filename
            waits = waits or any(folder in filename for folder in COLLECTIVE_CODE)
            frame = frame.f_back
        return WAITING + self.phase if waits else self._phase

    def _check_progress(self) -> None:
        while not self._closed.wait(self._interval / 2):
            if time.monotonic() - self._phase_since > self._timeout_seconds:
                self._abort()

    def _abort(self) -> None:
        """End the process from this thread: the main thread's wait cannot be interrupted."""
        try:
            self._report_and_kill()
        finally:
            os._exit(PeerLostError.exit_code)

    def _report_and_kill(self) -> None:
        """Print all stacks and, on the lowest running rank, the error; kill the silent ranks."""
        silent = self._silent_ranks()
        running = [rank for rank in self._heartbeats if rank not in silent] or [self._rank]
        faulthandler.dump_traceback(streams.descriptor_for_stacks(), all_threads=True)
        if self._rank == min(running):
            # Not through the logger: the stuck main thread may hold its lock.
            print(f"vico: error: {self.verdict(silent)}", file=sys.stderr, flush=True)
        time.sleep(min(1.0, self._interval))  # the other ranks print their stacks meanwhile
        for rank in silent:
            beat = self._heartbeats[rank]
            if beat.is_on_this_host:  # a stopped process ignores its launcher's SIGTERM
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(beat.pid, signal.SIGKILL)

    def _silent_ranks(self) -> set[int]:
        """The ranks whose heartbeats have stopped; rank 0 alone where the store does not answer."""
        stale = time.monotonic() - 3 * self._interval - 1
        if self._last_exchange < stale and self._rank != 0:
            return {0}
        silent = {rank for rank, changed in self._last_change.items() if changed < stale}
        return silent - {self._rank}

    def verdict(self, silent: set[int]) -> str:
        """The error line: which rank is to blame, as far as known, and what each last reported."""
        beats = sorted(self._heartbeats.items())
        reports = [
            f"rank {rank} ({beat.host}): {beat.phase}, for {beat.idle_seconds:.0f} s"
            for rank, beat in beats
        ]
        stuck = [rank for rank, beat in beats if not beat.is_waiting]
        if silent:
            blame = f"{self._name_with_verb(sorted(silent))} not responding"
        elif 0 < len(stuck) < self._size:
            pronoun = "it" if len(stuck) == 1 else "them"
            blame = (
                f"{self._name_with_verb(stuck)} stuck; all other ranks are waiting for {pronoun}"
            )
        else:
            blame = "every process runs, but none makes progress"
        return (
            f"nothing has moved for {self._timeout_seconds:.0f} s (--hang_timeout): {blame}; "
            f"last reports: {'; '.join(reports[:MAX_REPORTS_SHOWN])}; stacks are above; "
            "rerun the same command to resume from the latest checkpoint"
        )

    def _name_with_verb(self, ranks: Sequence[int]) -> str:
        """For example "rank 1 on gpu7 (process 42) is"."""
        names = ", ".join(f"rank {rank} {self._heartbeats[rank].name}" for rank in ranks)
        return f"{names} {'is' if len(ranks) == 1 else 'are'}"


def _initial_heartbeats(rank: int, members: Sequence[Member]) -> dict[int, _Heartbeat]:
    """Members carry the cluster's name of their host; heartbeats carry the host's own name."""
    cluster_name = members[rank].host
    heartbeats = {}
    for member in members:
        host = socket.gethostname() if member.host == cluster_name else member.host
        heartbeats[member.rank] = _Heartbeat(0, 0.0, "starting", host, member.pid)
    return heartbeats
