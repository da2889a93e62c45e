"""Whole commands by the hundred: a process that has loaded torch and DeepSpeed runs each in a child of its own.

A start of `python -m vico` takes ten seconds before it looks at the first file. What is forked here is the same command
with its own arguments, folder, output and exit code; only the loading is shared.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

TOO_LONG = 60.0  # seconds after which a command is ended


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float


class WarmProcess:
    """The client's side: `with WarmProcess() as warm: warm.run(["train", ...], cwd)`. One command at a time."""

    def __enter__(self) -> "WarmProcess":
        alone = {
            name: value
            for name, value in os.environ.items()
            if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        }
        self._folder = tempfile.TemporaryDirectory(prefix="vico-warm-")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "support.warm_process", self._folder.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # On the CPU: a process that has touched a GPU cannot be forked.
            env={
                **alone,
                "OMP_NUM_THREADS": "1",
                "XDG_CACHE_HOME": self._folder.name,
                "CUDA_VISIBLE_DEVICES": "",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            },
            cwd=Path(__file__).resolve().parents[1],
        )
        return self

    def run(self, argv: Sequence[str], cwd: Path, *, watched: Path | None = None) -> Ended:
        """`vico ARGV` in `cwd`. `watched`: a file for what the child runs or unpickles (see `watch`)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {
            "argv": list(argv),
            "cwd": str(cwd),
            "watched": None if watched is None else str(watched),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, (Path(self._folder.name) / "log").read_text(
            encoding="utf-8", errors="replace"
        )[-2000:]
        answer = json.loads(line)
        out, err = (
            (Path(self._folder.name) / name).read_text(encoding="utf-8", errors="replace")
            for name in ("out", "err")
        )
        return Ended(answer["code"], out, err, answer["seconds"])

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._folder.cleanup()


def watch(path: Path) -> None:
    """From now on this process writes what it runs or unpickles to `path`, a line each."""
    file = path.open("a", encoding="utf-8")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in (
            "pickle.find_class",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.forkpty",
            "subprocess.Popen",
            "pty.spawn",
        ):
            print(event, repr(arguments)[:300], file=file, flush=True)

    sys.addaudithook(hook)


def main(folder: Path) -> None:
    """Load everything, then obey: each line of the input is a command."""
    answers = os.fdopen(os.dup(1), "w")
    for descriptor in (1, 2):  # what libraries say while they are loaded
        os.dup2(os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    import deepspeed.ops
    import torch

    from vico.cli import (
        check,  # noqa: F401
        convert,  # noqa: F401
    )
    from vico.distributed import world  # noqa: F401
    from vico.planner import plan  # noqa: F401
    from vico.train import (
        evaluate,  # noqa: F401
        loop,  # noqa: F401
    )

    torch.set_num_threads(1)
    assert deepspeed.ops.__compatible_ops__  # tries out the compiler, at the first look
    for line in sys.stdin:
        order = json.loads(line)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _obey(order, folder)
        code = _wait(child)
        answers.write(json.dumps({"code": code, "seconds": time.monotonic() - began}) + "\n")
        answers.flush()


def _obey(order: dict[str, Any], folder: Path) -> None:
    """The child's whole life."""
    code = 1
    try:
        os.setsid()
        for descriptor, name in ((1, "out"), (2, "err")):
            os.dup2(
                os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor
            )
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(order["cwd"])
        if order["watched"] is not None:
            watch(Path(order["watched"]))
        from vico.cli.main import main as vico

        code = vico(order["argv"])
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int:
    limit = time.monotonic() + TOO_LONG
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > limit:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        time.sleep(0.002)


@contextlib.contextmanager
def warm_processes(number: int) -> Iterator[list[WarmProcess]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(WarmProcess()) for _ in range(number)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
