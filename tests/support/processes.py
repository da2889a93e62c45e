"""Processes that tests and fault scenarios start: the ranks of a command, or any other command.

    run = start("train", *flags, ranks=2)  # as a launcher starts them
    run.wait_until(lambda: steps_logged(out) >= 3)  # outputs can be read meanwhile
    run.processes[1].kill()
    assert run.wait(60) == [5, -9], run.output

`vico` and `succeeds` start and wait in one call; `launch` uses a script of launch/. Each process
leads a session of its own, on one thread, without the rank variables of the test process.

On a CPU, ranks are forked by a server that has loaded torch (fork_server.py). Ranks of even and of
odd numbers have one each, so that their hashes differ, as those of processes always do.
"""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from faults.line_trace import TEST
from support.fork_server import ForkedProcess, ForkServer
from vico.distributed.launcher_env import SINGLE_RANK

ROOT = Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
VICO = ("-m", "vico")
# Limit of a toy run. A whole one takes about ten seconds on two idle cores.
RUN_SECONDS = 240.0
SECONDS_AFTER_ABORT = 5.0
RANK_VARIABLES = (*SINGLE_RANK, "LOCAL_WORLD_SIZE", "MASTER_PORT")
# Variables that nothing reads while it is loaded.
READ_LATE = {*RANK_VARIABLES, "MASTER_ADDR", "VICO_FAILPOINT", "PYTHONFAULTHANDLER", TEST}
READ_LATE |= {"PYTEST_CURRENT_TEST", "XDG_CACHE_HOME", "TORCH_EXTENSIONS_DIR", "HF_HOME"}
# What libraries and commands that ran in this process have set for processes that they start.
SET_IN_PASSING = {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "PYTORCH_NVML_BASED_CUDA_CHECK"}
SET_IN_PASSING |= {"PYTHONSAFEPATH", "PYTHONWARNINGS", "TORCHINDUCTOR_CACHE_DIR"}
SET_IN_PASSING |= {"KMP_DUPLICATE_LIB_OK"}
# By the remainder of a rank, each made when it is needed; and the variables that they load with.
_servers: dict[int, ForkServer | None] = {}
_environment: dict[str, str] = {}
# Under `nohup` processes inherit that SIGHUP is ignored, but not that a function takes it.
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)


# All that this process has started and still refers to. tests/conftest.py ends what a test leaves.
STARTED: weakref.WeakSet["Processes"] = weakref.WeakSet()


class Processes:
    """Running commands. Threads collect their outputs, which can be read at any time."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        cwd: Path | None = None,
        servers: Sequence[ForkServer | None] = (),
    ) -> None:
        """`servers`: what forks the command, which is then Python's; None: it is started."""
        self.processes: list[subprocess.Popen[bytes] | ForkedProcess] = []
        self._stdouts: list[_Reader] = []
        self._stderrs: list[_Reader] = []
        self.codes: list[int | None] = []
        STARTED.add(self)
        all_servers = servers or [None] * len(commands)
        for command, environment, server in zip(commands, environments, all_servers, strict=True):
            if server is None:
                self._open(command, environment, cwd)
            else:
                self._fork(server, command, environment, cwd)

    def _open(
        self, command: Sequence[str], environment: Mapping[str, str], cwd: Path | None
    ) -> None:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdout is not None and process.stderr is not None
        self._add(process, process.stdout, process.stderr)

    def _fork(
        self,
        server: ForkServer,
        command: Sequence[str],
        environment: Mapping[str, str],
        cwd: Path | None,
    ) -> None:
        pipes = [os.pipe() for _ in ("stdout", "stderr")]
        outputs = [f"/proc/{os.getpid()}/fd/{writer}" for _, writer in pipes]
        process = server.start(command[1:], cwd or Path.cwd(), environment, outputs)
        for _, writer in pipes:
            os.close(writer)
        self._add(process, *(os.fdopen(reader, "rb", 0) for reader, _ in pipes))

    def _add(
        self,
        process: "subprocess.Popen[bytes] | ForkedProcess",
        stdout: IO[bytes],
        stderr: IO[bytes],
    ) -> None:
        self.processes.append(process)
        self._stdouts.append(_Reader(stdout))
        self._stderrs.append(_Reader(stderr))

    @property
    def stdouts(self) -> list[str]:
        return [reader.text for reader in self._stdouts]

    @property
    def stderrs(self) -> list[str]:
        return [reader.text for reader in self._stderrs]

    @property
    def output(self) -> str:
        return "\n".join([*self.stdouts, *self.stderrs])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("vico: error: ")]

    @property
    def running(self) -> bool:
        """Whether none has ended."""
        return all(process.poll() is None for process in self.processes)

    def wait_until(self, condition: Callable[[], bool], seconds: float = RUN_SECONDS) -> bool:
        """Wait for `condition`. False when a process ends, or the time is over, before it holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not self.running or time.monotonic() > deadline:
                return condition()
            time.sleep(0.001)
        return True

    def wait(self, seconds: float = RUN_SECONDS) -> list[int | None]:
        """Wait for all processes and for children that hold their outputs open; returns `codes`.

        The code of a process that has not ended in time is None. It is aborted, at which Python's
        faulthandler (PYTHONFAULTHANDLER=1) writes its stacks to stderr. Then all processes and
        their children are killed.
        """
        deadline = time.monotonic() + seconds
        self.codes = [self._code_until(deadline, index) for index in range(len(self.processes))]
        if None in self.codes:
            for process, code in zip(self.processes, self.codes, strict=True):
                if code is None and process.poll() is None:
                    process.send_signal(signal.SIGABRT)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(SECONDS_AFTER_ABORT)
            self.kill()
        return self.codes

    def _code_until(self, deadline: float, index: int) -> int | None:
        try:
            code = self.processes[index].wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        for reader in (self._stdouts[index], self._stderrs[index]):
            reader.join(max(0.1, deadline - time.monotonic()))
            if reader.is_alive():
                return None
        return code

    def kill(self) -> None:
        """Kill the processes and all their children."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for reader in (*self._stdouts, *self._stderrs):
            reader.join(1.0)


