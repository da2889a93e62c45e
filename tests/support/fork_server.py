"""Python processes that need not load: a server that has loaded torch and DeepSpeed forks them.

`python -m vico` loads for four seconds before it looks at the first file; a toy run takes half a
second. A forked process runs the same program as `__main__`, with arguments, variables, folder,
outputs and exit code of its own; only the loading is shared.
"""

import contextlib
import ctypes
import faulthandler
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import psutil

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
START_SECONDS = 120.0  # until the server has loaded
# What a server loads before it forks: the package, or only what its tests import.
PACKAGE, TESTS = "package", "tests"
# A variable whose place is the room for those of a child.
ROOM, ROOM_BYTES = "VICO_FORK_SERVER_ROOM", 1 << 15
# What `_watch` reports.
WATCHED_EVENTS = (
    "pickle.find_class os.system os.exec os.posix_spawn os.forkpty subprocess.Popen pty.spawn"
).split()


class ForkedProcess:
    """What tests use of subprocess.Popen."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.has_started, self._has_ended = threading.Event(), threading.Event()

    def end(self, code: int) -> None:
        self.returncode = code
        self.has_started.set()  # a killed server says nothing else
        self._has_ended.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._has_ended.wait(timeout) or self.returncode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class ForkServer:
    """The client of a server process. Its threads may start processes at the same time."""

    def __init__(self, environment: Mapping[str, str], cwd: Path, loads: str = PACKAGE) -> None:
        self.environment = dict(environment)
        self._log, path = tempfile.mkstemp()  # what libraries print while they are loaded
        os.unlink(path)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "support.fork_server", loads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            encoding="utf-8",
            # The level is what commands set before they load torch.
            env={**self.environment, ROOM: " " * ROOM_BYTES, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            cwd=cwd,
        )
        self._lock = threading.Lock()
        self._processes: list[ForkedProcess] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def start(
        self,
        words: Sequence[str],
        cwd: Path,
        environment: Mapping[str, str],
        outputs: Sequence[str],
        watched: Path | None = None,
    ) -> ForkedProcess:
        """`python WORDS`, the first of which is -m, -c or a file. It leads a session of its own.

        `outputs`: the paths of stdout and stderr, which are open when this returns. `watched`: a
        file for what it runs or unpickles.
        """
        process = ForkedProcess()
        order: dict[str, object] = {
            "words": list(words),
            "cwd": str(cwd),
            "environment": dict(environment),
            "outputs": list(outputs),
            "watched": None if watched is None else str(watched),
        }
        assert self._server.stdin is not None
        with self._lock:
            order["number"] = len(self._processes)
            self._processes.append(process)
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
        has_started = process.has_started.wait(START_SECONDS)
        assert has_started and process.pid, os.pread(self._log, 1 << 20, 0)[-2000:].decode()
        return process

    def _read(self) -> None:
        """Note what the server says, until it ends."""
        assert self._server.stdout is not None
        for line in self._server.stdout:
            number, event, value = json.loads(line)
            process = self._processes[number]
            if event == "started":
                process.pid = value
                process.has_started.set()
            else:
                process.end(value)
        for process in self._processes:
            if process.returncode is None:
                process.end(-signal.SIGKILL)

    def close(self) -> None:
        """End the server, which kills what it has started."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        try:
            self._server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()
        self._reader.join()
        self._server.stdout.close()
        os.close(self._log)


# ---- the server ---------------------------------------------------------------------------------


