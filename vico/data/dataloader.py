"""Data workers: processes that prepare the batches of training and evaluation ahead.

They are forked from a server that has no threads, and not from the rank: a fork copies every lock as it is, and one that a thread
of gloo, of autograd or of TensorBoard holds at that moment is held for ever in the child. Python 3.11 itself then hangs inside
os.fork, and the run with it: seen once in some hundreds of forks.
"""

import copyreg
import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker
from multiprocessing.queues import Queue
from multiprocessing.reduction import ForkingPickler
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vico.data.batching import Chunk, EvaluationChunks, Step, TrainingSteps
from vico.distributed import signals

AHEAD = 4  # batches that each worker prepares before they are asked for
SHARED_MEMORY = "/dev/shm"
QUIET = "ignore:resource_tracker"  # when a rank was killed, Python's helper removes its semaphores, which is right, and says so


def start_forkserver() -> None:
    """Idempotent. It imports torch, which takes seconds: called early, this costs nobody time.

    The signals by which a run is asked to stop must not end it, nor Python's own helper: they stay blocked in both.
    """
    multiprocessing.set_forkserver_preload(
        ["torch", "vico.data.batching", "vico.data.forkserver_preload"]
    )
    if QUIET not in os.environ.get("PYTHONWARNINGS", ""):
        os.environ["PYTHONWARNINGS"] = ",".join(
            filter(None, [os.environ.get("PYTHONWARNINGS"), QUIET])
        )
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
    try:
        resource_tracker.ensure_running()  # which lets two of them through when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, signals.SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader(
    dataset: TrainingSteps | EvaluationChunks, items: Any, num_workers: int, pin: bool
) -> DataLoader[Any]:
    """The dataset's `items` in this order, prepared ahead by `num_workers` processes."""
    if num_workers:
        start_forkserver()
        _require_room_for_locks(
            12 + 3 * num_workers
        )  # at least as many as DataLoader makes (torch 2.13)
    return DataLoader(
        dataset,
        sampler=items,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin,
        prefetch_factor=AHEAD if num_workers else None,
        worker_init_fn=_begin,
        multiprocessing_context="forkserver" if num_workers else None,
    )


def _require_room_for_locks(number: int) -> None:
    """Raises OSError where /dev/shm has no page for each: DataLoader would fail half-way, and then complain of itself as well."""
    context = multiprocessing.get_context("forkserver")
    try:
        _ = [context.Lock() for _ in range(number)]
    except OSError as problem:
        raise OSError(problem.errno, problem.strerror, SHARED_MEMORY) from None


class _Pickler(pickle.Pickler):
    """Tensors as arrays, since their own way through pickle is torch.save; in the rank copied to where torch would have them.

    A library of matrix products may sum in another order where numbers lie elsewhere, and a run must not depend on its workers.
    """

    dispatch_table = copyreg.dispatch_table | {
        Tensor: lambda tensor: (torch.tensor, (tensor.numpy(),))
    }


def _in_one_piece(item: Any) -> tuple[Callable[[Tensor], Any], tuple[Tensor]]:
    """How a worker sends a step: as one piece of shared memory. torch would take one for each tensor, some twenty, and a file each.

    Not through the pipe, where a worker that is killed can leave half a message, on whose other half the rank waits for ever.
    """
    buffer = io.BytesIO()
    _Pickler(buffer, pickle.HIGHEST_PROTOCOL).dump(item)
    return _restored, (torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8),)


def _restored(piece: Tensor) -> Any:
    return pickle.loads(piece.numpy().data)


def _end(problem: Exception, item: Any) -> NoReturn:
    """Where a step cannot be sent, for want of shared memory: torch would have the rank wait for it."""
    os._exit(1)


def _begin(worker: int) -> None:
    """A worker ends with its server, and with its rank, on whom the server waits while it has workers; signals are the rank's affair."""
    for kind in (Step, Chunk):
        ForkingPickler.register(kind, _in_one_piece)
    Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]  # Python's own door for it
    signals.ignore_all()
    signals.die_with_parent(os.getppid())
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "a worker has been started by somebody"
    rank.join()
    os._exit(128 + signal.SIGKILL)
