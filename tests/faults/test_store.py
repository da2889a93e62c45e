"""The order of a save, what a start makes of what it finds, and who says what ended a run."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from faults import scenario_disk_full as figure_disk_full
from faults.result import Scale
from faults.small_store import RUN, save_both
from support.errors import refusal
from support.processes import start, vico
from support.toy_dataset import ToyData
from vico.checkpoint import format, restart_limit, write
from vico.checkpoint import read as checkpoints
from vico.cli import exit_cause
from vico.data.types import Question
from vico.distributed import world as dist
from vico.distributed.rendezvous import clone_store
from vico.distributed.topology import Member
from vico.distributed.watchdog import Watchdog
from vico.errors import EXIT_CODES, CheckpointError, DiskError, TrainingError
from vico.io import failpoints
from vico.train.config import RunConfig
from vico.train.evaluate import summarize
from vico.train.resume import find_start, newest_usable, start_progress
from vico.train.run_log import gaps, read_logs


def found(out: Path) -> tuple[str, str]:
    """(what a start goes on from, what it says)."""
    start = newest_usable(format.step_folders(out), out, RUN)
    assert start.checkpoint is not None
    return start.checkpoint.path.name, "; ".join(start.notes)


# ---- a save ----------------------------------------------------------------------------------------------------------


def test_all_is_on_the_disk_before_it_bears_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def flush(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def move(path: Path, target: Path) -> Path:
        events.append(f"{path.name} -> {target.name}")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "rename", move)
    save_both(tmp_path, 1)
    events = events[
        events.index(next(e for e in events if "checkpoint-1" in e or e == format.WEIGHTS)) :
    ]
    named = events.index(".checkpoint-1.vico-tmp -> checkpoint-1")
    assert {
        format.WEIGHTS,
        checkpoints.OPTIMIZER,
        checkpoints.STATE,
        ".checkpoint-1.vico-tmp",
    } <= set(events[:named])
    assert events[named + 1] == tmp_path.name


def test_nothing_goes_before_what_replaces_it_was_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1, keep=1)
    read = checkpoints.read

    def forgetful(path: Path, run: str = "") -> format.Checkpoint:
        if path.name == "checkpoint-2":
            raise CheckpointError(f"{path}: damaged")
        return read(path, run)

    monkeypatch.setattr(write, "read", forgetful)
    with pytest.raises(DiskError, match="the disk does not keep what it is given"):
        save_both(tmp_path, 2, keep=1)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert found(tmp_path)[0] == "checkpoint-1"


def test_a_best_that_cannot_be_read_back_does_not_replace_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1)
    read = checkpoints.read

    def forgetful(path: Path, run: str = "") -> format.Checkpoint:
        found = read(path, run)
        if found.progress.step == 2:
            raise CheckpointError(f"{path}: damaged")
        return found

    monkeypatch.setattr(write, "read", forgetful)
    with pytest.raises(DiskError, match="checkpoint_best: damaged; it was written a moment ago"):
        save_both(tmp_path, 2)
    assert checkpoints.read(tmp_path / "checkpoint_best").progress.step == 1
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_full_disk_where_nothing_can_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test then limits the size of files, and counts no run that it could not make."""
    monkeypatch.setattr(figure_disk_full, "_can_mount", lambda _: False)
    outcome = figure_disk_full.run(Scale(quick=True, seed=0, folder=tmp_path))
    assert (outcome.passed, outcome.of) == (figure_disk_full.SIZES, figure_disk_full.SIZES), (
        outcome.facts
    )
    assert outcome.facts["how"] == "RLIMIT_FSIZE" and outcome.facts["real_runs"] == 0


# ---- a start ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_not_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1)
    monkeypatch.setattr("faults.small_store.RUN", "another")
    save_both(tmp_path, 2)
    name, said = found(tmp_path)
    assert (
        name == "checkpoint-1"
        and "checkpoint-2: is of another run ('another' and not selftest)" in said
    )


