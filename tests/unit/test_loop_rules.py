"""The training loop without a model: when it saves and evaluates, what it logs, what goes on."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from support.run_without_model import run_of
from vico.checkpoint.format import TrainState
from vico.distributed import signals
from vico.train import loop
from vico.train.config import RunConfig
from vico.train.log_records import EpochResult
from vico.train.start import Run

Event = tuple[Any, ...]


def report(stop_signal: int = 0) -> Any:
    """Of a step: losses that sum to 1.5 and 2.5, over 3 and 4 targets."""
    return SimpleNamespace(loss_sums=[1.5, 2.5], target_counts=[3, 4], stop_signal=stop_signal)


def test_sums_of_an_epoch_grow() -> None:
    state = TrainState(5, 8, 9, None, [1.0, 2.0], [10, 20])
    loop._advance(state, report())
    assert state == TrainState(6, 8, 10, None, [2.5, 4.5], [13, 24])


# ---- the steps -----------------------------------------------------------------------------------


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What happens in the loop; steps are not made, and step 6 gets a SIGTERM."""
    seen: list[Event] = []

    def step(_: Any, batch: Any, number: int, weights: Any, lr: float, *more: Any) -> Any:
        seen.append(("step", number, lr, batch))
        return report(signals.signal.SIGTERM if number == 6 else 0)

    def end(run: Run, _: Any) -> None:
        assert run.state.evaluation_due
        seen.append(("end", run.state.step))
        run.state.evaluation_due = False

    class Order:
        def __init__(self, trainables: Any) -> None:
            pass

        def check(self, world: Any) -> None:
            seen.append(("order",))

    monkeypatch.setattr(loop, "train_step", step)
    monkeypatch.setattr(loop, "_end_epoch", end)
    monkeypatch.setattr(loop, "_save", lambda run, _, state: seen.append(("save", state.step)))
    monkeypatch.setattr(loop, "_dry_run", lambda run: seen.append(("dry run",)))
    monkeypatch.setattr(loop, "GradientOrder", Order)
    monkeypatch.setattr(loop, "log_step", lambda *_: 0.25)

    def loader(steps: Any, schedule: list[Any], workers: int, pin: bool) -> list[Any]:
        seen.append(("loader", workers, pin))
        return [f"{epoch}/{place}" for epoch, place in schedule]

    monkeypatch.setattr(loop, "loader", loader)
    return seen


