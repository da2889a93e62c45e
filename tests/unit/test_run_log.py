"""The logs of a run, as a resumed run takes them up."""

import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.errors import refusal
from vico.errors import DiskError
from vico.io.atomic import write_lines
from vico.io.log import duration
from vico.io.output_dir import OutputDir
from vico.train.progress_bar import ProgressBar
from vico.train.run_log import (
    Logs,
    RunLog,
    gaps,
    memory_curves,
    read_logs,
    read_records,
    read_records_and_damage,
)


def test_steps_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    """And no step where the checkpoint is the newest of all."""
    output_dir = OutputDir(tmp_path)
    write_lines(output_dir.steps, [{"step": step} for step in (1, 2, 3)])
    write_lines(output_dir.epochs, [{"epoch": 0, "step": 2}])
    for step, num_dropped, num_epochs in ((3, 0, 1), (2, 1, 1), (1, 1, 0)):
        log = RunLog(output_dir, read_logs(output_dir), step)
        log.close()
        assert log.num_dropped == num_dropped
        kept = read_logs(output_dir)
        assert (kept.last_step, len(kept.epochs)) == (step, num_epochs)


def test_an_epoch_without_its_evaluation_is_logged_again(tmp_path: Path) -> None:
    output_dir = OutputDir(tmp_path)
    write_lines(output_dir.steps, [{"step": 1}, {"step": 2}])
    write_lines(output_dir.epochs, [{"epoch": 0, "step": 2}])
    RunLog(output_dir, read_logs(output_dir), 2, evaluation_due=True).close()
    kept = read_logs(output_dir)
    assert (kept.last_step, kept.epochs) == (2, [])


def test_a_line_every_n_items(capsys: pytest.CaptureFixture[str]) -> None:
    """--logging_steps: counted from the first step of the run, not of this start."""
    with ProgressBar("training", 9, "step", shown=True, done=2, every=3) as bar:
        for step in range(3, 10):
            bar.advance(f"loss {step}")
    lines = capsys.readouterr().out.splitlines()[1:]
    places = [line.split("  ")[0].removeprefix("training: step ") for line in lines]
    assert places == ["3/9", "6/9", "9/9"]


def test_the_time_that_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the items of this start alone: 10 s each, of which 4, 3, ... are left."""
    clock = iter(range(1000, 2000, 10))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    with ProgressBar("training", 9, "step", shown=True, done=4, every=1) as bar:
        for _ in range(5):
            bar.advance()
    lines = capsys.readouterr().out.splitlines()[1:]
    left = [line.rpartition("  ")[2] for line in lines]
    assert left == ["40 s left", "30 s left", "20 s left", "10 s left", "0 s left"]


def test_durations_as_people_write_them() -> None:
    seconds = {0.4: "0 s", 59.4: "59 s", 60: "1 min 0 s", 125: "2 min 5 s", 3599: "59 min 59 s"}
    seconds |= {3600: "1 h 0 min", 12_060: "3 h 21 min"}
    assert {number: duration(number) for number in seconds} == seconds


def test_memory_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """In GiB: the host's by the process itself, the GPU's by torch."""
    assert list(memory_curves(torch.device("cpu"))) == ["memory/host_peak_gib"]
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 5 * 2**30)
    usage = SimpleNamespace(ru_maxrss=7 * 2**20)  # KiB
    monkeypatch.setattr("resource.getrusage", lambda who: usage)
    assert memory_curves(torch.device("cuda")) == {
        "memory/host_peak_gib": 7,
        "memory/device_peak_allocated_gib": 3,
        "memory/device_peak_reserved_gib": 5,
    }


class Noted:
    """In the place of Reporters: what reaches it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def curves(self, *values: Any) -> None:
        self.seen.append(("curves", *values))

    def picture(self, name: str, picture: Any, *where: Any) -> None:
        self.seen.append((name, *where))

    def flush(self) -> None:
        self.seen.append("flush")

    def close(self) -> None:
        self.seen.append("close")


def opened(folder: Path, step: int, noted: Any, **fields: Any) -> tuple[RunLog, list[int]]:
    """A log that reports to `noted`, and what its reporters are told when they are opened."""
    told: list[int] = []

    def open_reporters(last_step: int) -> Any:
        told.append(last_step)
        return noted

    out = OutputDir(folder)
    return RunLog(out, read_logs(out), step, open_reporters=open_reporters, **fields), told