def test_a_checkpoint_that_is_gone_is_missed(tmp_path: Path) -> None:
    for step in (1, 2):
        save_both(tmp_path, step)
    for path in (tmp_path / "checkpoint-2").iterdir():
        path.unlink()
    (tmp_path / "checkpoint-2").rmdir()
    name, said = found(tmp_path)
    assert name == "checkpoint-1" and "checkpoint-2: is gone, though it was saved last" in said
    for hint in ("", "{}", '{"step": "../../x"}', '{"step": 1}', "\0\xff"):  # only a hint
        (tmp_path / format.LATEST).write_text(hint)
        assert found(tmp_path) == ("checkpoint-1", "")


def test_the_best_accuracy_of_the_run_comes_back_and_no_other_s(tmp_path: Path) -> None:
    """A worse epoch behind a start does not replace the best one; what another run reached says nothing of this one."""
    progress = format.TrainState(step=3, questions_per_step=8, num_updates=3, best_accuracy=0.7)
    write.save(tmp_path / "out" / "checkpoint-3", {}, {}, progress, RunConfig())
    saved = checkpoints.read(tmp_path / "out" / "checkpoint-3")
    for folder, best in (("out", 0.7), ("other", None)):
        assert start_progress(saved, 3, 8, RunConfig(output_dir=tmp_path / folder), {}) == replace(
            progress, best_accuracy=best
        )


def test_a_best_checkpoint_that_is_gone_is_missed(tmp_path: Path) -> None:
    config = RunConfig(output_dir=tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({**config.to_json(), "run": "r"}))
    write.save(
        tmp_path / "checkpoint-3",
        {},
        {},
        format.TrainState(step=3, best_accuracy=0.7),
        config,
        run="r",
    )
    (note,) = find_start(config).notes
    assert note.startswith(
        f"{tmp_path / 'checkpoint_best'}: is gone; the best epoch so far had 70.00%"
    )
    write.save(
        tmp_path / "checkpoint_best",
        {},
        {},
        format.TrainState(step=3, best_accuracy=0.7),
        config,
        run="r",
    )
    assert find_start(config).notes == ()


def test_lines_that_a_log_lacks_are_counted(tmp_path: Path) -> None:
    def log(name: str, *steps: int) -> None:
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in steps))

    def said(step: int, due: bool = False, from_start: bool = True) -> list[str]:
        return [
            line.removeprefix(f"{tmp_path}/").split(" of ")[0]
            for line in gaps(tmp_path, read_logs(tmp_path), step, due, 3, from_start)
        ]

    log("steps.jsonl", *range(1, 9))
    log("log.txt", 3, 6)
    assert (
        said(8) == said(7) == said(6, due=True) == said(6) == said(3) == said(0) == []
    )  # later lines are steps to redo
    assert said(9) == ["steps.jsonl: lacks 1", "log.txt: lacks 1"] and said(9, due=True) == [
        "steps.jsonl: lacks 1"
    ]
    log("steps.jsonl", 1, 2, 4, 5, 5, 6)
    log("log.txt")
    assert said(6) == ["steps.jsonl: lacks 1", "log.txt: lacks 2"]
    (tmp_path / "steps.jsonl").unlink()
    assert (
        said(6) == ["steps.jsonl: lacks 6", "log.txt: lacks 2"] and said(6, from_start=False) == []
    )
    log("steps.jsonl", 5, 6)
    assert said(6) == ["steps.jsonl: lacks 4", "log.txt: lacks 2"]
    # of a run that began behind another's step 4
    assert said(6, from_start=False) == ["log.txt: lacks 1"]


def test_three_failures_at_one_step_are_enough(tmp_path: Path) -> None:
    settings, other_settings = RunConfig().to_json(), RunConfig(batch_size=1).to_json()
    for _ in range(3):
        restart_limit.record_start(tmp_path, settings, 7)
    for _ in range(2):
        assert "step 8 has failed 3 times in a row" in refusal(
            restart_limit.record_start, tmp_path, settings, 7
        )
    restart_limit.record_start(tmp_path, other_settings, 7)
    for _ in range(2):
        restart_limit.record_start(tmp_path, other_settings, 8)  # farther than before
    restart_limit.clear(tmp_path)
    for _ in range(3):
        restart_limit.record_start(tmp_path, other_settings, 8)
    with pytest.raises(TrainingError):
        restart_limit.record_start(tmp_path, other_settings, 8)


