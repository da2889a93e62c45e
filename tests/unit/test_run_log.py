"""The logs of a run, as a resumed run takes them up."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vico.io.atomic import write_lines
from vico.io.log import duration
from vico.io.output_dir import OutputDir
from vico.train.progress_bar import ProgressBar
from vico.train.run_log import RunLog, memory_curves, read_logs


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
