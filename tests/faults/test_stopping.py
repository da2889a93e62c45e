"""A run that a signal stops saves, and resumes to the bits of an undisturbed run."""

import contextlib
import functools
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import psutil
import pytest

from faults.interrupted import (
    ENDLESS,
    FLAGS,
    assert_same_end,
    interrupt,
    steps_done,
    train_command,
)
from support.processes import ROOT, Processes, base_environment, run_command, succeeds
from support.toy_dataset import ToyData
from vico.distributed import signals


def _has_done(out: Path, steps: int) -> bool:
    return steps_done(out) >= steps


@pytest.mark.parametrize(
    ("number", "code", "receivers"),
    [
        (signal.SIGTERM, 75, "one"),
        pytest.param(signal.SIGTERM, 75, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR2, 75, "all", marks=pytest.mark.slow),
        # test_ctrl_c_on_a_terminal is its fast twin.
        pytest.param(signal.SIGINT, 130, "all", marks=pytest.mark.slow),
    ],
)
def test_a_signal_loses_no_step(
    toy: ToyData,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    receivers: str,
) -> None:
    """Twice, wherever the signal meets the run: in a step, in a save, in an evaluation.

    `all`: every process gets it, data workers and their server too. The terminal's encoding lacks
    a letter of the folder's name.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = tmp_path / "öut"
    command = train_command(toy, 2, out, "--num_workers", str(int(receivers == "all")))

    def send(run: Processes) -> None:
        ranks = [psutil.Process(process.pid) for process in run.processes]
        processes = ranks[1:]
        if receivers == "all":
            processes = []
            for rank in ranks:
                processes += rank.children(recursive=True)
            processes += ranks
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for target in (1, 3):
        run = interrupt(command, 2, functools.partial(_has_done, out, target), send)
        assert run.codes == [code, code], run.output
        assert "Traceback" not in run.output
        assert r"\xf6ut/checkpoint-" in run.stdouts[0]
        saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
        assert saved == steps_done(out) >= target
    output = succeeds(*command, ranks=2).stdouts[0]
    assert f"resuming from step {saved}" in output or "nothing to train" in output
    assert_same_end(out, undisturbed)


def test_ctrl_c_on_a_terminal(toy: ToyData, tmp_path: Path) -> None:
    """The key reaches every process of the terminal, and the ranks again through their launcher."""
    out = tmp_path / "out"
    arguments = [*toy.flags, *FLAGS, *ENDLESS, "--batch_size", "4", "--output_dir", str(out)]
    command = ["bash", str(ROOT / "launch" / "train.sh"), *arguments, "--num_workers", "1"]
    environment = base_environment(VICO_RANKS="2")
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", command, environment)
    limit = threading.Timer(120, os.killpg, (pid, signal.SIGKILL))
    limit.start()
    printed, pressed = b"", False
    with contextlib.suppress(OSError):  # how a terminal ends
        while piece := os.read(terminal, 1 << 16):
            printed += piece
            if not pressed and steps_done(out) >= 3:
                os.write(terminal, b"\x03")
                pressed = True
    limit.cancel()
    os.close(terminal)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    text = printed.decode()
    assert pressed and code == 130, text
    assert text.count("vico: stopped by SIGINT; saved ") == 1, text
    assert "Traceback" not in text and "error" not in text, text
    assert (out / f"checkpoint-{steps_done(out)}").exists()


def test_a_closed_terminal(toy: ToyData, tmp_path: Path) -> None:
    """Nobody reads the outputs, and the hang-up reaches every process: the run saves, and says so.

    Ctrl-\\ before it prints the stacks, and ends nothing.
    """
    out = tmp_path / "out"
    arguments = [*toy.flags, *FLAGS, *ENDLESS, "--batch_size", "4", "--output_dir", str(out)]
    command = ["bash", str(ROOT / "launch" / "train.sh"), *arguments, "--num_workers", "1"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(tmp_path / "stderr", "w", encoding="utf-8") as stderr:
        run = subprocess.Popen(
            command,
            env=base_environment(VICO_RANKS="2"),
            stdout=writer,
            stderr=stderr,
            start_new_session=True,
        )
    os.close(writer)
    limit = threading.Timer(120, os.killpg, (run.pid, signal.SIGKILL))
    limit.start()
    for number, step in ((signal.SIGQUIT, 2), (signal.SIGHUP, 5)):
        while steps_done(out) < step and run.poll() is None:
            time.sleep(0.01)
        os.killpg(run.pid, number)
    code = run.wait()
    limit.cancel()
    lost, stacks = (out / "output.txt").read_text(), (tmp_path / "stderr").read_text()
    assert code == 75, lost
    assert "stdout takes no output (Broken pipe)" in lost and "Traceback" not in lost + stacks
    saved = f"saved {out}/checkpoint-{steps_done(out)};"
    assert f"vico: stopped by SIGHUP; {saved}" in lost and steps_done(out) >= 5
    assert "vico/train/loop.py" in stacks and "error" not in stacks, stacks


TWO_SIGNALS = """
import os, signal, sys, time
from vico.distributed import signals
signals.ECHO_SECONDS = 0.2
signals.install_handlers()
first, second = (signal.Signals[name] for name in sys.argv[1:])
os.kill(os.getpid(), first)
os.kill(os.getpid(), second)  # the echo of the first, through a launcher
print(signals.stop_requested(), flush=True)
time.sleep(0.4)
os.kill(os.getpid(), second)
print("still running", flush=True)
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "survives"),
    [
        ("SIGTERM", "SIGTERM", 143, False),
        ("SIGUSR1", "SIGTERM", 143, False),
        ("SIGINT", "SIGINT", 130, False),
        ("SIGTERM", "SIGUSR1", 0, True),
        ("SIGXCPU", "SIGXCPU", 0, True),
        ("SIGUSR2", "SIGHUP", 0, True),
        ("SIGHUP", "SIGTERM", 143, False),
    ],
)
def test_a_second_signal_ends_at_once(first: str, second: str, code: int, survives: bool) -> None:
    """Except a scheduler's or terminal's warning, and a signal that a launcher repeats."""
    run = run_command([sys.executable, "-c", TWO_SIGNALS, first, second], seconds=60)
    assert (run.codes, run.stderrs) == ([code], [""])
    after = "still running\n" if survives else ""
    assert run.stdouts[0] == f"{signal.Signals[first].value}\n{after}"


