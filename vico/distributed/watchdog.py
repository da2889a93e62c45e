"""Ends a run in which nothing moves any more, and says whose fault it is.

A rank that is stopped, or waits for what never comes, leaves the others in an exchange that has no end, or one after half
an hour without a name. Each rank's main thread says what it is doing; a thread beside it tells the others that the
process lives, and ends it when its main thread has been doing the same for too long.
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
from dataclasses import dataclass

import psutil
from torch._C._distributed_c10d import Store

from vico.distributed.topology import Member
from vico.errors import PeerLostError

WAITING = "waiting for the others, after: "  # how what a rank does begins where it can be told that it waits
EXCHANGES = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/runtime/zero/",
)  # whose code waits for other ranks
INNERMOST = 4  # frames of a stack in which such code is looked for


@dataclass(frozen=True)
class _Word:
    """What a rank last said of itself. `tick` counts up as long as the process runs at all."""

    tick: int
    seconds: float  # since its main thread last moved
    doing: str
    host: str
    pid: int

    @property
    def name(self) -> str:
        return f"on {self.host} (process {self.pid})"

    def is_gone(self) -> bool:
        """Whether the process has ended, as far as this host can tell; one that its launcher has not asked after yet included."""
        if self.host != socket.gethostname():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True


class Watchdog:
    """`doing` is called by the main thread at every move; between two calls `seconds` may pass."""

    def __init__(self, rank: int, members: Sequence[Member], store: Store, seconds: float) -> None:
        self._rank, self._size, self._store, self._seconds = rank, len(members), store, seconds
        self._interval = min(5.0, seconds / 8)
        self._doing, self._moved, self._tick = "starting", time.monotonic(), 0
        # A rank can be lost before its first word; who it was is known from the start.
        own = members[rank].host  # as the cluster calls it; a word says what the host calls itself
        self._words = {
            m.rank: _Word(
                0, 0.0, "starting", socket.gethostname() if m.host == own else m.host, m.pid
            )
            for m in members
        }
        self._last_new = dict.fromkeys(
            self._words, self._moved
        )  # when a rank's tick was last seen to change
        self._talked = self._moved  # the end of the last round of talk
        self._over = threading.Event()
        for work in (self._talk, self._judge):
            threading.Thread(
                target=work, daemon=True, name=f"vico watchdog {work.__name__}"
            ).start()

    def set_phase(self, what: str) -> None:
        self._doing, self._moved = what, time.monotonic()

    @property
    def phase(self) -> str:
        return self._doing.removeprefix(WAITING)

    def gone(self) -> list[str]:
        """The ranks of this host whose processes have ended, in words."""
        return [
            f"rank {rank} {word.name}"
            for rank, word in sorted(self._words.items())
            if word.is_gone()
        ]

    def is_first_here(self) -> bool:
        """Whether no rank below this one is left on this host, rank 0 aside: it is asked where that has gone, with the store."""
        below = [
            word
            for rank, word in self._words.items()
            if 0 < rank < self._rank and word.host == socket.gethostname()
        ]
        return all(word.is_gone() for word in below)

    def close(self) -> None:
        self._over.set()

    def _talk(self) -> None:
        """Leave word in the store and read the others'. Hangs with the store's keeper, which is why another thread judges."""
        host, pause = socket.gethostname(), 0.0
        while not self._over.wait(pause):
            pause = self._interval
            self._tick += 1
            word = [self._tick, time.monotonic() - self._moved, self._told(), host, os.getpid()]
            with suppress(RuntimeError):  # the keeper has gone: silence says the same
                self._store.set(f"watchdog {self._rank}", json.dumps(word))
                for other in range(self._size):
                    if self._store.check([f"watchdog {other}"]):
                        self._hear(other, _Word(*json.loads(self._store.get(f"watchdog {other}"))))
                self._talked = time.monotonic()

    def _told(self) -> str:
        """What the main thread said, and whether its stack shows it in an exchange: DeepSpeed's are entered without a word."""
        frame, waits = (
            sys._current_frames().get(threading.main_thread().ident or 0),
            self._doing.startswith(WAITING),
        )
        for _ in range(INNERMOST):
            if frame is not None:
                waits = waits or any(part in frame.f_code.co_filename for part in EXCHANGES)
                frame = frame.f_back
        return WAITING + self.phase if waits else self._doing

    def _hear(self, rank: int, word: _Word) -> None:
        if self._words[rank].tick != word.tick:
            self._last_new[rank] = time.monotonic()
        self._words[rank] = word

    def _judge(self) -> None:
        while not self._over.wait(self._interval / 2):
            if time.monotonic() - self._moved > self._seconds:
                self._end()

    def _end(self) -> None:
        """All stacks, the line by the lowest rank that lives, and out: what the main thread waits for cannot be interrupted."""
        try:
            self._say_and_kill()
        finally:
            os._exit(PeerLostError.exit_code)

    def _say_and_kill(self) -> None:
        now = time.monotonic()
        long_ago = now - 3 * self._interval - 1
        silent = {r for r, at in self._last_new.items() if at < long_ago} - {self._rank}
        if self._talked < long_ago and self._rank != 0:
            silent = {0}  # the store's keeper does not answer, and of the others nothing is known
        alive = [r for r in self._words if r not in silent] or [self._rank]
        faulthandler.dump_traceback(all_threads=True)
        if self._rank == min(alive):
            print(f"vico: error: {self.verdict(silent)}", file=sys.stderr, flush=True)
        time.sleep(min(1.0, self._interval))  # the others see the same, and say theirs
        for word in (self._words[rank] for rank in silent):
            if word.host == socket.gethostname():  # stopped, it would not hear its launcher either
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(word.pid, signal.SIGKILL)

    def verdict(self, silent: set[int]) -> str:
        """Who is to blame, as far as can be told."""
        states = [
            f"rank {r} ({word.host}): {word.doing}, for {word.seconds:.0f} s"
            for r, word in sorted(self._words.items())
        ][:16]
        stuck = [r for r, word in sorted(self._words.items()) if not word.doing.startswith(WAITING)]
        if silent:
            who = f"{', '.join(f'rank {r} {self._words[r].name}' for r in sorted(silent))} no longer runs"
        elif stuck and len(stuck) < self._size:
            who = f"{', '.join(f'rank {r} {self._words[r].name}' for r in stuck)} does not get on, and the others wait for it"
        else:
            who = "every process runs, none gets on"
        return (
            f"nothing has moved for {self._seconds:.0f} s (--hang_timeout): {who}; last heard: {'; '.join(states)}; "
            "stacks are above; the same command goes on at the last checkpoint"
        )
