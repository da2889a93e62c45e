"""The order of a save, and what a start makes of the folder that it finds."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faults import scenario_disk_full
from faults.result import Scale
from faults.small_store import RUN, save_both
from support.errors import refusal
from vico.checkpoint import format, restart_limit, write
from vico.checkpoint import read as checkpoints
from vico.checkpoint.format import TrainState
from vico.checkpoint.write import RunIdentity
from vico.errors import CheckpointError, DiskError, TrainingError
from vico.io import failpoints
from vico.io.output_dir import OutputDir
from vico.io.text import read_json_object
from vico.train import saved_run
from vico.train.config import RunConfig
from vico.train.resume import find_start, start_state
from vico.train.run_log import gaps, read_logs
from vico.train.saved_run import newest_usable, read_checkpoint


def find_newest(out: Path) -> tuple[str, str]:
    """(the checkpoint that a start resumes from, its notes)."""
    start = newest_usable(OutputDir(out).step_checkpoints(), OutputDir(out), RUN)
    assert start.checkpoint is not None
    return start.checkpoint.path.name, "; ".join(start.notes)


# ---- a save -------------------------------------------------------------------------------------


def test_files_are_flushed_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the folder that holds the new name is flushed right after it."""
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
    # checkpoint_best comes first, with the same names of files.
    first = next(i for i, e in enumerate(events) if "checkpoint-1" in e or e == format.WEIGHTS)
    events = events[first:]
    renamed = events.index(".checkpoint-1.vico-tmp -> checkpoint-1")
    written = {format.WEIGHTS, format.OPTIMIZER, format.STATE, ".checkpoint-1.vico-tmp"}
    assert written <= set(events[:renamed])
    assert events[renamed + 1] == tmp_path.name


def break_reading(monkeypatch: pytest.MonkeyPatch, name: str = "", step: int = 0) -> None:
    """Reading a checkpoint back fails for those in a folder `name`, or of a step."""
    read = checkpoints.read

    def failing_read(path: Path, run: str = "") -> format.Checkpoint:
        checkpoint = read(path, run)
        if path.name == name or checkpoint.state.step == step:
            raise CheckpointError(f"{path}: damaged")
        return checkpoint

    monkeypatch.setattr(checkpoints, "read", failing_read)
    monkeypatch.setattr(write, "read", failing_read)
    monkeypatch.setattr(saved_run, "read", failing_read)


def test_old_checkpoints_go_after_the_new_is_read_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1, keep=1)
    break_reading(monkeypatch, name="checkpoint-2")
    with pytest.raises(DiskError, match="the disk does not store data correctly"):
        save_both(tmp_path, 2, keep=1)
    assert (tmp_path / "checkpoint-1").is_dir()
    assert find_newest(tmp_path)[0] == "checkpoint-1"


def test_an_unreadable_best_does_not_replace_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1)
    break_reading(monkeypatch, step=2)
    with pytest.raises(DiskError, match="checkpoint_best: damaged; it was written a moment ago"):
        save_both(tmp_path, 2)
    assert checkpoints.read(tmp_path / "checkpoint_best").state.step == 1
    assert not list(tmp_path.glob(".checkpoint*"))