class _Reader(threading.Thread):
    """Collects what comes through a pipe until all its writers have closed it."""

    def __init__(self, pipe: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self._pipe, self._chunks = pipe, [b""]
        self.start()

    def run(self) -> None:
        with self._pipe:
            while chunk := os.read(self._pipe.fileno(), 1 << 16):
                self._chunks.append(chunk)

    @property
    def text(self) -> str:
        """So far; with \\n for every kind of line end."""
        text = b"".join(self._chunks).decode("utf-8", "replace")
        return io.StringIO(text, newline=None).getvalue()


def clean_environment() -> dict[str, str]:
    """This process's environment without rank variables: a test may have made it a rank."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def base_environment(**more: str) -> dict[str, str]:
    """For a command of this checkout."""
    paths = [PYTHONPATH, *filter(None, [os.environ.get("PYTHONPATH")])]
    ours = {
        "PYTHON": sys.executable,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }
    return {**clean_environment(), **ours, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def start(
    *arguments: str,
    ranks: int,
    only: Sequence[int] | None = None,
    program: Sequence[str] = VICO,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    rank_environments: Mapping[int, Mapping[str, str]] | None = None,
    forks: bool = True,
) -> Processes:
    """`vico ARGUMENTS` (or another Python program) on this many ranks, as srun starts them.

    `only`: start just these of the ranks. `environment` adds variables for all ranks,
    `rank_environments` for single ones. They meet on a free port. `forks`: fork the processes where
    their variables allow it.
    """
    started = range(ranks) if only is None else only
    world = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    environments, servers = [], []
    for rank in started:
        given = {**(environment or {}), **(rank_environments or {}).get(rank, {})}
        own = {**world, "RANK": str(rank), "LOCAL_RANK": str(rank), **given}
        environments.append(base_environment(**own))
        can_fork = forks and given.keys() <= READ_LATE
        servers.append(_server(rank) if can_fork else None)
    command = [sys.executable, *program, *arguments]
    return Processes([command] * len(environments), environments, cwd, servers)


@contextlib.contextmanager
def forked_ranks() -> Iterator[None]:
    """Within, `start` forks ranks where it can. Not near a GPU: CUDA does not outlive a fork."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    _servers.clear()
    _servers.update(dict.fromkeys((0, 1)))
    _environment.update(base_environment())
    yield
    servers = [server for server in _servers.values() if server is not None]
    _servers.clear()
    for server in servers:
        server.close()


def _server(rank: int) -> ForkServer | None:
    """What forks this rank; None where it must load by itself: other variables are set now."""
    now = base_environment()
    changed = {n for n in {*now, *_environment} if now.get(n) != _environment.get(n)}
    if not _servers or not changed <= READ_LATE | SET_IN_PASSING:
        return None
    server = _servers[rank % 2] or ForkServer(_environment, ROOT / "tests")
    _servers[rank % 2] = server
    return server


def start_command(
    command: Sequence[str], cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> Processes:
    """One process of any command. `environment` is the whole of it."""
    return Processes([command], [base_environment() if environment is None else environment], cwd)


def launch(
    script: str,
    *arguments: str,
    ranks: int,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Processes:
    """`launch/SCRIPT ARGUMENTS`, as users start training and evaluation."""
    command = ["bash", str(ROOT / "launch" / script), *arguments]
    variables = {**base_environment(VICO_RANKS=str(ranks)), **(environment or {})}
    return start_command(command, cwd, variables)


def run_command(
    command: Sequence[str],
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = RUN_SECONDS,
) -> Processes:
    """`start_command`, and wait."""
    run = start_command(command, cwd, environment)
    run.wait(seconds)
    return run


def vico(
    *arguments: str, ranks: int = 1, cwd: Path | None = None, seconds: float = RUN_SECONDS
) -> Processes:
    """`start`, and wait."""
    run = start(*arguments, ranks=ranks, cwd=cwd)
    run.wait(seconds)
    return run


def succeeds(*arguments: str, ranks: int = 1, cwd: Path | None = None) -> Processes:
    """`vico`, and every rank ends with 0."""
    run = vico(*arguments, ranks=ranks, cwd=cwd)
    assert run.codes == [0] * ranks, run.output
    return run
