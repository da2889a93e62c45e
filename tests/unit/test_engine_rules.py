"""The engine over DeepSpeed, on one rank with a model of three numbers; parts of emulated ranks."""

import math
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vico.distributed.world import World
from vico.errors import TrainingError
from vico.train import engine as engines
from vico.train.ds_config import read_config
from vico.train.engine import GRADIENT_SCALE, Engine, load_parameter, zero_init

NAN, INF = math.nan, math.inf
Make = Callable[..., Engine]


class Model(nn.Module):
    """Its losses are its weight times the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.gate1 = nn.Parameter(torch.tensor([0.5]))
        self.frozen = nn.Parameter(torch.tensor([4.0]), requires_grad=False)

    def forward(self, batch: Tensor, compare: bool = False) -> Tensor:
        return -batch if compare else self.weight * batch + 0 * self.gate1


@pytest.fixture
def made(alone: World) -> Make:
    """Under ZeRO-2 as it is shipped, with two micro-batches to a step."""

    def make(dtype: torch.dtype = torch.float32) -> Engine:
        model = Model()
        groups = [{"params": [model.weight]}, {"params": [model.gate1]}]
        optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
        config = read_config("zero2", "fp32", 1, 2, 1)
        return Engine(model, optimizer, config, dtype, "plain attention")

    return make


def batch_of(*numbers: float) -> Any:
    return torch.tensor(numbers)


def take_step(engine: Engine, *batches: Any, lr: float = 0.0) -> tuple[float, bool]:
    for number, batch in enumerate(batches, start=1):
        engine.backward(engine.forward(batch).sum(), last=number == len(batches))
    return engine.step(lr)


def test_what_the_engine_knows_of_its_model(made: Make) -> None:
    engine = made()
    assert list(engine.trainables) == ["weight", "gate1"], "not the frozen one"
    assert (engine.stage, engine.attention) == (2, "plain attention")
    assert {torch.float16: 1024, torch.bfloat16: 1, torch.float32: 1} == GRADIENT_SCALE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradients_add_up_over_micro_batches(dtype: torch.dtype, made: Make) -> None:
    """What is scaled up for fp16 is scaled down before it is summed. The next step begins at 0."""
    engine = made(dtype)
    first, second = batch_of(3.0, -2.0), batch_of(1.0, 6.0)
    for _ in range(2):
        norm, was_applied = take_step(engine, first, second)
        assert norm == pytest.approx(math.hypot(4, 4), rel=1e-6) and was_applied
        assert not engine.had_bad_gradient()
    norm, _ = take_step(engine, second)
    assert norm == pytest.approx(math.hypot(1, 6), rel=1e-6)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float, made: Make) -> None:
    """Even where its own derivative is finite: no update follows, and the rank can be named."""
    engine = made()
    engine.backward(engine.forward(batch_of(1.0, 1.0)).sum() + value, last=True)
    assert engine.had_bad_gradient() and not engine.had_bad_gradient(), "since the last call"
    assert engine.step(0.5) == (INF, False)
    assert engine.module.weight.tolist() == [1.0, 2.0]


@given(
    gradients=st.lists(st.sampled_from([0.0, 1.0, -1e38, NAN, INF, -INF]), min_size=1, max_size=6)
)
def test_one_bad_number_among_all_gradients_is_seen(gradients: list[float]) -> None:
    """In whichever order they come."""
    engine = Engine.__new__(Engine)
    engine._is_dry_run, engine._scale = False, 1.0
    engine._max_gradient = torch.zeros(())
    for number in gradients:
        gradient = torch.tensor([[0.5, number]])
        assert engine._pass_gradient(gradient) is gradient
    assert engine.had_bad_gradient() == (not all(map(math.isfinite, gradients)))
    assert engine._max_gradient == 0


def test_a_dry_run_changes_nothing(made: Make) -> None:
    """Its gradients are zeros, whatever the losses; it ends no step; afterwards they count."""
    engine = made()
    engine.dry_run(batch_of(INF, 3.0))
    assert not engine.had_bad_gradient()
    norm, _ = take_step(engine, batch_of(3.0, 4.0))
    assert norm == pytest.approx(5, rel=1e-6)


def test_modes_are_set_when_they_change(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting one visits every module."""
    engine, seen = made(), list[bool]()
    train = engine.module.train

    def visited(mode: bool = True) -> nn.Module:
        seen.append(mode)
        return train(mode)

    monkeypatch.setattr(engine.module, "train", visited)
    for mode in (True, False, False, True):
        engine.train(mode)
        assert engine.module.training == mode
    assert seen == [False, True]