class _Server:
    """One thread: it forks at an order, and reports when a child ends."""

    def __init__(self, answers: int, kills_orphans: bool) -> None:
        self._answers, self._kills_orphans = answers, kills_orphans
        self._children: dict[int, int] = {}  # numbers of processes by pid
        self._libraries = psutil.Process().children()  # a library may have started one

    def serve(self) -> None:
        """Until the client closes the input."""
        signals, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        orders = b""
        while True:
            readable, _, _ = select.select([0, signals], [], [])
            if signals in readable:
                os.read(signals, 1 << 12)
                self._reap()
            if 0 in readable:
                chunk = os.read(0, 1 << 16)
                if not chunk:
                    break
                *lines, orders = (orders + chunk).split(b"\n")
                for line in lines:
                    self._fork(json.loads(line), (signals, writer))
        for pid in self._children:
            _kill_session(pid)

    def _fork(self, order: dict[str, Any], own: tuple[int, int]) -> None:
        pid = os.fork()
        if pid:
            self._children[pid] = order["number"]
            return
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in own:
            os.close(descriptor)
        _run(order, self._answers)

    def _reap(self) -> None:
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if self._kills_orphans:
                self._kill_orphans()
            if (number := self._children.pop(pid, None)) is not None:
                _say(self._answers, number, "ended", os.waitstatus_to_exitcode(status))

    def _kill_orphans(self) -> None:
        """Kill the processes that a test has left behind."""
        kept = {child.pid for child in self._libraries} | set(self._children)
        orphans = [child for child in psutil.Process().children() if child.pid not in kept]
        for orphan in orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in [*orphan.children(recursive=True), orphan]:
                    process.kill()
        psutil.wait_procs(orphans, timeout=5)


def _say(answers: int, number: int, event: str, value: int) -> None:
    os.write(answers, json.dumps([number, event, value]).encode() + b"\n")


def _kill_session(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run(order: dict[str, Any], answers: int) -> NoReturn:
    """The child's whole life."""
    code = 1
    try:
        os.setsid()
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for descriptor, path in enumerate((os.devnull, *order["outputs"])):
            opened = os.open(path, flags if descriptor else os.O_RDONLY, 0o600)
            os.dup2(opened, descriptor)
            os.close(opened)
        os.chdir(order["cwd"])
        _set_variables(order["environment"])
        _say(answers, order["number"], "started", os.getpid())
        os.close(answers)
        if order["watched"] is not None:
            _watch(Path(order["watched"]))
        _run_program(order["words"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _run_program(words: Sequence[str]) -> None:
    """As Python would with these words: -m MODULE, -c CODE or a file, and arguments."""
    sys.path[0] = os.getcwd()
    if words[0] == "-m":
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = main_module = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main_module))
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def _set_variables(environment: Mapping[str, str]) -> None:
    """Make them those of this process, for itself and for others, which read them in /proc.

    Ranks know their peers by that. /proc shows the place where they lay when the server began.
    """
    os.environ.clear()
    os.environ.update(environment)
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    first, last = (int(fields[number - 3]) for number in (50, 51))  # as proc(5) numbers them
    shown = b"".join(name + b"=" + value + b"\0" for name, value in os.environb.items())
    assert len(shown) <= last - first
    ctypes.memset(first, 0, last - first)
    ctypes.memmove(first, shown, len(shown))
    # What has been read while the server loaded.
    if os.environ.get("PYTHONFAULTHANDLER"):
        faulthandler.enable()
    if failpoints := sys.modules.get("vico.io.failpoints"):
        failpoints.arm(os.environ.get("VICO_FAILPOINT"))


def _watch(path: Path) -> None:
    """From now on this process writes what it runs or unpickles to `path`, a line each."""
    file = path.open("a", encoding="utf-8")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in WATCHED_EVENTS:
            print(event, repr(arguments)[:300], file=file, flush=True)

    sys.addaudithook(hook)


def _load_package() -> None:
    import deepspeed.ops
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401

    from vico.cli import check, convert, train  # noqa: F401
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


def main(loads: str) -> None:
    """Load, then serve."""
    answers = os.dup(1)
    os.dup2(2, 1)  # for what libraries print
    if loads == PACKAGE:
        _load_package()
    else:
        _load_test_libraries()
    gc.collect()
    gc.freeze()  # or a child's collector would copy all pages that it looks at
    _Server(answers, kills_orphans=loads == TESTS).serve()


if __name__ == "__main__":
    main(sys.argv[1])
