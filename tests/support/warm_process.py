"""Whole commands by the hundred: a process that has loaded torch and DeepSpeed forks one for each.

A start of `python -m vico` takes seconds before it looks at the first file. Here the same command
runs with its own arguments, folder, output and exit code; only the loading is shared. Pytest is run
like this too, on a checkout whose package changes from one command to the next.
"""

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import psutil
import pytest

from faults.line_trace import TEST
from support.processes import ROOT, base_environment

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
# Seconds after which a command is killed.
TIME_LIMIT = 60.0
# What `watch` reports.
WATCHED_EVENTS = (
    "pickle.find_class os.system os.exec os.posix_spawn os.forkpty subprocess.Popen pty.spawn"
).split()
Job = TypeVar("Job")
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class CommandResult:
    code: int
    stdout: str
    stderr: str
    seconds: float


class WarmProcess:
    """The client: `with WarmProcess() as warm: warm.run(["train", ...], cwd)`. One at a time.

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
        program = "vico" if self.checkout is None else "pytest"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.warm_process", str(self._folder), program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env=base_environment(XDG_CACHE_HOME=str(self._folder), **more),
            cwd=(self.checkout or ROOT) / "tests",
        )
        return self

    def run(
        self,
        arguments: Sequence[str],
        cwd: Path,
        *,
        watched: Path | None = None,
        seconds: float = TIME_LIMIT,
    ) -> CommandResult:
        """`vico ARGUMENTS` in `cwd`. `watched`: a file for what it runs or unpickles (`watch`).

        After `seconds` it is killed, with what it started: its code is -9.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {
            "arguments": list(arguments),
            "cwd": str(cwd),
            "watched": None if watched is None else str(watched),
            "seconds": seconds,
            # Lines are noted for the test that runs this command, not for the first of all.
            "environment": {name: os.environ[name] for name in (TEST,) if name in os.environ},
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, self._read("log")[-2000:]
        answer = json.loads(line)
        stdout, stderr = self._read("out"), self._read("err")
        return CommandResult(answer["code"], stdout, stderr, answer["seconds"])

    def _read(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._process.stdout.close()
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


# ---- the process --------------------------------------------------------------------------------


def watch(path: Path) -> None:
    """From now on this process writes what it runs or unpickles to `path`, a line each."""
    file = path.open("a", encoding="utf-8")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED_EVENTS:
            print(event, repr(arguments)[:300], file=file, flush=True)

    sys.addaudithook(hook)


def main(folder: Path, program: str) -> None:
    """Load everything, then run the command of each line of the input."""
    answers = os.fdopen(os.dup(1), "w")
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for descriptor in (1, 2):  # for what libraries print while they are loaded
        os.dup2(os.open(folder / "log", flags, 0o600), descriptor)
    if program == "vico":
        _load_libraries()
    else:
        _load_test_libraries()
    own = psutil.Process().children()  # a library may have started one
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _run_command(order, folder, program)
        code = _wait(child, order["seconds"])
        if program == "pytest":
            _kill_orphans(own)
        answers.write(json.dumps({"code": code, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()


def _load_libraries() -> None:
    import deepspeed.ops
    import torch

    from vico.cli import check, convert  # noqa: F401
    from vico.distributed import world  # noqa: F401
    from vico.planner import plan  # noqa: F401
    from vico.train import evaluate, loop  # noqa: F401

    torch.set_num_threads(1)
    assert deepspeed.ops.__compatible_ops__  # the first look tries out the compiler


def _load_test_libraries() -> None:
    """What tests import, without the package, which each command imports as it is then."""
    import deepspeed.ops
    import hypothesis
    import safetensors.torch
    import torch
    import yaml

    torch.set_num_threads(1)
    # A counterexample is enough here: making it small can take minutes.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("any_example", phases=phases)
    hypothesis.settings.load_profile("any_example")
    assert deepspeed.ops.__compatible_ops__
    assert safetensors.torch and yaml
    # Tests start processes that lead sessions of their own. With this they become children of
    # this process when the test is killed, so that it can kill them too.
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    for name in list(sys.modules):
        if name.split(".")[0] in ("vico", "support"):
            del sys.modules[name]


def _run_command(order: dict[str, Any], folder: Path, program: str) -> None:
    """The child's whole life."""
    code = 1
    try:
        os.setsid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, flags, 0o600), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["cwd"])
        os.environ.update(order["environment"])
        if order["watched"] is not None:
            watch(Path(order["watched"]))
        if program == "pytest":
            code = int(pytest.main(order["arguments"]))
        else:
            from vico.cli.main import main as vico

            code = vico(order["arguments"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


def _kill_orphans(own: list[psutil.Process]) -> None:
    """Kill the processes that a test has left behind."""
    orphans = [p for p in psutil.Process().children(recursive=True) if p not in own]
    for orphan in orphans:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(orphans, timeout=5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