def test_a_full_disk_where_nothing_can_be_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scenario then limits the size of files, and counts no run that it could not make."""
    monkeypatch.setattr(scenario_disk_full, "_can_mount", lambda _: False)
    result = scenario_disk_full.run(Scale(quick=True, seed=0, folder=tmp_path))
    assert result.passed == result.of == scenario_disk_full.SIZES, result.facts
    assert result.facts["how"] == "RLIMIT_FSIZE" and result.facts["real_runs"] == 0


# ---- a start ------------------------------------------------------------------------------------


def test_a_checkpoint_of_another_run_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(tmp_path, 1)
    monkeypatch.setattr("faults.small_store.RUN", "another")
    save_both(tmp_path, 2)
    name, notes = find_newest(tmp_path)
    assert name == "checkpoint-1"
    assert "checkpoint-2: is of another run ('another' and not selftest)" in notes


def test_a_missing_checkpoint_is_noted(tmp_path: Path) -> None:
    for step in (1, 2):
        save_both(tmp_path, step)
    for path in (tmp_path / "checkpoint-2").iterdir():
        path.unlink()
    (tmp_path / "checkpoint-2").rmdir()
    name, notes = find_newest(tmp_path)
    assert name == "checkpoint-1" and "checkpoint-2: is gone, though it was saved last" in notes
    # What else this file may hold is ignored.
    for hint in ("", "{}", '{"step": "../../x"}', '{"step": 1}', "\0\xff"):
        (tmp_path / "latest.json").write_text(hint)
        assert find_newest(tmp_path) == ("checkpoint-1", "")


def test_the_best_accuracy_is_that_of_the_run(tmp_path: Path) -> None:
    """A later, worse epoch does not replace the best one. Another run's accuracy does not count."""
    progress = format.TrainState(
        step=3,
        questions_per_step=8,
        num_updates=3,
        best_accuracy=0.7,
        epoch_loss_sums=[0.0, 0.0],
        epoch_target_counts=[0, 0],
    )
    write.save(
        tmp_path / "out" / "checkpoint-3",
        {},
        {},
        progress,
        RunIdentity("", RunConfig().to_json(), {}),
    )
    saved = read_checkpoint(tmp_path / "out" / "checkpoint-3")
    for folder, best in (("out", 0.7), ("other", None)):
        config = RunConfig(output_dir=tmp_path / folder)
        expected = replace(progress, best_accuracy=best)
        assert start_state(saved, 3, 8, config, {}) == expected


def test_tasks_do_not_change_inside_an_epoch(tmp_path: Path) -> None:
    """The log's line of an epoch has one loss per task. --allow_change permits the change."""
    folder = tmp_path / "out" / "checkpoint-3"
    state = format.TrainState(
        step=3,
        questions_per_step=8,
        num_updates=3,
        epoch_loss_sums=[5.0, 6.0],
        epoch_target_counts=[7, 8],
    )
    write.save(folder, {}, {}, state, RunIdentity("", RunConfig().to_json(), {}))
    saved = read_checkpoint(folder)
    config = RunConfig(output_dir=tmp_path / "out", vaq=True, allow_change="vaq")
    assert config.tasks == ("vqa", "cap", "vaq")
    assert refusal(start_state, saved, 4, 8, config, {}).startswith(
        f"{folder}: is inside an epoch with 2 task(s), and this run has 3; "
    )
    assert start_state(saved, 3, 8, config, {}).epoch_loss_sums == [0.0] * 3


def test_a_missing_best_checkpoint_is_noted(tmp_path: Path) -> None:
    config = RunConfig(output_dir=tmp_path)
    (tmp_path / "args.json").write_text(json.dumps({**config.to_json(), "run": "r"}))
    progress = format.TrainState(step=3, best_accuracy=0.7)
    write.save(tmp_path / "checkpoint-3", {}, {}, progress, RunIdentity("r", config.to_json(), {}))
    best = tmp_path / "checkpoint_best"
    (note,) = find_start(config).notes
    assert note.startswith(f"{best}: is gone; the best epoch so far had 70.00%")
    write.save(best, {}, {}, progress, RunIdentity("r", config.to_json(), {}))
    assert find_start(config).notes == ()


def test_which_checkpoint_may_be_named(tmp_path: Path) -> None:
    """--resume of the run's own newest one goes on with the run, also before its first save."""
    config = RunConfig(output_dir=tmp_path / "out")
    config.output_dir.mkdir()
    (config.output_dir / "args.json").write_text(json.dumps({**config.to_json(), "run": "r"}))
    start = find_start(replace(config, resume=save_at(tmp_path / "other", 5)))
    assert start.run_id == "r" and start.checkpoint is not None
    assert start.checkpoint.state.step == 5
    older, newest = (save_at(config.output_dir, step) for step in (3, 6))
    for named in (None, newest, config.output_dir):
        start = find_start(replace(config, resume=named))
        assert start.run_id == "r" and start.checkpoint is not None
        assert start.checkpoint.path == newest
    message = refusal(find_start, replace(config, resume=older))
    assert f"holds a run with checkpoint-6 that did not start from --resume {older}; " in message