def test_forwards(made: Make) -> None:
    engine, batch = made(), batch_of(3.0, 5.0)
    assert engine.forward(batch).tolist() == [3.0, 10.0]
    assert engine.compare(batch).tolist() == [-3.0, -5.0]


def test_a_step_sets_the_rate_of_all_groups(made: Make) -> None:
    """Adam's first step is its rate, against the gradient's sign."""
    engine = made()
    assert take_step(engine, batch_of(3.0, -4.0), lr=0.25) == (pytest.approx(5), True)
    assert engine.module.weight.tolist() == pytest.approx([0.75, 2.25], abs=1e-6)
    assert [group["lr"] for group in engine._engine.optimizer.param_groups] == [0.25, 0.25]


def test_graphs_are_the_models(made: Make) -> None:
    """Without any there is memory for them, and nothing to allow."""
    engine = made()
    assert engine.can_capture([]) is True
    engine.allow_captures(False)

    class Graphed:
        allowed: bool | None = None

        def can_capture(self, segments: Any) -> bool:
            return list(segments) == ["a", "b"]

        def allow_captures(self, allowed: bool) -> None:
            self.allowed = allowed

    class Batch:
        def __init__(self, segments: str) -> None:
            self.segments = segments

    engine._graphed = graphed = Graphed()  # type: ignore[assignment]
    assert engine.can_capture(cast(Any, [Batch("a"), Batch("b")])) is True
    assert engine.can_capture(cast(Any, [Batch("b"), Batch("a")])) is False
    engine.allow_captures(True)
    assert graphed.allowed is True


def test_gates_are_closed_for_a_while(made: Make) -> None:
    """All adapter gates, and nothing else; they open again as they were, bit for bit."""
    engine = made()
    gate, weight = engine.trainables["gate1"], engine.trainables["weight"]
    with engine.closed_gates():
        assert gate.tolist() == [0.0] and weight.tolist() == [1.0, 2.0]
    assert gate.tolist() == [0.5] and weight.tolist() == [1.0, 2.0]


def test_a_save_of_other_values_is_refused(made: Make) -> None:
    engine = made()
    weights = {name: value.detach().clone() for name, value in engine.trainables.items()}
    engine.require_live(weights)
    weights["gate1"] += 2**-20
    with pytest.raises(TrainingError) as refused:
        engine.require_live(weights)
    assert str(refused.value) == (
        "a save would hold other values of gate1 than the model has; nothing is saved: use a "
        "ds_config of ds_configs/ and the pinned version of DeepSpeed"
    )


# ---- loading -------------------------------------------------------------------------------------


def test_modules_are_made_on_the_device_below_stage_3() -> None:
    for stage in (0, 1, 2):
        with zero_init({"zero_optimization": {"stage": stage}}, torch.device("meta")):
            module = nn.Linear(2, 3)
        assert module.weight.is_meta and not engines.is_partitioned(module.weight)
    assert not nn.Linear(2, 3).weight.is_meta


def test_a_whole_parameter_is_read_at_once() -> None:
    """And converted to its own type."""
    asked: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return torch.arange(start, stop, dtype=torch.float64) + 0.25

    parameter = nn.Parameter(torch.empty(2, 3, dtype=torch.bfloat16))
    load_parameter(parameter, read)
    assert asked == [(0, 6)]
    assert parameter.tolist() == [[0.25, 1.25, 2.25], [3.25, 4.25, 5.25]]


