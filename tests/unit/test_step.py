"""One optimizer step of several ranks, which threads emulate, without a model."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import EmulatedWorld, Exchange
from vico.data.batching import Step
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.distributed import signals
from vico.distributed.world import World
from vico.errors import TrainingError, UserError
from vico.model.batch import PackedBatch
from vico.train.engine import Engine
from vico.train.step import StepReport, train_step

NUM_TASKS, WEIGHTS = 2, (1.0, 0.5)
NAN, INF = float("nan"), float("inf")


@dataclass
class Recorder:
    """In the engine's place: every target costs `loss`; what it is told is noted."""

    loss: float = 1.0
    gradient_is_finite: bool = True
    every_gradient_is_finite: bool = True  # of all ranks: else there is no update
    passes: list[tuple[int, float, bool]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    is_training: bool = False

    def train(self, mode: bool) -> None:
        self.is_training = mode

    def can_capture(self, micro_batches: object) -> bool:
        return True

    def allow_captures(self, allowed: bool) -> None:
        assert allowed

    def forward(self, batch: PackedBatch) -> Tensor:
        assert self.is_training
        return torch.full((len(batch.target_tasks),), self.loss, requires_grad=True)

    def backward(self, loss: Tensor, last: bool) -> None:
        self.passes.append((len(self.passes), float(loss.detach()), last))

    def step(self, lr: float) -> tuple[float, bool]:
        self.rates.append(lr)
        return 7.0, self.every_gradient_is_finite

    def had_bad_gradient(self) -> bool:
        return not self.gradient_is_finite


def batch_of(*num_targets: int) -> PackedBatch:
    """A sequence per task, with so many targets."""
    examples = []
    for task, number in enumerate(num_targets):
        tokens = (1, VIDEO_SLOT, *range(3, 4 + number))
        targets = range(3, 3 + number)
        examples.append(Example(TokenSequence("vqa", tokens, targets, 1), 0, task))
    return pack(examples, torch.zeros(1, 1, 4))


def step_of(*batches: PackedBatch, names: tuple[str, ...] = (), **fields: Any) -> Step:
    counts = torch.zeros(NUM_TASKS, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch.target_tasks, minlength=NUM_TASKS)
    num_tokens = sum(batch.num_real_tokens for batch in batches)
    return Step(batches, batch_of(0, 0), counts, num_tokens, names, **fields)


def run(
    steps: list[Step], engines: list[Recorder], errors: list[UserError | None] | None = None
) -> list[StepReport | UserError]:
    """What each rank ends with."""
    exchange = Exchange(len(steps))
    first = EmulatedWorld(0, len(steps), torch.device("cpu"), None, exchange=exchange)

    def work(rank: int) -> StepReport | UserError:
        engine = cast(Engine, engines[rank])
        error = errors[rank] if errors else None
        try:
            world = replace(first, rank=rank)
            return train_step(engine, steps[rank], 3, WEIGHTS, 0.1, world, error)
        except UserError as problem:
            return problem

    with ThreadPoolExecutor(len(steps)) as pool:
        return list(pool.map(work, range(len(steps))))


def test_a_step_is_that_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each target has a share of the whole step's; a rank with less runs what has no targets.

    Nothing is agreed on where there is no error.
    """
    monkeypatch.delattr(EmulatedWorld, "raise_together")
    monkeypatch.delattr(World, "raise_together")
    one, other = step_of(batch_of(2, 3), batch_of(4, 0)), step_of(batch_of(1, 2))
    engines = [Recorder(), Recorder(loss=3.0)]
    reports = run([one, other], engines)
    assert reports[0] == reports[1]
    report = reports[0]
    assert isinstance(report, StepReport)
    assert report.loss_sums == [2 + 4 + 3, 3 + 6] and report.target_counts == [7, 5]
    assert report.task_losses() == pytest.approx([9 / 7, 9 / 5])
    assert report.num_real_tokens == one.num_real_tokens + other.num_real_tokens
    assert (report.grad_norm, report.stop_signal) == (7.0, 0)
    first = [(0, pytest.approx(2 / 7 + 0.5 * 3 / 5), False), (1, pytest.approx(4 / 7), True)]
    second = [(0, pytest.approx(3 * (1 / 7 + 0.5 * 2 / 5)), False), (1, 0.0, True)]
    assert [engine.passes for engine in engines] == [first, second]
    assert [engine.rates for engine in engines] == [[0.1], [0.1]]


def test_a_task_without_targets() -> None:
    engine = Recorder()
    (report,) = run([step_of(batch_of(1, 0))], [engine])
    assert isinstance(report, StepReport)
    assert report.task_losses() == [1.0, None] and engine.passes == [(0, 1.0, True)]


def test_a_stop_of_one_rank_stops_all(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([0, 15])
    monkeypatch.setattr(signals, "stop_requested", lambda: next(answers))
    for report in run([step_of(batch_of(1, 1))] * 2, [Recorder(), Recorder()]):
        assert isinstance(report, StepReport) and report.stop_signal == 15


@pytest.mark.parametrize("of_the_data", [True, False])
def test_an_error_of_one_rank_ends_all(of_the_data: bool) -> None:
    """Before any of them computes: one that its data had, or an earlier one."""
    problem = UserError("v3 is damaged")
    good = step_of(batch_of(1, 1))
    bad = step_of(error=problem) if of_the_data else good
    engines = [Recorder(), Recorder()]
    ends = run([good, bad], engines, None if of_the_data else [None, problem])
    assert [str(end) for end in ends] == ["v3 is damaged"] * 2
    assert engines == [Recorder(), Recorder()]
    (end,) = run([bad], [Recorder()], None if of_the_data else [problem])
    assert str(end) == "v3 is damaged"


def loss(engine: Recorder) -> None:
    engine.loss = NAN


def gradient(engine: Recorder) -> None:
    engine.gradient_is_finite = False


@pytest.mark.parametrize("break_", [loss, gradient])
@pytest.mark.parametrize("bad_rank", [0, 1])
def test_the_rank_that_is_not_finite_is_named(
    break_: Callable[[Recorder], None], bad_rank: int
) -> None:
    """With some of its questions, on all ranks."""
    steps = [
        step_of(batch_of(1, 1), names=("a/0", "a/1", "a/2", "a/3")),
        step_of(batch_of(1, 1), names=tuple(f"b/{number}" for number in range(6))),
    ]
    engines = [Recorder(every_gradient_is_finite=False) for _ in steps]
    break_(engines[bad_rank])
    shown = ("a/0, a/1, a/2, a/3", "b/0, b/1, b/2, b/3 and 2 more")[bad_rank]
    expected = f"the {break_.__name__} is not finite on rank {bad_rank} in step 3 (questions "
    for end in run(steps, engines):
        assert isinstance(end, TrainingError)
        assert str(end).startswith(f"{expected}{shown}); the update was not made; ")


def test_only_the_sum_of_gradients_is_not_finite() -> None:
    engines = [Recorder(every_gradient_is_finite=False) for _ in range(2)]
    for end in run([step_of(batch_of(1, 1))] * 2, engines):
        assert str(end).startswith("step 3: the sum of the ranks' gradients is not finite; ")


@dataclass
class Capturer(Recorder):
    """Also notes what it may capture."""

    can: bool = True
    asked: list[int] = field(default_factory=list)  # numbers of micro-batches
    allowed: list[bool] = field(default_factory=list)

    def can_capture(self, micro_batches: object) -> bool:
        self.asked.append(len(cast(tuple[PackedBatch, ...], micro_batches)))
        return self.can

    def allow_captures(self, allowed: bool) -> None:
        self.allowed.append(allowed)


@pytest.mark.parametrize("cannot", [None, 0, 1])
def test_all_ranks_capture_or_none(cannot: int | None) -> None:
    """Each is asked about all that it may run, with the batch in the place of missing ones."""
    engines: list[Recorder] = [Capturer(can=rank != cannot) for rank in (0, 1)]
    one = step_of(batch_of(1, 1), batch_of(1, 1))
    other = replace(step_of(batch_of(1, 1), batch_of(2, 1)), dummy=None)
    for report in run([one, other], engines):
        assert isinstance(report, StepReport)
    for engine, number in zip(engines, (3, 2), strict=True):
        assert isinstance(engine, Capturer)
        assert (engine.asked, engine.allowed) == ([number], [cannot is None])


def test_losses_are_summed_in_double_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[str] = []
    monkeypatch.setattr("vico.train.step.reached", passed.append)
    engine = Recorder(loss=0.1)
    (report,) = run([step_of(batch_of(3, 0), batch_of(3, 1))], [engine])
    assert isinstance(report, StepReport)
    tenth = float(torch.tensor(0.1))  # as fp32 has it
    assert report.loss_sums == [3 * tenth + 3 * tenth, tenth]
    assert passed == ["step", "step"], "the place where tests of kills end a rank"
    assert [last for _, _, last in engine.passes] == [False, True]


def test_weights_are_divided_in_double_precision() -> None:
    """Before they are rounded to fp32, in which 0.3 / 5 is another number."""
    engine: Any = Recorder()
    world = EmulatedWorld(0, 1, torch.device("cpu"), None)
    train_step(engine, step_of(batch_of(5, 0)), 1, (0.3, 1.0), 0.1, world)
    assert engine.passes == [(0, float(5 * torch.tensor(0.3 / 5)), True)]
