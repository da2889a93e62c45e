"""A run that is asked to stop, killed or found damaged goes on where it stood, and ends in the bits of an undisturbed one."""

import contextlib
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from support.toy_dataset import ROOT, Ended, ToyData, end, records, start, succeeds, vico
from vico.distributed.launcher_env import SINGLE_RANK

FLAGS = [
    "--epochs",
    "2",
    "--warmup_epochs",
    "1",
    "--lr",
    "0.02",
    "--bias",
    "0.7",
]  # of 20 questions: 3 steps of 8 an epoch
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return ToyData(tmp_path_factory.mktemp("world"))


def flags(toy: ToyData, ranks: int) -> list[str]:
    return ["train", *toy.flags, *FLAGS, "--batch_size", str(8 // ranks), "--save_steps", "2"]


@pytest.fixture(scope="module")
def undisturbed(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    succeeds(*flags(toy, 2), "--output_dir", str(folder), ranks=2)
    return folder


def disturb(
    command: list[str],
    ranks: int,
    when: Callable[[], bool],
    hit: Callable[[list["subprocess.Popen[str]"]], None],
) -> Ended:
    """Start, wait for `when`, then `hit` the ranks' processes."""
    processes = start(*command, ranks=ranks)
    deadline = time.monotonic() + 120
    while not when() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.002)
    hit(processes)
    return end(processes, 120)


def steps_done(folder: Path) -> int:
    path = folder / "steps.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def same_end(a: Path, b: Path) -> None:
    for folder in ("checkpoint-6", "checkpoint_best"):
        for name in (WEIGHTS, "optimizer.safetensors"):
            assert (a / folder / name).read_bytes() == (b / folder / name).read_bytes(), (
                folder,
                name,
            )
    losses = [
        [(line["step"], line["loss"]) for line in records(folder / "steps.jsonl")]
        for folder in (a, b)
    ]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == [1, 2, 3, 4, 5, 6]
    assert records(a / "log.txt") == records(b / "log.txt")


@pytest.mark.parametrize(
    ("number", "code", "who"),
    [
        (signal.SIGTERM, 75, "one"),
        pytest.param(signal.SIGTERM, 75, "all", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 75, "all", marks=pytest.mark.slow),
        (signal.SIGINT, 130, "all"),
    ],
)
def test_asked_to_stop_loses_no_step(
    toy: ToyData,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
    who: str,
) -> None:
    """Again and again, wherever the signal meets the run: in a step, in a save, in an evaluation. `all`: data workers and theirs, too.

    The terminal knows less letters than the folder's name has.
    """
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = tmp_path / "öut"
    command = [*flags(toy, 2), "--output_dir", str(out), "--num_workers", str(int(who == "all"))]

    def hit(processes: list["subprocess.Popen[str]"]) -> None:
        ranks = [psutil.Process(process.pid) for process in processes]
        helpers = [helper for rank in ranks for helper in rank.children(recursive=True)]
        for process in (*helpers, *ranks) if who == "all" else ranks[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    for target in (1, 3):
        ended = disturb(command, 2, lambda t=target: steps_done(out) >= t, hit)  # type: ignore[misc]
        assert (
            ended.codes == [code, code]
            and "Traceback" not in ended.output
            and r"\xf6ut/checkpoint-" in ended.stdouts[0]
        )
        saved = max(int(path.name.split("-")[1]) for path in out.glob("checkpoint-*"))
        assert saved == steps_done(out) >= target
    said = succeeds(*command, ranks=2).stdouts[0]
    assert f"resuming from step {saved}" in said or "nothing to train" in said
    same_end(out, undisturbed)


def test_ctrl_c_on_a_terminal(toy: ToyData, tmp_path: Path) -> None:
    """The key reaches every process of the terminal, and the ranks once more through their launcher."""
    out = tmp_path / "out"
    command = [
        "bash",
        str(ROOT / "launch" / "train.sh"),
        *flags(toy, 2)[1:],
        "--epochs",
        "200",
        "--save_steps",
        "1000",
    ]
    of_a_rank = (*SINGLE_RANK, "MASTER_PORT")  # which a test before this one may have been
    ours = {name: value for name, value in os.environ.items() if name not in of_a_rank}
    environment = {**ours, "VICO_RANKS": "2", "PYTHON": sys.executable}
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe("bash", [*command, "--output_dir", str(out), "--num_workers", "1"], environment)
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
    assert pressed and os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130, printed.decode()
    text = printed.decode()
    assert (
        text.count("vico: stopped by SIGINT; saved ") == 1
        and "Traceback" not in text
        and "error" not in text
    ), text
    assert (out / f"checkpoint-{steps_done(out)}").exists()


TWICE = """
import os, signal, sys, time
from vico import stopping
stopping.ECHO_SECONDS = 0.2
signals.install_handlers()
first, second = (signal.Signals[name] for name in sys.argv[1:])
os.kill(os.getpid(), first)
os.kill(os.getpid(), second)  # the echo of the first, through a launcher
print(signals.stop_requested(), flush=True)
time.sleep(0.4)
os.kill(os.getpid(), second)
print("lives on", flush=True)
"""


@pytest.mark.parametrize(
    ("first", "second", "code", "lives_on"),
    [
        ("SIGTERM", "SIGTERM", 143, ""),
        ("SIGUSR1", "SIGTERM", 143, ""),
        ("SIGINT", "SIGINT", 130, ""),
        ("SIGTERM", "SIGUSR1", 0, "lives on"),
    ],
)
def test_asked_twice_it_ends_at_once(first: str, second: str, code: int, lives_on: str) -> None:
    """A scheduler's warning, SIGUSR1, is none to end at once; nor is a signal that comes once more through a launcher."""
    done = subprocess.run(
        [sys.executable, "-c", TWICE, first, second],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (code, ""), done
    assert done.stdout.split("\n", 1) == [
        str(signal.Signals[first].value),
        f"{lives_on}\n" if lives_on else "",
    ]


@pytest.mark.slow
def test_killed_ranks_go_on_at_the_last_save(
    toy: ToyData, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*flags(toy, 2), "--output_dir", str(out)]
    ended = disturb(
        command,
        2,
        lambda: steps_done(out) >= 5,
        lambda processes: [p.kill() for p in processes] and None,
    )
    assert ended.codes == [-9, -9] and (out / "checkpoint-4").exists()
    assert "resuming from step" in succeeds(*command, ranks=2).stdouts[0]
    same_end(out, undisturbed)


def test_a_damaged_checkpoint_is_passed_over(
    toy: ToyData, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-6")
    data = bytearray((out / "checkpoint-4" / WEIGHTS).read_bytes())
    data[-5] ^= 4
    (out / "checkpoint-4" / WEIGHTS).write_bytes(data)
    os.truncate(out / "checkpoint-3" / "optimizer.safetensors", 1000)
    command = [*flags(toy, 1), "--output_dir", str(out)]
    said = succeeds(*command).stdouts[0]
    assert (
        f"passed over: {out}/checkpoint-4/{WEIGHTS}: damaged (its sha256 is not the recorded one)"
        in said
    )
    assert f"passed over: {out}/checkpoint-3/optimizer.safetensors: damaged (1000 of " in said
    assert f"using {out}/checkpoint-2" in said and "resuming from step 2" in said
    for folder in out.glob("checkpoint-*"):
        (folder / "state.json").write_text("{}")
    ended = vico(*command)
    assert (
        ended.codes == [3]
        and ended.stderrs[0].count("\n") == 1
        and "none of its 4 checkpoints can be used" in ended.stderrs[0]
    )


@pytest.mark.parametrize(
    ("change", "name", "says"),
    [
        (lambda w: w.llama / "tiny" / "consolidated.00.pth", "backbone", "backbone  "),
        (lambda w: w.data / "train.csv", "data", "data train questions  "),
        (lambda w: w.data / "clipvitl14.pth", "data", "data features  "),
    ],
)
def test_other_files_than_the_run_had_are_refused(
    toy: ToyData,
    undisturbed: Path,
    tmp_path: Path,
    change: Callable[[ToyData], Path],
    name: str,
    says: str,
) -> None:
    other = ToyData(tmp_path / "other")  # the same but for the file that is then changed
    path = change(other)
    if path.suffix == ".csv":
        path.write_text(path.read_text().replace("man", "dog"))
    else:
        import torch

        tensors = torch.load(path, weights_only=True)
        some = next(value for value in tensors.values() if value.dim() == 2)
        some[len(some) // 2, 3] += 1  # one number of all
        torch.save(tensors, path)
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "checkpoint-6")
    command = [
        "train",
        *other.flags,
        *FLAGS,
        "--batch_size",
        "8",
        "--output_dir",
        str(out),
        "--max_steps",
        "5",
    ]
    ended = vico(*command)
    assert ended.codes == [2] and says in ended.stderrs[0] and "--allow_change" in ended.stderrs[0]
    assert not (out / "checkpoint-5").exists()
    succeeds(*command, "--allow_change", name)


def test_a_second_writer_is_refused_and_a_dead_ones_place_is_free(
    toy: ToyData, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [*flags(toy, 1), "--output_dir", str(out)]

    def second(processes: list["subprocess.Popen[str]"]) -> None:
        began = time.monotonic()
        ended = vico(*command)
        assert ended.codes == [6] and time.monotonic() - began < 5
        assert (
            f"{out}: in use by process {processes[0].pid} on " in ended.stderrs[0]
            and ended.stderrs[0].count("\n") == 1
        )
        processes[0].kill()

    assert disturb(command, 1, lambda: steps_done(out) >= 1, second).codes == [-9]
    succeeds(*command)


@pytest.mark.slow
def test_of_two_starts_on_a_new_folder_one_runs(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The later one looked while nothing was there yet; it must not write over what the other has done meanwhile."""
    out = tmp_path / "out"
    monkeypatch.setenv("VICO_FAILPOINT", "inputs=sleep 25")
    late = start(*flags(toy, 1), "--lr", "0.5", "--output_dir", str(out), ranks=1)
    monkeypatch.delenv("VICO_FAILPOINT")
    succeeds(*flags(toy, 1), "--output_dir", str(out))
    before = (out / "args.json").read_bytes(), (out / "checkpoint-6" / WEIGHTS).read_bytes()
    ended = end(late, 90)
    assert (
        ended.codes == [6]
        and "another run began and wrote here while this one was starting" in ended.stderrs[0]
    ), ended.output
    assert (
        (out / "args.json").read_bytes(),
        (out / "checkpoint-6" / WEIGHTS).read_bytes(),
    ) == before


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_ends_the_run(toy: ToyData, tmp_path: Path, rank: int) -> None:
    """The time is set to 6 s; the one that is stopped is named, and does not stay behind."""
    out = tmp_path / "out"
    processes = start(
        *flags(toy, 2),
        "--output_dir",
        str(out),
        "--hang_timeout",
        "0.1",
        "--epochs",
        "200",
        "--save_steps",
        "1000",
        ranks=2,
    )
    while steps_done(out) < 3:
        time.sleep(0.01)
        assert all(p.poll() is None for p in processes)
    processes[rank].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    ended = end(processes, 60)
    assert time.monotonic() - began < 6 + 5
    assert ended.codes[1 - rank] == 5 and ended.codes[rank] == -9
    said = ended.stderrs[1 - rank]
    assert f"rank {rank} on " in said and f"(process {processes[rank].pid}) no longer runs" in said
    assert "vico/train/loop.py" in said  # the stacks


@pytest.mark.slow
def test_ranks_0_and_1_killed_the_next_one_speaks(toy: ToyData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = start(
        *flags(toy, 4),
        "--output_dir",
        str(out),
        "--epochs",
        "200",
        "--save_steps",
        "1000",
        "--num_workers",
        "0",
        ranks=4,
    )
    while steps_done(out) < 2:
        time.sleep(0.01)
    for process in processes[:2]:
        process.kill()
    ended = end(processes, 30)
    assert (
        ended.codes == [-9, -9, 5, 5]
        and ended.stderrs[2].count("\n") == 1
        and ended.stderrs[3] == ""
    ), ended.output
    assert (
        f"rank 0 on {socket.gethostname()} (process {processes[0].pid}), rank 1 on "
        in ended.stderrs[2]
    )


@pytest.mark.parametrize("told", ["b''", "b'half'", "pickle.dumps({'name': 'x' * 99})[:50]"])
def test_a_rank_that_is_killed_while_it_starts_a_worker(told: str) -> None:
    """The worker hears nothing, or half of what it should do, and ends in silence."""
    script = f"""
import os, pickle
from multiprocessing import forkserver
from vico.data.dataloader import start_forkserver
start_forkserver()
worker, to_worker = forkserver.connect_to_new_process([])
os.write(to_worker, {told})
os.close(to_worker)
assert len(os.read(worker, 8)) == 8  # its process number
assert os.read(worker, 8) and not os.read(worker, 8)  # its end
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_killed_rank_is_one_line(toy: ToyData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = start(
        *flags(toy, 2),
        "--output_dir",
        str(out),
        "--epochs",
        "200",
        "--save_steps",
        "1000",
        "--num_workers",
        "1",
        ranks=2,
    )
    while steps_done(out) < 3:
        time.sleep(0.01)
    helpers = [
        helper
        for process in processes
        for helper in psutil.Process(process.pid).children(recursive=True)
    ]
    processes[1].kill()
    ended = end(processes, 30)
    assert ended.codes == [5, -9] and ended.stderrs[1] == ""
    assert len(helpers) >= 6 and not psutil.wait_procs(helpers, timeout=5)[1], (
        "data workers, their server, and Python's own helper"
    )
    assert (
        ended.stderrs[0].count("\n") == 1
        and f"(process {processes[1].pid}) has ended while" in ended.stderrs[0]
    )