@given(num_ranks=st.integers(1, 9), size=st.integers(1, 20))
def test_each_rank_reads_its_part(num_ranks: int, size: int) -> None:
    """Equal parts in the order of ranks, the last ones padded with zeros, or nothing but zeros."""
    length, parts = -(-size // num_ranks), []
    for rank in range(num_ranks):
        parameter: Any = nn.Parameter(torch.empty(0), requires_grad=False)
        parameter.ds_id, parameter.ds_numel = 0, size
        parameter.ds_tensor = torch.full((length,), NAN)
        parameter.ds_tensor.ds_numel = length
        parameter.ds_zero_partition_rank = rank
        load_parameter(parameter, lambda start, stop: torch.arange(start, stop) + 1)
        parts.append(parameter.ds_tensor)
    expected = [*range(1, size + 1)] + [0] * (length * num_ranks - size)
    assert torch.cat(parts).tolist() == expected


# ---- parts of ranks, under stage 3 ---------------------------------------------------------------


def parts_of(value: Tensor, num_ranks: int) -> list[Tensor]:
    """Equal ones of the flattened tensor, in the order of ranks; zeros pad the last."""
    length = -(-value.numel() // num_ranks)
    padded = torch.zeros(length * num_ranks)
    padded[: value.numel()] = value.flatten()
    return list(padded.split(length))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_a_rank_compares_its_own_part(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others hold it cannot see: together they see a change of any number."""
    whole = torch.arange(1.0, 6.0).view(5, 1)
    parts = parts_of(whole, num_ranks)
    seen: list[int] = []
    for rank, part in enumerate(parts):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        parameter: Any = nn.Parameter(torch.empty(0))
        parameter.ds_id, parameter.ds_tensor = 0, part.clone()
        parameter.ds_tensor.ds_numel = len(part)
        engine = Engine.__new__(Engine)
        engine.trainables = {"weight": parameter}
        engine.require_live({"weight": whole})
        for place in range(5):
            changed = whole.clone()
            changed[place] += 1
            try:
                engine.require_live({"weight": changed})
            except TrainingError:
                seen.append(place)
    assert seen == [0, 1, 2, 3, 4], "each by one rank"


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6])
def test_a_rank_takes_its_part_of_a_moment(num_ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size that is no multiple of the ranks, too."""
    import deepspeed.utils

    whole, taken = torch.arange(1.0, 6.0).view(5, 1), list[tuple[Tensor, str]]()
    parts = parts_of(whole, num_ranks)
    parameter: Any = nn.Parameter(torch.empty(0))
    parameter.ds_id = 0

    def local(of: nn.Parameter, moment: str) -> Tensor:
        assert of is parameter
        return torch.zeros(len(parts[0]))

    def take(of: nn.Parameter, value: Tensor, moment: str) -> None:
        taken.append((value, moment))

    monkeypatch.setattr(deepspeed.utils, "safe_get_local_optimizer_state", local)
    monkeypatch.setattr(deepspeed.utils, "safe_set_local_optimizer_state", take)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: num_ranks)
    for rank in range(num_ranks):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        engines._set_moment(parameter, whole, "exp_avg_sq")
    assert {moment for _, moment in taken} == {"exp_avg_sq"}
    assert [value.tolist() for value, _ in taken] == [part.tolist() for part in parts]


def test_a_whole_moment_is_set_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed.utils

    taken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        deepspeed.utils, "safe_set_full_optimizer_state", lambda *given: taken.append(given)
    )
    parameter, value = nn.Parameter(torch.ones(2)), torch.tensor([3.0, 4.0])
    engines._set_moment(parameter, value, "exp_avg")
    ((of, given, moment),) = taken
    assert of is parameter and torch.equal(given, value) and moment == "exp_avg"
    partitioned: Any = nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([2, 3])
    assert engines._shape(partitioned) == (2, 3) and engines._shape(parameter) == (2,)