def test_failpoints_are_off_and_count(monkeypatch: pytest.MonkeyPatch) -> None:
    failpoints.reached("save:file")
    monkeypatch.setenv("RANK", "1")
    for plan, passings in (
        ("save:file@3=raise KeyError", 3),
        ("save:file#1=raise KeyError", 1),
        ("save:file#0=raise KeyError", None),
    ):
        failpoints.arm(plan)
        for passing in range(1, 5):
            if passing == passings:
                with pytest.raises(KeyError):
                    failpoints.reached("save:file")
            else:
                failpoints.reached("save:file")
    failpoints.arm(None)


# ---- counting --------------------------------------------------------------------------------------------------------


def test_an_accuracy_is_a_count_of_questions() -> None:
    """Not the mean over groups or batches, which here would be another number."""
    asked = [
        Question(i, str(i), "v", kind, "q", ("a", "b"), 0)
        for i, kind in enumerate(["CW"] * 5 + ["TN"])
    ]
    evaluation = summarize(asked, [[0.0, 1.0]] * 5 + [[1.0, 0.0]], "nextqa")
    assert (
        evaluation.accuracies["acc"] == 5 / 6
        and evaluation.counts["C"] == (5, 5)
        and evaluation.counts["T"] == (0, 1)
    )


# ---- who says what ended a run ---------------------------------------------------------------------------------------

LONG = ["--epochs", "200", "--lr", "0.01", "--batch_size", "4"]


@pytest.mark.parametrize(
    ("moment", "phase"),
    [
        ("rehearsal", "trying the longest micro-batch (4 questions, "),
        ("step@2", "micro-batch 1 of 1 of step 2"),
    ],
)
def test_the_rank_that_ends_says_why_and_the_others_nothing(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, phase: str
) -> None:
    monkeypatch.setenv("VICO_FAILPOINT", f"{moment}#1=raise MemoryError")
    ended = start("train", *toy.flags, *LONG, "--output_dir", str(tmp_path / "out"), ranks=2)
    ended.wait(120)
    assert ended.codes == [4, 4] and ended.stderrs[0] == "", ended.output
    _, line = ended.stderrs[1].splitlines()  # behind the failpoint's own
    assert (
        line.startswith("vico: error: rank 1 on ")
        and f"is out of host memory while {phase}" in line
    )
    assert "lower --batch_size and raise --accum_iter" in line


