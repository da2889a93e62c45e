"""How the ranks find each other: through a key-value store on rank 0, where each publishes a text.

torch's own rendezvous waits in silence, and its error names no rank. This one logs for which ranks
it waits, and ends when the user requests a stop.
"""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as torch_dist
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from vico.distributed import launcher_env, signals
from vico.distributed.store_words import read_word
from vico.errors import (
    EXIT_CODES,
    INTERNAL_ERROR,
    InUseError,
    NoAnswerError,
    PeerLostError,
    StartFailedError,
    UserError,
)
from vico.io import log

SILENT_SECONDS = 15.0  # a start that waits longer logs for what it waits
CONNECT_SECONDS = 1.0
POLL_SECONDS = 0.2
STOP_SECONDS = 2.0  # one stop request reaches all ranks within this time
MAX_RANKS_SHOWN = 8
FAILURE = "failure"  # the key under which a rank tells that it will not join
INTERFACE_HINT = (
    "name the network interface that the hosts share by GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME "
    "(eth0, ib0, ...)"
)
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = "127.0.0.1"


def rendezvous(rank: int, size: int, timeout: timedelta, text: str) -> tuple[Store, list[bytes]]:
    """Publish `text`; returns the store and the texts of all ranks, in their order.

    Raises PeerLostError naming the ranks that did not join, NoAnswerError where rank 0 does not
    answer, InUseError for a port that is taken, and Stopped when a signal requests a stop.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    store = _open_run_store(rank, size, timeout)
    keys = [f"rank {other}" for other in range(size)]
    try:
        store.set(keys[rank], text)
        _wait_for_all(store, keys, rank, timeout, deadline)
        texts: list[bytes] = store.multi_get(keys)
        _acknowledge(store, rank, size)  # rank 0 may refuse the other ranks right after this
    except torch_dist.DistError as error:
        _await_stop_request()
        raise NoAnswerError(
            f"rank 0 left the rendezvous at {_address()} ({first_line(error)}); see its log"
        ) from None
    return store, texts


@dataclass(frozen=True)
class _Failure:
    """What a rank tells that will not join."""

    rank: int
    host: str
    line: str
    code: int

    def __post_init__(self) -> None:
        if self.code not in EXIT_CODES:
            raise ValueError(f"code {self.code}: ends no run")


def _open_run_store(rank: int, size: int, timeout: timedelta) -> Store:
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"vico/{restart}", _open_store(rank, size, timeout))


def announce_failure(line: str, code: int) -> bool:
    """Tell the ranks that wait at the rendezvous that this one has failed; False: it could not.

    Rank 0, which hosts the store, stays until all others know, or the time is over.
    """
    timeout = timedelta(seconds=SILENT_SECONDS)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    failure = _Failure(rank, socket.gethostname(), line, code)
    try:
        store = _open_run_store(rank, size, timeout)
        store.compare_set(FAILURE, "", json.dumps(asdict(failure)))
        _acknowledge(store, rank, size)
    except (RuntimeError, UserError, signals.Stopped):
        return False
    return True


def _raise_failure(store: Store, rank: int, size: int) -> None:
    """Raise StartFailedError where a rank has announced that it failed."""
    if not store.check([FAILURE]):
        return
    failure = read_word(_Failure, store.get(FAILURE))
    if failure is None:  # not a rank's
        failure = _Failure(0, "unknown", "its word cannot be read; see its log", INTERNAL_ERROR)
    line = f"rank {failure.rank} on {failure.host}: {failure.line}"
    _acknowledge(store, rank, size)
    raise StartFailedError(line, failure.host, failure.code)


def _acknowledge(store: Store, rank: int, size: int) -> None:
    """The store ends with rank 0, which waits a while until all others have read what they need."""
    store.set(f"rank {rank} done", "")
    if rank == 0:
        with suppress(torch_dist.DistError):
            keys = [f"rank {other} done" for other in range(size)]
            store.wait(keys, timedelta(seconds=SILENT_SECONDS))


def _await_stop_request() -> None:
    """Rank 0 may have ended on a stop request that is about to reach this rank too."""
    deadline = time.monotonic() + STOP_SECONDS
    while time.monotonic() < deadline:
        _raise_if_stop_requested()
        time.sleep(POLL_SECONDS)


def _wait_for_all(
    store: Store, keys: list[str], rank: int, timeout: timedelta, deadline: float
) -> None:
    """Until every key is set. Raises PeerLostError after `timeout`."""

    def all_joined(until: float) -> bool:
        while not store.check(keys):
            _raise_failure(store, rank, len(keys))
            if time.monotonic() >= until:
                return False
            _raise_if_stop_requested()
            time.sleep(POLL_SECONDS)
        return True

    if all_joined(min(time.monotonic() + SILENT_SECONDS, deadline)):
        return
    limit = _format_duration(timeout)
    if rank == 0:
        log.warning(f"waiting at {_address()} for {_missing_ranks(store, keys)}; at most {limit}")
    if not all_joined(deadline):
        missing = _missing_ranks(store, keys)
        raise PeerLostError(
            f"rendezvous timed out after {limit}: {missing} did not join {_address()}; see their "
            "logs; --collective_timeout sets the limit"
        )


def _missing_ranks(store: Store, keys: list[str]) -> str:
    """For example "rank 3 of 8", or "ranks 1, 3 of 8"."""
    missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    if len(missing) == 1:
        return f"rank {missing[0]} of {len(keys)}"
    if len(missing) > MAX_RANKS_SHOWN:
        shown = ", ".join(missing[:MAX_RANKS_SHOWN])
        return f"ranks {shown}, ... of {len(keys)} ({len(missing)} in all)"
    return f"ranks {', '.join(missing)} of {len(keys)}"


class _WaitForRank0:
    """Paces a rank that polls for rank 0's store, logs now and then, and limits the time."""

    def __init__(self, timeout: timedelta) -> None:
        begin = time.monotonic()
        self._deadline = begin + timeout.total_seconds()
        self._log_at = begin + SILENT_SECONDS
        self._limit = _format_duration(timeout)

    def pause(self) -> None:
        """Sleep a moment. Raises NoAnswerError after the timeout, Stopped on a stop request."""
        _raise_if_stop_requested()
        host, address = socket.gethostname(), _address()
        if time.monotonic() >= self._deadline:
            problem = f"rank 0 did not answer at {address} within {self._limit}"
            raise NoAnswerError(f"{host}: {problem}; see its log")
        if time.monotonic() >= self._log_at:
            self._log_at = time.monotonic() + SILENT_SECONDS
            if os.environ.get("LOCAL_RANK", "0") == "0":
                log.warning(f"{host} is waiting for rank 0 at {address}; at most {self._limit}")
        time.sleep(POLL_SECONDS)


