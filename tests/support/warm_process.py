"""Whole commands by the hundred, one at a time, by a process that has loaded torch and DeepSpeed.

Pytest is run like this too, on a checkout whose package changes from one command to the next.
"""

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from faults.line_trace import TEST
from support import fork_server
from support.fork_server import ForkServer
from support.processes import ROOT, base_environment

# Seconds after which a command is killed.
TIME_LIMIT = 60.0
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class CommandResult:
    code: int
    stdout: str
    stderr: str
    seconds: float


class WarmProcess:
    """`with WarmProcess() as warm: warm.run(["train", ...], cwd)`. One at a time.

    `checkout`: run pytest on it, and load nothing of it before a command does.
    """

    def __init__(self, checkout: Path | None = None) -> None:
        self.checkout = checkout

    def __enter__(self) -> "WarmProcess":
        self._temporary = tempfile.TemporaryDirectory(prefix="vico-warm-")
        self._folder = Path(self._temporary.name)
        # On the CPU: a process that has touched a GPU cannot be forked.
        more = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        if self.checkout is not None:
            paths = [str(self.checkout), str(self.checkout / "tests")]
            more |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
        environment = base_environment(XDG_CACHE_HOME=str(self._folder), **more)
        loads = fork_server.PACKAGE if self.checkout is None else fork_server.TESTS
        self._server = ForkServer(environment, (self.checkout or ROOT) / "tests", loads)
        return self

    def run(
        self,
        arguments: Sequence[str],
        cwd: Path,
        *,
        watched: Path | None = None,
        seconds: float = TIME_LIMIT,
    ) -> CommandResult:
        """`vico ARGUMENTS` in `cwd`. `watched`: a file for what it runs or unpickles.

        After `seconds` it is killed, with what it started: its code is -9.
        """
        outputs = [self._folder / name for name in ("out", "err")]
        for path in outputs:
            path.unlink(missing_ok=True)
        # Lines are noted for the test that runs this command, not for the first of all.
        test = {name: os.environ[name] for name in (TEST,) if name in os.environ}
        began = time.monotonic()
        process = self._server.start(
            ["-m", "vico" if self.checkout is None else "pytest", *arguments],
            cwd,
            {**self._server.environment, **test},
            [str(path) for path in outputs],
            watched,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait(seconds)
        taken = time.monotonic() - began
        stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in outputs)
        return CommandResult(code, stdout, stderr, taken)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.close()
        self._temporary.cleanup()


@contextlib.contextmanager
def warm_processes(number: int) -> Iterator[list[WarmProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WarmProcess()) for _ in range(number)]


def share_out(
    jobs: Sequence[Job], workers: Sequence[WarmProcess], do: Callable[[Job, WarmProcess], Outcome]
) -> list[Outcome]:
    """The outcomes of `do(job, worker)`, in the order of `jobs`; each worker does one at a time."""
    free: queue.SimpleQueue[WarmProcess] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    def work(job: Job) -> Outcome:
        worker = free.get()
        try:
            return do(job, worker)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as pool:
        return list(pool.map(work, jobs))