def save_at(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    identity = RunIdentity("r", RunConfig().to_json(), {})
    write.save(path, {}, {}, format.TrainState(step=step), identity)
    return path


def test_missing_log_lines_are_counted(tmp_path: Path) -> None:
    def log(name: str, *steps: int) -> None:
        lines = [json.dumps({"step": step}) + "\n" for step in steps]
        (tmp_path / name).write_text("".join(lines))

    def missing(step: int, due: bool = False, from_start: bool = True) -> list[str]:
        notes = gaps(OutputDir(tmp_path), read_logs(OutputDir(tmp_path)), step, due, 3, from_start)
        return [note.removeprefix(f"{tmp_path}/").split(" of ")[0] for note in notes]

    log("steps.jsonl", *range(1, 9))
    log("log.txt", 3, 6)
    for step in (8, 7, 6, 3, 0):  # lines of later steps are ignored: these will be done again
        assert missing(step) == []
    assert missing(6, due=True) == []
    assert missing(9) == ["steps.jsonl: lacks 1", "log.txt: lacks 1"]
    assert missing(9, due=True) == ["steps.jsonl: lacks 1"]
    log("steps.jsonl", 1, 2, 4, 5, 5, 6)
    log("log.txt")
    assert missing(6) == ["steps.jsonl: lacks 1", "log.txt: lacks 2"]
    (tmp_path / "steps.jsonl").unlink()
    assert missing(6) == ["steps.jsonl: lacks 6", "log.txt: lacks 2"]
    assert missing(6, from_start=False) == []
    log("steps.jsonl", 5, 6)
    assert missing(6) == ["steps.jsonl: lacks 4", "log.txt: lacks 2"]
    # A run that began with another's checkpoint of step 4.
    assert missing(6, from_start=False) == ["log.txt: lacks 1"]


def test_three_failures_at_one_step_are_enough(tmp_path: Path) -> None:
    """Reported ones: a start that was killed is not counted, and the next one saves sooner."""
    settings, other_settings = RunConfig().to_json(), RunConfig(batch_size=1).to_json()
    out = OutputDir(tmp_path)

    def start(settings: dict[str, Any], last_step: int, failing_step: int | None) -> int | None:
        early_save = restart_limit.record_start(out, settings, last_step, from_step=4)
        if failing_step is not None:
            restart_limit.enter_steps(out, TrainState(step=failing_step - 1))
            for _ in range(2):  # by two ranks
                restart_limit.record_failure()
            restart_limit.leave_steps()
        return early_save

    assert start(settings, 0, None) is None
    assert start(settings, 4, None) == 5  # killed before its first step
    assert [start(settings, 12, None) for _ in range(4)] == [8] * 4
    assert start(settings, 12, 13) == 8
    assert [start(settings, 12, 13) for _ in range(2)] == [None, None]
    for _ in range(2):
        message = refusal(restart_limit.record_start, out, settings, 12, 4)
        assert "step 13 has failed 3 times in a row" in message
    start(other_settings, 12, 13)
    for _ in range(2):
        start(other_settings, 12, 14)  # farther than before
    restart_limit.clear(out)
    for _ in range(3):
        start(other_settings, 13, 14)
    with pytest.raises(TrainingError):
        start(other_settings, 13, None)
    restart_limit.leave_steps()
    restart_limit.record_failure()  # outside the steps of a run: not counted
    assert read_json_object(out.attempts, "")["failures"] == 3


@pytest.mark.parametrize(
    ("plan", "raises_at"),
    [
        ("save:file@3=raise KeyError", 3),
        ("save:file#1=raise KeyError", 1),
        ("save:file#0=raise KeyError", None),
    ],
)
def test_failpoints_count(
    monkeypatch: pytest.MonkeyPatch, plan: str, raises_at: int | None
) -> None:
    """`@3`: at the third pass; `#1`: on rank 1 only. They are off unless armed."""
    failpoints.reached("save:file")
    monkeypatch.setenv("RANK", "1")
    failpoints.arm(plan)
    try:
        for number in range(1, 5):
            if number == raises_at:
                with pytest.raises(KeyError):
                    failpoints.reached("save:file")
            else:
                failpoints.reached("save:file")
    finally:
        failpoints.arm(None)