@pytest.mark.slow
def test_a_mistake_on_one_rank_is_told_once_with_its_traceback(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VICO_FAILPOINT", "step@2#1=raise ZeroDivisionError")
    ended = start("train", *toy.flags, *LONG, "--output_dir", str(tmp_path / "out"), ranks=2)
    ended.wait(120)
    assert ended.codes == [1, 1] and ended.stderrs[0] == "", ended.output
    assert ended.stderrs[1].count("Traceback") == 1 and ended.stderrs[1].rstrip().endswith(
        "ZeroDivisionError: failpoint step"
    )


@pytest.mark.slow
def test_a_run_that_fails_three_times_is_not_started_again(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a scheduler would start it; with other settings it is tried again."""
    flags = [
        "train",
        *toy.flags,
        *LONG,
        "--max_steps",
        "3",
        "--save_steps",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    monkeypatch.setenv("VICO_FAILPOINT", "step@2=raise MemoryError")
    assert vico(*flags).codes == [4] and read_logs(tmp_path / "out").last_step == 1
    monkeypatch.setenv("VICO_FAILPOINT", "step=raise MemoryError")
    said = [vico(*flags) for _ in range(3)]
    assert [ended.codes for ended in said] == [[4]] * 3
    assert ["in a row" in ended.stderrs[0] for ended in said] == [False, False, True], said
    monkeypatch.delenv("VICO_FAILPOINT")
    assert vico(*flags).codes == [4] and read_logs(tmp_path / "out").last_step == 1
    assert (
        vico(*flags, "--num_workers", "1").codes == [0]
        and read_logs(tmp_path / "out").last_step == 3
    )


@pytest.mark.parametrize(
    ("phase", "helps"),
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
    ("problem", "where"),
    [
        (MemoryError(), "host"),
        (torch.OutOfMemoryError("Tried to allocate 9 GiB"), "GPU"),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            ),
            "host",
        ),
    ],
)
def test_no_more_memory_names_phase_and_remedy(
    alone: dist.World, phase: str, helps: str, problem: Exception, where: str
) -> None:
    watchdog = Watchdog(0, [Member.of_this_process(0, alone.device)], clone_store(alone.store), 600)
    try:
        watchdog.set_phase(phase)
        fault = exit_cause._known(problem, replace(alone, watchdog=watchdog))
    finally:
        watchdog.close()
    assert (
        isinstance(fault, TrainingError)
        and f"is out of {where} memory while {phase} (peak " in str(fault)
        and helps in str(fault)
    )


def test_a_killed_data_worker_is_one_line(toy: ToyData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = [*toy.flags, *LONG, "--num_workers", "1", "--output_dir", str(out)]
    ended = start("train", *flags, ranks=1)
    while read_logs(out).last_step < 2:
        time.sleep(0.02)
        assert ended.running
    helpers = psutil.Process(ended.processes[0].pid).children(recursive=True)
    (worker,) = [p for p in helpers if p.ppid() != ended.processes[0].pid]  # the server's child
    worker.send_signal(signal.SIGKILL)
    ended.wait(60)
    assert ended.codes == [4] and ended.stderrs[0].count("\n") == 1, ended.output
    assert not psutil.wait_procs(helpers, timeout=5)[1]
    assert (
        f"a data worker of rank 0 on {os.uname().nodename} (process {worker.pid}) ended unexpectedly"
        in ended.stderrs[0]
    )


IN_LITTLE_SHARED_MEMORY = """
import os, sys
size, *arguments = sys.argv[1:]
inside = 'mount -t tmpfs -o size=$0 none /dev/shm && exec "$@"'
os.execvp("unshare", ["unshare", "--mount", "bash", "-c", inside, size, sys.executable, "-m", "vico", *arguments])
"""


@pytest.mark.slow
@pytest.mark.skipif(
    os.system("unshare --mount true 2>/dev/null") != 0, reason="needs the right to mount"
)
def test_a_full_shared_memory_is_one_line(toy: ToyData, tmp_path: Path) -> None:
    """Full before the first data worker is there, or by the batches, or just large enough."""
    flags = [
        "train",
        *toy.flags,
        "--epochs",
        "2",
        "--batch_size",
        "4",
        "--num_workers",
        "1",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    for size, code, says in (
        ("4k", 4, "/dev/shm of "),
        ("68k", 4, "a data worker of rank "),
        ("4m", 0, ""),
    ):
        ended = start(size, *flags, ranks=2, program=("-c", IN_LITTLE_SHARED_MEMORY))
        ended.wait(120)
        assert ended.codes == [code, code] and "Traceback" not in ended.output, ended.output
        lines = [line for line in ended.output.splitlines() if "error" in line]
        assert len(lines) <= 1 + (size == "68k") and all(
            line.startswith(f"vico: error: {says}") and "/dev/shm" in line for line in lines
        ), lines
        assert bool(lines) == bool(code)


@pytest.mark.slow
def test_a_feature_file_that_is_cut_off_meanwhile_is_one_line(tmp_path: Path) -> None:
    """It is mapped: whoever reads on behind its end dies of a bus error."""
    mine, out = ToyData(tmp_path / "world"), tmp_path / "out"
    ended = start(
        "train", *mine.flags, *LONG, "--num_workers", "1", "--output_dir", str(out), ranks=1
    )
    while read_logs(out).last_step < 2:
        time.sleep(0.02)
        assert ended.running
    os.truncate(mine.data / "clipvitl14.pth", 5000)
    ended.wait(60)
    lines = [
        line for line in ended.stderrs[0].splitlines() if "vico: " in line
    ]  # torch's own has no end
    assert ended.codes == [4] and len(lines) == 1 and "Traceback" not in ended.output, ended.output
    assert (
        "a data worker of rank 0 on " in lines[0]
        and "or when a feature file is cut off meanwhile" in lines[0]
    )


def test_exit_codes_are_documented() -> None:
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"| {code} | {meaning} |" in readme
