"""How the ranks of a run find each other before they can talk: each leaves word in the store that rank 0 keeps.

torch's own way waits in silence, and ends with a trace that names nobody. Here a start that waits says for which ranks.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as torch_dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vico.distributed import signals
from vico.errors import InUseError, NoAnswerError, PeerLostError, UserError

SECONDS_OF_SILENCE = 15.0  # then a start that waits says for what
SECONDS_OF_A_CALL, SECONDS_BETWEEN_CALLS = 1.0, 0.2
INTERFACE_HINT = "name the network interface that the hosts share by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME (eth0, ib0, ...)"


def rendezvous(rank: int, size: int, timeout: timedelta, word: str) -> tuple[Store, list[str]]:
    """The store, and the words that all ranks left there. Raises PeerLostError naming those who did not come, NoAnswerError, Stopped."""
    end = time.monotonic() + timeout.total_seconds()
    store = PrefixStore(
        f"vico/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}",
        _open_store(rank, size, timeout),
    )
    names = [f"rank {other}" for other in range(size)]
    try:
        store.set(names[rank], word)
        _wait_for(names, store, rank, timeout, end)
        words = [store.get(name).decode() for name in names]
        store.set(f"{names[rank]} has read", "")
    except torch_dist.DistError as problem:
        for _ in range(10):  # it may have been asked a moment before this rank
            _stop_if_asked()
            time.sleep(SECONDS_BETWEEN_CALLS)
        raise NoAnswerError(
            f"rank 0 has left {_address()} ({first_line(problem)}); its log says why"
        ) from None
    if rank == 0:  # which may refuse the world and end, and the store with it
        with suppress(torch_dist.DistError):
            store.wait(
                [f"{name} has read" for name in names], timedelta(seconds=SECONDS_OF_SILENCE)
            )
    return store, words


def _wait_for(
    names: Sequence[str], store: Store, rank: int, timeout: timedelta, end: float
) -> None:
    def come(until: float) -> bool:
        while not store.check(list(names)):
            if time.monotonic() >= until:
                return False
            _stop_if_asked()
            time.sleep(SECONDS_BETWEEN_CALLS)
        return True

    def missing() -> str:
        absent = [str(other) for other, name in enumerate(names) if not store.check([name])]
        return f"rank(s) {', '.join(absent[:8])}{', ...' if len(absent) > 8 else ''} of {len(names)} ({len(absent)} in all)"

    if come(min(time.monotonic() + SECONDS_OF_SILENCE, end)):
        return
    if rank == 0:
        _say(f"waiting at {_address()} for {missing()}; at most {timeout}")
    if not come(end):
        raise PeerLostError(
            f"{missing()} did not come to {_address()} within {timeout}; their logs say why, --collective_timeout waits longer"
        )


def _open_store(rank: int, size: int, timeout: timedelta) -> TCPStore:
    """Rank 0 keeps it, or torchrun does."""
    address, port, host = (
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        socket.gethostname(),
    )
    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    end, speaks_at = (
        time.monotonic() + timeout.total_seconds(),
        time.monotonic() + SECONDS_OF_SILENCE,
    )

    def wait() -> None:
        nonlocal speaks_at
        _stop_if_asked()
        if time.monotonic() >= end:
            raise NoAnswerError(
                f"{host}: nobody answers at {_address()}, where rank 0 should be, for {timeout}; its log says why"
            )
        if time.monotonic() >= speaks_at:
            speaks_at = time.monotonic() + SECONDS_OF_SILENCE
            if os.environ.get("LOCAL_RANK", "0") == "0":
                _say(
                    f"{host} waits for an answer at {_address()}, where rank 0 should be; at most {timeout}"
                )
        time.sleep(SECONDS_BETWEEN_CALLS)

    def make() -> TCPStore:
        patience = timedelta(seconds=min(SECONDS_OF_SILENCE, timeout.total_seconds()))
        return TCPStore(
            address, port, size, keeps, timeout=patience, wait_for_workers=False, multi_tenant=True
        )

    while True:
        if not keeps and not _answers(address, port):  # torch's own way prints C++ frames meanwhile
            wait()
            continue
        try:
            store: TCPStore = _run_in_thread(wait, make)
            store.set_timeout(timeout)
            return store
        except torch_dist.DistError as problem:
            if keeps:
                raise InUseError(
                    f"MASTER_PORT={port}: cannot be opened on {host} ({first_line(problem)}); choose another"
                ) from None
            wait()


def _answers(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=SECONDS_OF_A_CALL):
        return True
    return False


def _run_in_thread(wait: Callable[[], None], work: Callable[[], Any]) -> Any:
    """What `work` returns or raises, in a thread: where another program answers and says nothing, torch's call has no end."""
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as problem:
            result.set_exception(problem)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS_BETWEEN_CALLS)
    while thread.is_alive():
        wait()
    return result.result()


def _stop_if_asked() -> None:
    if number := signals.stop_requested():
        raise signals.Stopped(
            number,
            f"stopped by {signal.Signals(number).name} before the ranks had met; the same command begins",
        )


def clone_store(store: Store) -> Store:
    """The same store over a connection of its own: one that waits holds up whoever shares its connection."""
    clone: Store = store.clone()  # type: ignore[attr-defined]
    return clone


def _address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


@contextmanager
def hint_when_slow(what: str, rank: int) -> Iterator[None]:
    """Around the first exchanges: over a wrong interface they hang without a word, or fail in words that name no remedy."""
    message = (
        f"{what} takes more than {SECONDS_OF_SILENCE:.0f} s; if it does not end, {INTERFACE_HINT}"
    )
    hint = threading.Timer(SECONDS_OF_SILENCE, _say, [message])
    hint.daemon = True
    if rank == 0:
        hint.start()
    try:
        yield
    except RuntimeError as problem:
        raise UserError(
            f"{what} failed on {socket.gethostname()} ({first_line(problem)}); {INTERFACE_HINT}"
        ) from None
    finally:
        hint.cancel()


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


def _say(message: str) -> None:
    print(f"vico: {message}", file=sys.stderr, flush=True)