def of_kind(events: list[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event[0] in kinds]


def test_when_a_run_saves_and_evaluates(events: list[Event], tmp_path: Path) -> None:
    """At an epoch's end, at --max_steps, every --save_steps, and once early; never twice."""
    run = run_of(tmp_path, epochs=2, max_steps=5, save_steps=2, num_workers=0)
    loop._run_steps(run, None, early_save=1)
    assert of_kind(events, "save", "end") == [("save", 1), ("save", 2), ("end", 4), ("end", 5)]
    assert [event[3] for event in of_kind(events, "step")] == ["0/0", "0/1", "0/2", "0/3", "1/0"]
    rates = [event[2] for event in of_kind(events, "step")]
    assert rates == [run.lr(step) for step in range(5)] and len(set(rates)) > 2
    assert events[:3] == [("dry run",), ("order",), ("loader", 0, False)]
    assert len(of_kind(events, "order")) == 6, "of the dry run and each step"
    assert run.state == TrainState(5, 8, 5, None, [7.5, 12.5], [15, 20])
    never = run_of(tmp_path, epochs=1, save_steps=0, num_workers=3, device="cuda")
    events.clear()
    loop._run_steps(never, None, early_save=0)
    assert of_kind(events, "save", "end", "loader") == [("loader", 3, True), ("end", 4)]


def test_a_stop_between_two_steps(events: list[Event], tmp_path: Path) -> None:
    """The step counts; of an epoch's last step the evaluation is due."""
    run = run_of(tmp_path, epochs=3, save_steps=2)
    with pytest.raises(signals.Stopped) as stopped:
        loop._run_steps(run, None, 0)
    assert (stopped.value.number, stopped.value.line) == (15, "stopped between two steps")
    assert of_kind(events, "save", "end") == [("save", 2), ("end", 4)]
    assert (run.state.step, run.state.evaluation_due) == (6, False)
    last = run_of(tmp_path, epochs=3, max_steps=6)
    with pytest.raises(signals.Stopped):
        loop._run_steps(last, None, 0)
    assert (last.state.step, last.state.evaluation_due) == (6, True)


def test_an_evaluation_that_is_due_comes_first(events: list[Event], tmp_path: Path) -> None:
    """After the last step nothing else is left."""
    due = TrainState(4, 8, 4, None, [1.0, 1.0], [1, 1], evaluation_due=True)
    loop._run_steps(run_of(tmp_path, epochs=1, state=due), None, 0)
    assert events == [("end", 4)]
    events.clear()
    again = dataclasses.replace(due, evaluation_due=True)
    run = run_of(tmp_path, epochs=2, max_steps=5, state=again)
    loop._run_steps(run, None, 0)
    assert of_kind(events, "end", "step", "dry run") == [
        ("end", 4),
        ("dry run",),
        ("step", 5, run.lr(4), "1/0"),
        ("end", 5),
    ]


def test_lines_of_progress(
    events: list[Event], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every --logging_steps, on rank 0."""
    run = run_of(tmp_path, epochs=1, logging_steps=2, warmup_epochs=0)
    loop._run_steps(run, None, 0)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == "training: 4 step(s) to do"
    assert [line[: line.index(" s/step") - 6] for line in lines] == [
        f"training: step {n}/4  epoch 0  loss 0.2500  lr {run.lr(n - 1):.2e}" for n in (2, 4)
    ]


def test_the_longest_micro_batch_is_tried_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model in training; the last curve of memory is the one that can run out."""
    done: list[Event] = []
    batch = SimpleNamespace(num_real_tokens=12345, to=lambda device: f"on {device}")
    engine: Any = SimpleNamespace(
        train=lambda mode: done.append(("train", mode)), dry_run=lambda of: done.append((of,))
    )
    run = dataclasses.replace(run_of(tmp_path), engine=engine)
    vars(run.steps)["longest"] = lambda: (batch, 6)
    curves = {"memory/host_peak_gib": 1.0, "memory/device_peak_reserved_gib": 2.25}
    monkeypatch.setattr(loop, "memory_curves", lambda device: curves)
    loop._dry_run(run)
    assert done == [("train", True), ("on cpu",)]
    assert capsys.readouterr().out == (
        "the longest micro-batch (6 questions, 12,345 tokens) fits: 0.0 s, device peak reserved "
        "2.2 GiB\n"
    )


# ---- the end of an epoch -------------------------------------------------------------------------


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EpochResult, TrainState]]:
    """Ends the epoch of a run: the result that is saved, and the state with it."""
    saved: list[tuple[Any, Any]] = []
    evaluated: list[Any] = []

    def evaluate(*arguments: Any) -> Any:
        evaluated.append(arguments[2:])
        return SimpleNamespace(accuracies={"acc": 0.5})

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(loop, "_save", lambda run, _, after, result: saved.append((result, after)))

    def end(run: Run) -> tuple[EpochResult, TrainState]:
        loop._end_epoch(run, None)
        if run.evaluated_split is not None:
            assert evaluated.pop() == ("val", run.config, run.world, "batches")
        assert not evaluated
        return saved.pop()

    return end


def test_the_result_of_an_epoch(ended: Any, tmp_path: Path) -> None:
    """Its mean losses and the rate of its last step; the sums of the next begin at 0."""
    state = TrainState(8, 8, 9, 0.25, [6.0, 0.0], [4, 0], evaluation_due=True)
    run = run_of(tmp_path, epochs=3, state=state)
    result, after = ended(run)
    assert (result.epoch, result.step, result.lr) == (1, 8, run.lr(7))
    assert (result.losses, result.num_without_caption, result.split) == ([1.5, None], 3, "val")
    assert result.is_best and result.captions is None and result.texts is None
    assert 0 <= result.eval_seconds < 1
    assert after == run.state == TrainState(8, 8, 9, 0.5, [0.0] * 2, [0] * 2)


