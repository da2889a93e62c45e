"""Who says what ended a run: one line, by the rank that failed, with its phase and what helps."""

import functools
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from support.processes import Processes, start, vico
from support.toy_dataset import ToyData
from vico.cli import exit_cause
from vico.data import dataloader
from vico.distributed.rendezvous import clone_store
from vico.distributed.topology import Member
from vico.distributed.watchdog import Watchdog
from vico.distributed.world import World
from vico.errors import EXIT_CODES, MAX_LINE_CHARACTERS, TrainingError, one_line
from vico.io.output_dir import OutputDir
from vico.train.run_log import read_logs

CPU_ALLOCATION = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
LONG = "--epochs 200 --lr 0.01 --batch_size 4".split()


def start_long_run(
    toy: ToyData, out: Path, *more: str, ranks: int = 1, failpoint: str = ""
) -> Processes:
    arguments = ["train", *toy.flags, *LONG, "--output_dir", str(out), *more]
    return start(*arguments, ranks=ranks, environment={"VICO_FAILPOINT": failpoint})


@pytest.mark.parametrize(
    ("moment", "phase"),
    [
        ("dry_run", "trying the longest micro-batch (4 questions, "),
        ("step@2", "micro-batch 1 of 1 of step 2"),
    ],
)
def test_only_the_failing_rank_speaks(
    toy: ToyData, tmp_path: Path, moment: str, phase: str
) -> None:
    failpoint = f"{moment}#1=raise MemoryError"
    run = start_long_run(toy, tmp_path / "out", ranks=2, failpoint=failpoint)
    run.wait(120)
    assert run.codes == [4, 4] and run.stderrs[0] == "", run.output
    _, line = run.stderrs[1].splitlines()  # the first is the failpoint's
    assert line.startswith("vico: error: rank 1 on ")
    assert f"is out of host memory while {phase}" in line
    assert "lower --batch_size and raise --accum_iter" in line


ALONE = """
import sys
from vico.cli import main
from vico.cli.flags import CommandLine
from vico.cli.with_world import with_world
from vico.errors import CheckpointError

def work(world):
    if sys.argv[1] == "all" or world.rank == 1:
        raise CheckpointError("bad; mend it")
    world.barrier()

main._run = lambda command, argv: with_world(CommandLine({}, [], False), work)
main.console()
"""


@pytest.mark.parametrize("who", ["all", "rank 1"])
def test_an_error_outside_an_agreement_is_said_once(who: str) -> None:
    run = start(who, ranks=2, program=("-c", ALONE))
    run.wait(60)
    assert run.codes == [3, 3], run.output
    assert run.stderrs[who != "all"] == "vico: error: bad; mend it\n" and len(run.errors) == 1


@pytest.mark.slow
def test_a_bug_on_one_rank_shows_one_traceback(toy: ToyData, tmp_path: Path) -> None:
    failpoint = "step@2#1=raise ZeroDivisionError"
    run = start_long_run(toy, tmp_path / "out", ranks=2, failpoint=failpoint)
    run.wait(120)
    assert run.codes == [1, 1] and run.stderrs[0] == "", run.output
    assert run.stderrs[1].count("Traceback") == 1
    assert run.stderrs[1].rstrip().endswith("ZeroDivisionError: failpoint step")


