"""Data workers: processes that prepare the batches of training and evaluation ahead.

They are forked from a server without threads, never from the rank. A fork copies every lock in its
present state: one that a thread of gloo, autograd or TensorBoard holds at that moment stays locked
in the child for ever. Python 3.11 itself then hangs inside os.fork, and so does the run (seen once
in some hundred forks).
"""

import copyreg
import io
import multiprocessing
import os
import pickle
import signal
import site
import tempfile
import threading
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vico.data.batching import Step, TrainingSteps
from vico.data.evaluation_batches import Chunk, EvaluationChunks
from vico.distributed import signals

PREFETCHED_BATCHES = 4  # per worker
SHARED_MEMORY = "/dev/shm"
# A socket's name has 107 bytes at most, of which multiprocessing adds 32.
MAX_SOCKET_FOLDER_BYTES = 107 - len("/pymp-12345678/listener-12345678")
PRELOADED = [
    "torch",
    "vico.data.batching",
    "vico.data.evaluation_batches",
    "vico.data.forkserver_preload",
]
# Python's resource tracker removes the semaphores of a killed rank. It need not warn of that.
NO_TRACKER_WARNING = "ignore:resource_tracker"
# The data workers that this process has started. multiprocessing forgets those that have ended.
WORKERS: "WeakSet[ForkServerProcess]" = WeakSet()


class _Worker(ForkServerProcess):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        WORKERS.add(self)


class _Context(ForkServerContext):
    Process = _Worker


def start_forkserver() -> None:
    """Start the server that workers are forked from. Idempotent.

    It imports torch, which takes seconds: called early, it does so while the rank does something
    else. The signals that ask a run to stop must end neither the server nor Python's resource
    tracker, so they stay blocked in both.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    warnings = os.environ.get("PYTHONWARNINGS", "")
    if NO_TRACKER_WARNING not in warnings:
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [warnings, NO_TRACKER_WARNING]))
    if (folder := str(Path(__file__).resolve().parents[2])) not in _found_by_itself():
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    _choose_socket_folder()
    # Python starts both by `-c`, which imports from the current folder. 3.10 has no such switch.
    os.environ["PYTHONSAFEPATH"] = "1"
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals.BLOCKED)
    try:
        resource_tracker.ensure_running()  # unblocks two of the signals when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.BLOCKED)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old_mask)


def _found_by_itself() -> list[str]:
    """The folders in which a process that this one starts finds packages.

    Python's server (3.11) does not take over sys.path before it imports: it would import ViCo from
    the installed packages, which may be those of another checkout. The folder of the installed
    packages itself must not be in PYTHONPATH, which comes before Python's own modules.
    """
    installed = [*site.getsitepackages(), site.getusersitepackages()]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return [*given, *(os.path.realpath(folder) for folder in installed)]


def _choose_socket_folder() -> None:
    """Have multiprocessing put its sockets into /tmp where TMPDIR is too long for their names.

    Python does so itself from 3.14 on; before, binding the server's socket fails.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= MAX_SOCKET_FOLDER_BYTES:
        return
    usual, tempfile.tempdir = tempfile.tempdir, "/tmp"
    try:
        util.get_temp_dir()  # which this process and its workers keep
    finally:
        tempfile.tempdir = usual


def loader(
    dataset: TrainingSteps | EvaluationChunks,
    items: Any,
    num_workers: int,
    pin: bool,
    keep_workers: bool = False,
) -> DataLoader[Any]:
    """The dataset's `items` in this order, prepared by `num_workers` processes (0: by the rank).

    `keep_workers`: for the next pass, until nobody has the loader any more.
    """
    if num_workers:
        start_forkserver()
        # At least as many as DataLoader makes (torch 2.13).
        _require_room_for_locks(12 + 3 * num_workers)
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin,
        persistent_workers=keep_workers and num_workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if num_workers else None,
        worker_init_fn=_init_worker,
        multiprocessing_context=_Context() if num_workers else None,
    )


def _require_room_for_locks(num_locks: int) -> None:
    """Raise OSError if /dev/shm has no page for each lock: DataLoader would fail half-way."""
    context = multiprocessing.get_context("forkserver")
    try:
        _ = [context.Lock() for _ in range(num_locks)]
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, SHARED_MEMORY) from None


class _Pickler(pickle.Pickler):
    """Sends tensors as arrays, because their own pickling is torch.save.

    The rank copies them to memory that torch allocates. A matrix product may sum in another order
    if its operands are aligned differently, and a run must not depend on its workers.
    """

    dispatch_table = copyreg.dispatch_table | {
        Tensor: lambda tensor: (torch.tensor, (tensor.numpy(),))
    }


def _reduce_to_one_tensor(item: Any) -> tuple[Callable[[Tensor], Any], tuple[Tensor]]:
    """How a worker sends a step: as one piece of shared memory. torch would take one per tensor.

    Not through the pipe: a worker that is killed can leave half a message, and the rank would wait
    for the other half for ever.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(item)
    return _restore, (torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8),)


def _restore(piece: Tensor) -> Any:
    return pickle.loads(piece.numpy().data)


def _exit_on_send_error(problem: Exception, item: Any) -> NoReturn:
    """End a worker that has no shared memory to send a step: torch would have the rank wait."""
    os._exit(1)


def _init_worker(worker: int) -> None:
    """Set up a worker: it ignores the stop signals, and ends with its server and with its rank.

    The server itself waits for the rank as long as it has workers.
    """
    for kind in (Step, Chunk):
        ForkingPickler.register(kind, _reduce_to_one_tensor)
    # The hook that Python provides for this.
    Queue._on_queue_feeder_error = staticmethod(_exit_on_send_error)  # type: ignore[attr-defined]
    signals.ignore_all()
    # torch's handlers print a guess and a NUL byte; the rank names the signal.
    for number in (signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE):
        signal.signal(number, signal.SIG_DFL)
    signals.die_with_parent(os.getppid())
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "a worker has a parent process"
    rank.join()
    os._exit(128 + signal.SIGKILL)