@pytest.mark.parametrize(
    ("best", "is_best", "after"), [(None, True, 0.5), (0.5, False, 0.5), (0.75, False, 0.75)]
)
def test_the_best_epoch(
    best: float | None, is_best: bool, after: float, ended: Any, tmp_path: Path
) -> None:
    state = TrainState(4, 8, 4, best, [1.0] * 2, [1] * 2, evaluation_due=True)
    result, saved = ended(run_of(tmp_path, state=state))
    assert (result.is_best, saved.best_accuracy) == (is_best, after)


def test_an_epoch_that_is_cut_or_not_evaluated(ended: Any, tmp_path: Path) -> None:
    """Inside an epoch the sums stay; without an evaluation none is the best."""
    state = TrainState(5, 8, 5, None, [1.0, 3.0], [2, 2], evaluation_due=True)
    run = run_of(tmp_path, state=state, max_steps=5, no_eval=True, evaluated=None)
    result, after = ended(run)
    assert (result.epoch, result.split, result.evaluation, result.is_best) == (1, None, None, False)
    assert after == TrainState(5, 8, 5, None, [1.0, 3.0], [2, 2])


# ---- saving --------------------------------------------------------------------------------------


class Log:
    """In the log's place."""

    def __init__(self, args: Any = None) -> None:
        self.args_due, self.saves = args, list[tuple[int, float]]()
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def saved(self, step: int, seconds: float) -> None:
        self.saves.append((step, seconds))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    seen: list[Event] = []
    monkeypatch.setattr(loop, "_log_epoch", lambda run, log, epoch, w: seen.append(("epoch", w)))
    monkeypatch.setattr(loop, "save", lambda to, *_: seen.append(("best", to.name)))
    monkeypatch.setattr(
        loop, "save_step", lambda _, w, m, state, run, keep: seen.append(("step", w, m, keep))
    )
    return seen


def engine_of(seen: list[Event]) -> Any:
    return SimpleNamespace(
        state=lambda: ("weights", "moments"),
        require_live=lambda weights: seen.append(("live", weights)),
        attention="plain",
    )


def test_what_is_written_in_which_order(written: list[Event], tmp_path: Path) -> None:
    """What is saved is the model's; the epoch's log, its best, its step; then args.json."""
    epoch: Any = SimpleNamespace(is_best=True)
    run = dataclasses.replace(run_of(tmp_path, save_total_limit=2), engine=engine_of(written))
    files = SimpleNamespace(check_unchanged=lambda: written.append(("files",)))
    vars(run.inputs)["files"] = files
    log: Any = Log({"lr": 0.5})
    loop._save(run, log, run.state, epoch)
    assert written == [
        ("files",),
        ("live", "weights"),
        ("epoch", "weights"),
        ("best", "checkpoint_best"),
        ("step", "weights", "moments", 2),
    ]
    assert json.loads((tmp_path / "args.json").read_text()) == {"lr": 0.5}
    assert log.args_due is None and log.saves[0][0] == 0 and 0 <= log.saves[0][1] < 1
    written.clear()
    (tmp_path / "args.json").unlink()
    no_limit = dataclasses.replace(run, config=RunConfig(save_total_limit=0))
    loop._save(no_limit, log, run.state)
    assert written[1:] == [("live", "weights"), ("step", "weights", "moments", None)]
    assert not (tmp_path / "args.json").exists(), "it is the same run's"
    written.clear()
    epoch.is_best = False
    loop._save(run, log, run.state, epoch)
    assert [event[0] for event in written] == ["files", "live", "epoch", "step"]
    written.clear()
    other = dataclasses.replace(run_of(tmp_path, rank=1), engine=run.engine, inputs=run.inputs)
    cast(Any, other.world).exchange.values[0] = None
    loop._save(other, None, run.state, epoch)
    assert written == [("files",), ("live", "weights")], "of each host; rank 0 writes"


def test_a_published_copy_of_the_best(
    written: list[Event], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --save_legacy."""
    monkeypatch.setattr(loop.published, "to_bytes", lambda weights, settings: b"published")
    run = run_of(tmp_path, save_legacy=True)
    loop._save_best(run, {}, {}, run.state)
    assert (tmp_path / "checkpoint_best.pth").read_bytes() == b"published"
    loop._save_best(run_of(tmp_path / "x"), {}, {}, run.state)
    assert not (tmp_path / "x").exists() and len(written) == 2