@pytest.mark.slow
def test_a_run_that_fails_three_times_is_not_started_again(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler would start it; with other settings it is tried again."""
    out = tmp_path / "out"
    settings = "--max_steps 3 --save_steps 1".split()
    command = ["train", *toy.flags, *LONG, *settings, "--output_dir", str(out)]
    monkeypatch.setenv("VICO_FAILPOINT", "step@2=raise MemoryError")
    assert vico(*command).codes == [4] and read_logs(OutputDir(out)).last_step == 1
    monkeypatch.setenv("VICO_FAILPOINT", "step=raise MemoryError")
    runs = [vico(*command) for _ in range(3)]
    assert [run.codes for run in runs] == [[4]] * 3
    refused = ["in a row" in run.stderrs[0] for run in runs]
    assert refused == [False, False, True], [run.output for run in runs]
    monkeypatch.delenv("VICO_FAILPOINT")
    assert vico(*command).codes == [4] and read_logs(OutputDir(out)).last_step == 1
    assert (
        vico(*command, "--num_workers", "1").codes == [0]
        and read_logs(OutputDir(out)).last_step == 3
    )


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("loading layers.3.attention.wq.weight", "--deepspeed zero3 or zero3_offload"),
        ("reading the inputs", "a host with more memory"),
        ("building the engine", "--deepspeed zero3 or zero3_offload"),
        ("saving step 4", "a host with more memory"),
        ("batch 3 of the val evaluation", "--deepspeed zero3"),
        ("micro-batch 1 of 2 of step 3", "lower --batch_size and raise --accum_iter"),
    ],
)
@pytest.mark.parametrize(
    ("problem", "memory"),
    [
        (MemoryError(), "host"),
        (torch.OutOfMemoryError("Tried to allocate 9 GiB"), "GPU"),
        (RuntimeError(CPU_ALLOCATION), "host"),
    ],
)
def test_out_of_memory_names_phase_and_remedy(
    alone: World, phase: str, remedy: str, problem: Exception, memory: str
) -> None:
    watchdog = Watchdog(0, [Member.of_this_process(0, alone.device)], clone_store(alone.store), 600)
    try:
        watchdog.set_phase(phase)
        error = exit_cause.known_cause(problem, replace(alone, watchdog=watchdog))
    finally:
        watchdog.close()
    assert isinstance(error, TrainingError)
    assert f"is out of {memory} memory while {phase} (peak " in str(error)
    assert remedy in str(error)


@pytest.mark.parametrize(
    "which",
    [pytest.param(0, marks=pytest.mark.slow, id="training's"), pytest.param(1, id="evaluation's")],
)
def test_a_killed_data_worker_is_one_line(toy: ToyData, tmp_path: Path, which: int) -> None:
    """Evaluation's waits between the epochs; the next evaluation finds it dead."""
    out = tmp_path / "out"
    run = start_long_run(toy, out, "--num_workers", "1")
    second_epoch = 1 + toy.num_train // 4
    assert run.wait_until(lambda: read_logs(OutputDir(out)).last_step >= second_epoch), run.output
    rank = run.processes[0].pid
    helpers = psutil.Process(rank).children(recursive=True)
    workers = [process for process in helpers if process.ppid() != rank]  # the server's children
    workers.sort(key=psutil.Process.create_time)
    assert len(workers) == 2
    workers[which].send_signal(signal.SIGKILL)
    run.wait(60)
    assert run.codes == [4] and run.stderrs[0].count("\n") == 1, run.output
    assert not psutil.wait_procs(helpers, timeout=5)[1]
    who = f"a data worker of rank 0 on {os.uname().nodename} (process {workers[which].pid})"
    assert f"{who} was ended by SIGKILL while " in run.stderrs[0]


class _Endless(torch.utils.data.Dataset[int]):
    def __getitem__(self, index: int) -> int:
        time.sleep(60)
        return index


@pytest.mark.parametrize(
    ("victim", "number", "seen", "why"),
    [
        ("worker", signal.SIGKILL, "was ended by SIGKILL", "where memory ran out"),
        ("worker", signal.SIGSEGV, "was ended by SIGSEGV", "a crash of native code"),
        ("worker", signal.SIGBUS, "was ended by SIGBUS", "feature file was truncated"),
        ("worker", signal.SIGALRM, "was ended by SIGALRM", ""),
        ("server", signal.SIGKILL, "was ended by SIGKILL", "where memory ran out"),
        ("server", signal.SIGSEGV, "was ended by SIGSEGV", "a crash of native code"),
    ],
)
def test_the_end_of_a_helper_is_named_as_seen(
    alone: World,
    capfd: pytest.CaptureFixture[str],
    victim: str,
    number: int,
    seen: str,
    why: str,
) -> None:
    steps = iter(dataloader.loader(_Endless(), range(9), 1, pin=False))  # type: ignore[arg-type]
    (worker,) = steps._workers  # type: ignore[attr-defined]
    # It looks for dead workers every 5 s by itself.
    steps._try_get_data = functools.partial(steps._try_get_data, 0.2)  # type: ignore[attr-defined]
    server = psutil.Process(worker.pid).parent()
    assert server is not None
    time.sleep(0.5)  # until it has set up its signals
    os.kill(worker.pid if victim == "worker" else server.pid, number)
    with pytest.raises(Exception) as caught:
        next(steps)
    error = exit_cause.known_cause(exit_cause._wait_for_worker_exit(caught.value), alone)
    assert isinstance(error, TrainingError)
    text = str(error)
    assert f"(process {worker.pid}) {seen} while " in text and why in text, text
    assert (f"the server of the data workers (process {server.pid})" in text) == (
        victim == "server"
    )
    assert "memory" not in text or number == signal.SIGKILL
    assert "\0" not in capfd.readouterr().err


def test_the_exit_of_a_worker_is_awaited() -> None:
    """A killed worker breaks its connection to the rank before it counts as exited."""
    worker = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    worker.start()
    threading.Timer(0.3, worker.kill).start()
    error = exit_cause._wait_for_worker_exit(ConnectionResetError())
    assert str(error) == f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly"
    assert exit_cause.ENDED_WORKER.search(str(error))
    worker.join()
    other = ConnectionResetError()
    assert exit_cause._wait_for_worker_exit(other) is other


IN_SMALL_SHARED_MEMORY = """
import os, sys
size, *arguments = sys.argv[1:]
inside = 'mount -t tmpfs -o size=$0 none /dev/shm && exec "$@"'
python = [sys.executable, "-m", "vico", *arguments]
os.execvp("unshare", ["unshare", "--mount", "bash", "-c", inside, size, *python])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.system("unshare --mount true 2>/dev/null") != 0, reason="needs the right to mount"
)
def test_a_full_shared_memory_is_one_line(toy: ToyData, tmp_path: Path) -> None:
    """Full before the first data worker starts, or by the batches, or just large enough."""
    settings = "--epochs 2 --batch_size 4 --num_workers 1".split()
    command = ["train", *toy.flags, *settings, "--output_dir", str(tmp_path / "out")]
    program = ("-c", IN_SMALL_SHARED_MEMORY)
    for size, code, says in (
        ("4k", 4, "/dev/shm of "),
        ("68k", 4, "a data worker of rank "),
        ("4m", 0, ""),
    ):
        run = start(size, *command, ranks=2, program=program)
        run.wait(120)
        assert run.codes == [code, code] and "Traceback" not in run.output, run.output
        lines = [line for line in run.output.splitlines() if "error" in line]
        assert len(lines) <= 1 + (size == "68k"), lines
        for line in lines:
            assert line.startswith(f"vico: error: {says}") and "/dev/shm" in line, lines
        assert bool(lines) == bool(code)


@pytest.mark.slow
def test_a_truncated_feature_file_is_one_line(tmp_path: Path) -> None:
    """It is mapped: a worker that reads behind its end dies of a bus error."""
    toy, out = ToyData(tmp_path / "toy"), tmp_path / "out"
    run = start_long_run(toy, out, "--num_workers", "1")
    assert run.wait_until(lambda: read_logs(OutputDir(out)).last_step >= 2), run.output
    os.truncate(toy.data / "clipvitl14.pth", 5000)
    run.wait(60)
    lines = run.stderrs[0].splitlines()
    assert run.codes == [4] and len(lines) == 1 and "Traceback" not in run.output, run.output
    assert "a data worker of rank 0 on " in lines[0]
    assert "was ended by SIGBUS" in lines[0]
    assert "a feature file was truncated while it was read" in lines[0]


def test_exit_codes_are_documented() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in readme


def test_a_long_line_loses_its_middle() -> None:
    """An id may be as long as its file."""
    video = "v\0" * 100_000
    line = one_line(f"data/val.csv:7: video {video} is unknown; correct it")
    assert len(line) < MAX_LINE_CHARACTERS + 60 and "\0" not in line
    assert line.startswith("data/val.csv:7: video v\\x00v")
    assert "characters left out) ... " in line and line.endswith(" is unknown; correct it")