def _open_store(rank: int, size: int, timeout: timedelta) -> TCPStore:
    """Connect to the store. Rank 0 hosts it, except under torchrun, which does so itself."""
    address, port = _master()
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    connect_timeout = timedelta(seconds=min(SILENT_SECONDS, timeout.total_seconds()))
    wait = _WaitForRank0(timeout)

    def connect() -> TCPStore:
        # By itself torch listens on all interfaces. Whoever reaches the store can write to it.
        is_local = is_server and address == LOOPBACK
        return TCPStore(
            address,
            port,
            size,
            is_server,
            timeout=connect_timeout,
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_listen_on_loopback(port) if is_local else None,
        )

    while True:
        # Without this probe torch retries by itself, and prints C++ stack frames meanwhile.
        if not is_server and not _accepts_connections(address, port):
            wait.pause()
            continue
        try:
            # `pause` raises when the time is over or a signal asks to stop.
            store: TCPStore = _call_in_thread(connect, wait.pause)
        except (torch_dist.DistError, OSError) as error:
            if is_server:
                problem = f"cannot be opened on {socket.gethostname()} ({first_line(error)})"
                raise InUseError(f"MASTER_PORT={port}: {problem}; choose another") from None
            wait.pause()
            continue
        store.set_timeout(timeout)
        return store


def _listen_on_loopback(port: int) -> int:
    """The descriptor of a socket that only this host reaches. Raises OSError for a taken port."""
    return socket.create_server((LOOPBACK, port)).detach()


def _accepts_connections(address: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((address, port), timeout=CONNECT_SECONDS):
        return True
    return False


def _call_in_thread(function: Callable[[], Any], pause: Callable[[], None]) -> Any:
    """What `function` returns or raises; `pause` runs again and again until then, and may raise.

    torch's call never returns where another program accepts the connection and says nothing.
    """
    result: Future[Any] = Future()

    def call() -> None:
        try:
            result.set_result(function())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(POLL_SECONDS)
    while thread.is_alive():
        pause()
    return result.result()


def _raise_if_stop_requested() -> None:
    if number := signals.stop_requested():
        name = signal.Signals(number).name
        line = f"stopped by {name} before the rendezvous; rerun the same command to start"
        raise signals.Stopped(number, line)


def clone_store(store: Store) -> Store:
    """The same store over another connection: a call that blocks delays its whole connection."""
    clone: Store = store.clone()  # type: ignore[attr-defined]
    return clone


@contextmanager
def hint_when_slow(what: str, rank: int) -> Iterator[None]:
    """Around the first collectives, which hang without a message over a wrong network interface.

    Rank 0 logs a hint after SILENT_SECONDS. A RuntimeError becomes a UserError with the hint.
    """
    message = f"{what} takes more than {SILENT_SECONDS:.0f} s; if it does not end, {INTERFACE_HINT}"
    timer = threading.Timer(SILENT_SECONDS, log.warning, [message])
    timer.daemon = True
    if rank == 0:
        timer.start()
    try:
        yield
    except RuntimeError as error:
        problem = f"{what} failed on {socket.gethostname()} ({first_line(error)})"
        raise UserError(f"{problem}; {INTERFACE_HINT}") from None
    finally:
        timer.cancel()


def first_line(error: Exception) -> str:
    """The first line of its message, or its type where the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _master() -> tuple[str, int]:
    """Address and port of the store. On one host the address is that of its loopback interface."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return LOOPBACK if launcher_env.is_on_one_host() else address, port


def _address() -> str:
    address, port = _master()
    return f"{address}:{port}"


def use_loopback() -> None:
    """On one host: have gloo and NCCL listen on the loopback interface, unless the user chose."""
    if not launcher_env.is_on_one_host():
        return
    for interface, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            for variable in INTERFACE_VARIABLES:
                os.environ.setdefault(variable, interface)
            return


def _format_duration(duration: timedelta) -> str:
    seconds = duration.total_seconds()
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