def test_what_is_written_and_what_is_reported(tmp_path: Path) -> None:
    """Records are appended; an epoch that an earlier start logged is reported as a repeated one."""
    out, noted = OutputDir(tmp_path), Noted()
    write_lines(out.steps, [{"step": step} for step in (1, 2, 3, 4)])
    write_lines(out.epochs, [{"step": 2}, {"step": 4}])
    log, told = opened(tmp_path, 2, noted)
    assert (told, log.num_dropped, log.error, log.args_due) == ([4], 2, None, None)
    log.step({"step": 3, "loss": 0.5}, {"train/loss": 0.5})
    log.step({"step": 4}, {})
    picture = np.zeros((1, 1, 3), np.uint8)
    log.epoch({"step": 4}, {"eval/acc": 1.0}, picture)
    log.epoch({"step": 6}, {"eval/acc": 0.5})
    log.saved(6, 1.5)
    log.close()
    assert noted.seen == [
        ("curves", {"train/loss": 0.5}, 3),
        ("curves", {"eval/acc": 1.0}, 4, True),
        ("gates", 4, True),
        "flush",
        ("curves", {"eval/acc": 0.5}, 6, False),
        "flush",
        ("curves", {"perf/save_seconds": 1.5}, 6),
        "close",
    ]
    steps = '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": 0.5}\n{"step": 4}\n'
    assert out.steps.read_text() == steps
    assert out.epochs.read_text() == '{"step": 2}\n{"step": 4}\n{"step": 6}\n'


def test_a_log_without_reporters(tmp_path: Path) -> None:
    """And one of a folder where nothing was logged."""
    log = RunLog(OutputDir(tmp_path), read_logs(OutputDir(tmp_path)), 5)
    assert (log.num_dropped, read_logs(OutputDir(tmp_path)).last_step) == (0, 0)
    log.step({"step": 1}, {"x": 1.0})
    log.epoch({"step": 1}, {"x": 1.0}, np.zeros((1, 1, 3), np.uint8))
    log.saved(1, 0.5)
    log.close()
    kept = read_logs(OutputDir(tmp_path))
    assert (kept.steps, kept.epochs) == ([{"step": 1}], [{"step": 1}])


def test_a_step_that_cannot_be_written(tmp_path: Path) -> None:
    """It is raised with the next epoch, as the ranks must end together; curves go on."""
    out, noted = OutputDir(tmp_path), Noted()
    log, _ = opened(tmp_path, 0, noted)
    out.steps.unlink()
    out.steps.mkdir()
    log.step({"step": 1}, {"x": 1.0})
    assert noted.seen == [("curves", {"x": 1.0}, 1)]
    said = f"{out.steps}: cannot be written (Is a directory); "
    assert str(log.error).startswith(said) and isinstance(log.error, DiskError)
    assert refusal(log.epoch, {"step": 1}, {}) == str(log.error)
    assert out.epochs.read_text() == "" and len(noted.seen) == 1


def test_damaged_lines_of_a_log(tmp_path: Path) -> None:
    """They are counted; what has no step is no record either."""
    path = tmp_path / "steps.jsonl"
    assert (read_records_and_damage(path), read_records(path)) == (([], 0), [])
    path.write_bytes(b'{"step": 1}\n{"step": "2"}\n[3]\n{}\n{"step": 4, "x": "\xff"}\n{"st')
    records, num_damaged = read_records_and_damage(path)
    assert records == read_records(path) == [{"step": 1}, {"step": 4, "x": "\ufffd"}]
    assert num_damaged == 4
    assert refusal(read_records, tmp_path) == (
        f"{tmp_path}: cannot be read (Is a directory); move it away, or choose another --output_dir"
    )


steps_of = st.sets(st.integers(1, 14))


@settings(max_examples=80, deadline=None)
@given(steps_of, steps_of, st.integers(0, 14), st.booleans(), st.integers(1, 5), st.booleans())
def test_records_that_are_lacking(
    logged: set[int],
    epochs: set[int],
    step: int,
    due: bool,
    steps_per_epoch: int,
    from_start: bool,
) -> None:
    """Of each step from the first that was logged, and of each epoch's end but one that is due."""
    out = OutputDir(Path("out"))
    logs = Logs([{"step": n} for n in logged], [{"step": n} for n in epochs])
    first = 1 if from_start else min(logged, default=math.inf)
    steps = {n for n in range(1, step + 1) if n >= first}
    ends = {n for n in steps if n % steps_per_epoch == 0 and (n < step or not due)}
    expected = []
    for path, lost, unit, wanted in (
        (out.steps, steps - logged, "step", steps),
        (out.epochs, ends - epochs, "epoch", ends),
    ):
        if lost:
            count = f"{len(lost)} of {len(wanted)} {unit}(s)"
            expected.append(f"{path}: lacks {count} up to step {step}; they are not repeated")
    assert gaps(out, logs, step, due, steps_per_epoch, from_start) == expected
