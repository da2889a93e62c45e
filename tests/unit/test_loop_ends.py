"""How a training run begins and ends: complete, stopped, or without room on the disk."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from support.run_without_model import run_of
from vico.checkpoint import restart_limit
from vico.checkpoint.format import TrainState
from vico.distributed import signals
from vico.errors import DiskError
from vico.io import streams
from vico.train import loop
from vico.train.start import Run


def begun(out: Path, step: int = 3, **flags: Any) -> Run:
    """Two epochs of four steps."""
    return run_of(out, state=TrainState(step=step), epochs=2, **flags)


class Log:
    """In the log's place."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@dataclasses.dataclass
class Ended:
    """What a run does; `error`: what its steps end with."""

    log: Log = dataclasses.field(default_factory=Log)
    calls: list[tuple[Any, ...]] = dataclasses.field(default_factory=list)
    error: Exception | None = None

    def open_log(self, run: Run) -> tuple[Log, int]:
        run.output_dir.path.mkdir(exist_ok=True)
        run.output_dir.attempts.touch()
        return self.log, 5

    def steps(self, run: Run, log: Log, early_save: int) -> None:
        assert log is self.log
        assert restart_limit._entered == [(run.output_dir, run.state)]
        self.calls.append(("steps", early_save))
        if self.error is not None:
            raise self.error

    def save(self, run: Run, log: Log, state: TrainState) -> None:
        self.calls.append(("save", state.step))


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Ended:
    of = Ended()
    monkeypatch.setattr(loop, "_open_log", of.open_log)
    monkeypatch.setattr(loop, "_run_steps", of.steps)
    monkeypatch.setattr(loop, "_save", of.save)
    monkeypatch.setattr(loop, "measured_texts", lambda engine, inputs, world: {"cognition": 1})
    monkeypatch.setattr(loop, "evaluate", lambda *given: of.calls.append(("evaluate", *given)))
    monkeypatch.setattr(loop, "report", lambda *given: of.calls.append(("report", *given)))
    monkeypatch.setattr(streams, "keep_lost_output", lambda path: of.calls.append(("kept", path)))
    return of


def test_a_run_to_its_end(ended: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says where its curves are, if there are any; its attempts are forgotten."""
    run = begun(tmp_path)
    loop.run(run)
    assert ended.calls == [("kept", tmp_path / "output.txt"), ("steps", 5)]
    assert ended.log.is_closed and not run.output_dir.attempts.exists()
    assert restart_limit._entered == []
    assert capsys.readouterr().out.splitlines()[-1] == f"done: {tmp_path}"
    (tmp_path / "runs").mkdir()
    loop.run(run)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"done: {tmp_path}; curves: tensorboard --logdir {tmp_path}/runs"


def test_a_run_that_is_stopped(ended: Ended, tmp_path: Path) -> None:
    """It saves, and says where; the launcher may start it again."""
    ended.error = signals.Stopped(signals.signal.SIGTERM, "between two steps")
    run = begun(tmp_path)
    with pytest.raises(signals.Stopped) as stopped:
        loop.run(run)
    assert ended.calls[1:] == [("steps", 5), ("save", 3)]
    assert (stopped.value.number, stopped.value.line) == (
        15,
        f"stopped by SIGTERM; saved {tmp_path}/checkpoint-3; rerun the same command to resume",
    )
    assert not run.output_dir.attempts.exists() and restart_limit._entered == []


@pytest.mark.parametrize(("error", "counts"), [(DiskError, False), (ZeroDivisionError, True)])
def test_which_failures_count(
    error: type[Exception], counts: bool, ended: Ended, tmp_path: Path
) -> None:
    """Not a full disk, which a restart may find empty."""
    ended.error, run = error("x"), begun(tmp_path)
    with pytest.raises(error):
        loop.run(run)
    assert run.output_dir.attempts.exists() == counts
    assert bool(restart_limit._entered) == counts and ("save", 3) not in ended.calls
    restart_limit.leave_steps()


def test_a_complete_run_does_nothing(
    ended: Ended, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop.run(begun(tmp_path, step=8))
    assert ended.calls == []
    assert capsys.readouterr().out == (
        f"{tmp_path}: this run is complete at step 8 of 8; nothing to train, and a larger "
        "--epochs trains on\n"
    )


def test_an_evaluation_before_the_first_step(ended: Ended, tmp_path: Path) -> None:
    """--init_eval, of weights that nothing has trained."""
    run = begun(tmp_path, init_eval=True, split="test")
    loop.run(run)
    evaluated, reported, *_ = ended.calls
    assert evaluated == ("evaluate", run.engine, run.inputs, "test", run.config, run.world)
    path = tmp_path / "predictions_test.jsonl"
    assert reported == ("report", None, path, {"split": "test"}, run.world, {"cognition": 1})
    ended.calls.clear()
    loop.run(dataclasses.replace(run, from_scratch=False))
    assert [call[0] for call in ended.calls] == ["kept", "steps"]
