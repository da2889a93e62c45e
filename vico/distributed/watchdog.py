"""Ends a run in which a rank has exited or makes no progress any more, and names that rank.

A rank that is stopped, or waits for something that never happens, leaves the others in a collective
that never returns, or that fails after half an hour without naming anybody. So the main thread of
each rank reports its phase at every step. Two threads beside it run the watchdog: one exchanges
heartbeats with the other ranks, one ends the process when its main thread has been silent for too
long.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

import psutil
from torch._C._distributed_c10d import Store

from vico.distributed import launcher_env
from vico.distributed.store_words import read_word
from vico.distributed.topology import Member, machine_id
from vico.errors import PeerLostError, UserError
from vico.io import streams

WAITING = "waiting for other ranks after: "  # the prefix of a phase that is spent in a collective
# A rank whose innermost stack frames are in these folders waits for other ranks.
COLLECTIVE_CODE = ("/torch/distributed/", "/deepspeed/comm/", "/deepspeed/runtime/zero/")
NUM_INNERMOST_FRAMES = 4
MAX_HEARTBEAT_SECONDS = 5.0
# Of the timeout. A rank whose main thread is silent for longer reads the heartbeats of the others.
SILENCE_BEFORE_READING = 1 / 6
# The main thread's collective mostly fails at once when a rank exits, and knows more.
SECONDS_AFTER_EXIT = 4.0
SAVING = "saving"  # the prefix of a phase in which rank 0 writes
EXITED = "watchdog exited"  # the key that is set when a rank has exited
MAX_REPORTS_SHOWN = 16
MAX_REPORT_SECONDS = 10.0  # of the end of this process
# By these variables the ranks of one run find each other.
RENDEZVOUS_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")


@dataclass(frozen=True)
class _Heartbeat:
    """The last report of a rank. `tick` counts up as long as its process runs at all."""

    tick: int
    idle_seconds: float  # since its main thread last reported a phase
    phase: str

    @property
    def is_waiting(self) -> bool:
        return self.phase.startswith(WAITING)


@dataclass(frozen=True)
class _Peer:
    """Another rank, or this one: where it runs."""

    host: str
    name: str
    process: psutil.Process | None  # None: of another machine, or not shown to be this run's
    ended_before: bool  # it joined, and had ended when this rank first looked

    @classmethod
    def of(cls, member: Member) -> "_Peer":
        name = f"on {member.host} (process {member.pid})"
        ended = member.machine == machine_id() and _has_ended(member.pid)
        return cls(member.host, name, None if ended else _process_of(member), ended)

    def has_exited(self) -> bool:
        """Whether the process has ended, zombies included; False where it cannot be seen."""
        if self.process is None:
            return self.ended_before
        try:
            # psutil compares start times, as process numbers are used again.
            return not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def kill(self) -> None:
        if self.process is not None:
            with suppress(psutil.Error):
                self.process.kill()


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _process_of(member: Member) -> psutil.Process | None:
    """The process of a rank of this machine, if the process itself shows that it is that rank.

    The process number comes from the store, so it may be anybody's. But the environment that a
    process was started with is the kernel's word, and names the rank and the run.
    """
    if member.machine != machine_id():
        return None
    try:
        process = psutil.Process(member.pid)
        environment = process.environ()
        launcher_env.set_rank_variables(environment)
    except (psutil.Error, OSError, UserError, KeyError, ValueError):
        return None
    same_run = all(environment.get(n) == os.environ.get(n) for n in RENDEZVOUS_VARIABLES)
    return process if same_run and environment.get("RANK") == str(member.rank) else None


class Watchdog:
    """The main thread calls `set_phase`; at most `timeout_seconds` may pass between two calls.

    Time in which this process was suspended does not count. A rank that exits ends the run too,
    unless the main thread of this one notices it by itself.
    """

    def __init__(
        self, rank: int, members: Sequence[Member], store: Store, timeout_seconds: float
    ) -> None:
        self._rank, self._size, self._store = rank, len(members), store
        self._timeout_seconds = timeout_seconds
        self._interval = min(MAX_HEARTBEAT_SECONDS, timeout_seconds / 8)
        self._run_seconds, self._looked_at = 0.0, time.monotonic()
        now = self._run_seconds
        self._phase, self._phase_since = "starting", now
        # What ends this process after a peer's exit: it returns the exit code.
        self.on_peer_exit: Callable[[], int] = lambda: PeerLostError.exit_code
        self.on_hang: Callable[[], None] = lambda: None  # called where no process is to blame
        self._ending = threading.Lock()  # of the thread that ends this process
        self._hears_of_exit = False  # a rank of any host has exited
        self._tick = 0
        self._peers = {member.rank: _Peer.of(member) for member in members}
        # A rank can be lost before its first heartbeat.
        self._heartbeats = dict.fromkeys(self._peers, _Heartbeat(0, 0.0, "starting"))
        self._last_change = dict.fromkeys(self._peers, now)  # when a rank's tick last changed
        self._last_exchange = now
        self._closed = threading.Event()
        for work in (self._exchange_heartbeats, self._check_progress):
            name = f"vico watchdog {work.__name__}"
            threading.Thread(target=work, daemon=True, name=name).start()

    def set_phase(self, phase: str) -> None:
        self._phase, self._phase_since = phase, self._run_seconds

    @property
    def phase(self) -> str:
        return self._phase.removeprefix(WAITING)

    def exited_ranks(self) -> list[str]:
        """The ranks of this host whose processes have ended, with host and process number."""
        peers = sorted(self._peers.items())
        return [f"rank {rank} {peer.name}" for rank, peer in peers if peer.has_exited()]

    def speaks_for_host(self) -> bool:
        """Whether this rank is the lowest that still runs on its host, rank 0 not counted.

        Only meaningful after rank 0 has exited.
        """
        lower = [peer for rank, peer in self._peers.items() if 0 < rank < self._rank]
        return all(peer.has_exited() for peer in lower if peer.process is not None)

    def ignore_exits(self) -> None:
        """The main thread has come to its end: from now on other ranks may exit.

        Does not return where the watchdog is already ending this process.
        """
        self._ending.acquire()

    def close(self) -> None:
        self._closed.set()

    def _exchange_heartbeats(self) -> None:
        """Publish this rank's heartbeat and, when its main thread is silent, read the others'.

        So the requests of N ranks that make progress grow with N, not N^2. It blocks when the
        host of the store hangs. Hence progress is checked by another thread.
        """
        pause = 0.0
        while not self._closed.wait(pause):
            pause = self._interval
            self._tick += 1
            try:
                self._publish_heartbeat()
                idle_seconds = self._run_seconds - self._phase_since
                if idle_seconds > SILENCE_BEFORE_READING * self._timeout_seconds:
                    self._read_heartbeats()
                self._exchange_exits()
                self._last_exchange = self._run_seconds
            except RuntimeError:  # rank 0 is gone, and the store with it
                self._hears_of_exit = self._rank != 0

    def _exchange_exits(self) -> None:
        """Only the ranks of a host see that a process of it has ended; they tell the others."""
        if self._hears_of_exit or self.exited_ranks():
            self._store.set(EXITED, "")
        self._hears_of_exit = self._store.check([EXITED])

    def _publish_heartbeat(self) -> None:
        idle_seconds = self._run_seconds - self._phase_since
        beat = _Heartbeat(self._tick, idle_seconds, self._current_phase())
        self._store.set(_key(self._rank), json.dumps(asdict(beat)))

    def _read_heartbeats(self) -> None:
        """Two requests, or N + 1 where a rank was lost before its first heartbeat."""
        ranks = sorted(self._peers)
        if not self._store.check([_key(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if self._store.check([_key(rank)])]
        words = self._store.multi_get([_key(rank) for rank in ranks])
        for rank, word in zip(ranks, words, strict=True):
            beat = read_word(_Heartbeat, word)
            if beat is None:
                continue  # not a rank's: as if it had sent nothing
            if self._heartbeats[rank].tick != beat.tick:
                self._last_change[rank] = self._run_seconds
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
        exit_seen_at: float | None = None
        while not self._closed.wait(self._interval / 2):
            self._count_run_seconds()
            if self._run_seconds - self._phase_since > self._timeout_seconds:
                self._abort()
            if not (self._hears_of_exit or self.exited_ranks()):
                continue
            exit_seen_at = self._run_seconds if exit_seen_at is None else exit_seen_at
            # A save ends by itself soon, and is worth more.
            is_over = self._run_seconds - exit_seen_at > SECONDS_AFTER_EXIT
            if is_over and not self._phase.startswith(SAVING):
                self._end_after_exit()

    def _count_run_seconds(self) -> None:
        """Of a longer pause than between two looks, this process was suspended for the rest."""
        now = time.monotonic()
        self._run_seconds += min(now - self._looked_at, self._interval)
        self._looked_at = now

    def _end_after_exit(self) -> None:
        if not self._ending.acquire(blocking=False):
            return  # the main thread does it
        _exit_soon()
        code = PeerLostError.exit_code
        try:
            code = self.on_peer_exit()
        finally:
            os._exit(code)

    def _abort(self) -> None:
        """End the process from this thread: the main thread's wait cannot be interrupted."""
        _exit_soon()
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
            if not silent:
                self.on_hang()
        time.sleep(min(1.0, self._interval))  # the other ranks print their stacks meanwhile
        for rank in silent:
            self._peers[rank].kill()  # a stopped process ignores its launcher's SIGTERM

    def _silent_ranks(self) -> set[int]:
        """The ranks whose heartbeats have stopped; rank 0 alone where the store does not answer."""
        stale = self._run_seconds - 3 * self._interval - 1
        if self._last_exchange < stale and self._rank != 0:
            return {0}
        silent = {rank for rank, changed in self._last_change.items() if changed < stale}
        return silent - {self._rank}

    def verdict(self, silent: set[int]) -> str:
        """The error line: which rank is to blame, as far as known, and what each last reported."""
        beats = sorted(self._heartbeats.items())
        reports = [
            f"rank {rank} ({self._peers[rank].host}): {beat.phase}, for {beat.idle_seconds:.0f} s"
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
        names = ", ".join(f"rank {rank} {self._peers[rank].name}" for rank in ranks)
        return f"{names} {'is' if len(ranks) == 1 else 'are'}"


def _exit_soon() -> None:
    """The report may hang as the run does: on a store or a file system that does not answer."""
    timer = threading.Timer(MAX_REPORT_SECONDS, os._exit, [PeerLostError.exit_code])
    timer.daemon = True
    timer.start()


def _key(rank: int) -> str:
    return f"watchdog {rank}"