def test_the_first_sigterm_after_a_warning_ends_nothing() -> None:
    """SLURM's SIGUSR1 before the time limit, and its SIGTERM at the limit: a save has time."""
    code = TWO_SIGNALS.replace("os.kill(os.getpid(), second)  # the echo", "# the echo")
    run = run_command([sys.executable, "-c", code, "SIGUSR1", "SIGTERM"], seconds=60)
    assert run.codes == [0] and run.stdouts[0].endswith("still running\n"), run.output


def test_nohup_keeps_hang_ups_away() -> None:
    code = "import os, signal\nfrom vico.distributed import signals\nsignals.install_handlers()\n"
    code += "os.kill(os.getpid(), signal.SIGHUP)\nprint(signals.stop_requested())"
    run = run_command(["nohup", sys.executable, "-c", code], seconds=60)
    assert (run.codes, run.stdouts) == ([0], ["0\n"])


def test_a_process_whose_parent_has_ended_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it ended before the kernel was asked to see to it; as if killed."""
    asked: list[tuple[int, int]] = []
    library = types.SimpleNamespace(prctl=lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda name: library)
    monkeypatch.setattr(os, "_exit", sys.exit)
    signals.die_with_parent(os.getppid())
    assert asked == [(1, signal.SIGKILL)]
    with pytest.raises(SystemExit) as end:
        signals.die_with_parent(0)
    assert end.value.code == 137
