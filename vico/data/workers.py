"""Data workers: processes that prepare the batches of training and evaluation ahead.

They are forked from a server that has no threads, and not from the rank: a fork copies every lock as it is, and one that a thread
of gloo, of autograd or of TensorBoard holds at that moment is held for ever in the child. Python 3.11 itself then hangs inside
os.fork, and the run with it: seen once in some hundreds of forks.
"""

import multiprocessing
import os
import signal
import threading
from multiprocessing import forkserver, resource_tracker
from typing import Any

from torch.utils.data import DataLoader

from vico import stopping
from vico.data.batches import EvaluationChunks, TrainingSteps

AHEAD = 4  # batches that each worker prepares before they are asked for
QUIET = "ignore:resource_tracker"  # when a rank was killed, Python's helper removes its semaphores, which is right, and says so


def start_server() -> None:
    """Idempotent. It imports torch, which takes seconds: called early, this costs nobody time.

    The signals by which a run is asked to stop must not end it, nor Python's own helper: they stay blocked in both.
    """
    multiprocessing.set_forkserver_preload(["torch", "vico.data.batches"])
    if QUIET not in os.environ.get("PYTHONWARNINGS", ""):
        os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), QUIET]))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
    try:
        resource_tracker.ensure_running()  # which lets two of them through when it starts
        signal.pthread_sigmask(signal.SIG_BLOCK, stopping.SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def loader(dataset: TrainingSteps | EvaluationChunks, items: Any, num_workers: int, pin: bool) -> DataLoader[Any]:
    """The dataset's `items` in this order, prepared ahead by `num_workers` processes."""
    if num_workers:
        start_server()
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


def _begin(worker: int) -> None:
    """A worker ends with its server, and with its rank, on whom the server waits while it has workers; signals are the rank's affair."""
    stopping.ignore()
    stopping.end_with(os.getppid())
    threading.Thread(target=_end_with_rank, daemon=True).start()


def _end_with_rank() -> None:
    rank = multiprocessing.parent_process()
    assert rank is not None, "a worker has been started by somebody"
    rank.join()
    os._exit(128 + signal.SIGKILL)
