"""What the engine tells DeepSpeed, and what it notes of gradients: with a recorder in its place."""

import math
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from vico.errors import TrainingError
from vico.train import engine as engines
from vico.train.engine import GRADIENT_SCALE, Engine, load_parameter, zero_init

NAN, INF = math.nan, math.inf


class DeepSpeed:
    """Four ranks; notes the calls."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.module, self.optimizer = model, optimizer
        self.world_size, self.device = 4, torch.device("cpu")
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, batch: Any, **named: Any) -> Tensor:
        self.calls.append(("forward", batch, named))
        return torch.ones(2, requires_grad=True)

    def train(self, mode: bool) -> None:
        self.calls.append(("train", mode))
        self.module.train(mode)

    def set_gradient_accumulation_boundary(self, last: bool) -> None:
        self.calls.append(("boundary", last))

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        self.calls.append(("backward", float(loss.detach()), scale_wrt_gas))
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        self.calls.append(("step", [group["lr"] for group in self.optimizer.param_groups]))

    def get_global_grad_norm(self) -> Tensor:
        return torch.tensor(2.5)

    def was_step_applied(self) -> bool:
        return False


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.gate1 = nn.Parameter(torch.tensor([0.5]))
        self.frozen = nn.Parameter(torch.tensor([4.0]), requires_grad=False)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    import deepspeed

    configs: list[Any] = []

    def initialize(model: nn.Module, optimizer: Any, config: Any) -> tuple[Any, ...]:
        configs.append(config)
        return DeepSpeed(model, optimizer), optimizer, None, None

    monkeypatch.setattr(deepspeed, "initialize", initialize)

    def make(dtype: torch.dtype = torch.float32) -> tuple[Engine, DeepSpeed]:
        model = Model()
        groups = [{"params": [model.weight]}, {"params": [model.gate1]}]
        optimizer = torch.optim.AdamW(groups, lr=0.0)
        config = {"zero_optimization": {"stage": 2}}
        engine = Engine(model, optimizer, config, dtype, "plain attention")
        assert configs.pop() == config and engine.module is model
        return engine, cast(DeepSpeed, engine._engine)

    yield make


def test_what_the_engine_knows_of_its_model(made: Any) -> None:
    engine, _ = made()
    assert list(engine.trainables) == ["weight", "gate1"], "not the frozen one"
    assert (engine.stage, engine.attention) == (2, "plain attention")
    assert {torch.float16: 1024, torch.bfloat16: 1, torch.float32: 1} == GRADIENT_SCALE


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 1), (torch.float16, 1024)])
def test_gradients_are_sums_over_micro_batches_and_ranks(
    dtype: torch.dtype, scale: float, made: Any
) -> None:
    """DeepSpeed takes the mean of four ranks, so the loss counts four times.

    What is scaled up for fp16 is scaled down before it is summed.
    """
    engine, deepspeed = made(dtype)
    weight = engine.trainables["weight"]
    engine.backward((weight * torch.tensor([3.0, -2.0])).sum(), last=False)
    assert weight.grad.tolist() == [12.0, -8.0]
    engine.backward(weight.sum(), last=True)
    assert weight.grad.tolist() == [16.0, -4.0]
    assert deepspeed.calls == [
        ("boundary", False),
        ("backward", -4.0 * scale, False),
        ("step", [0.0, 0.0]),
        ("boundary", True),
        ("backward", 12.0 * scale, False),
    ]
    assert not engine.had_bad_gradient()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value: float, made: Any) -> None:
    """Even where its own derivative is finite: no update follows, and the rank can be named."""
    engine, _ = made()
    engine.backward(engine.trainables["weight"].sum() + value, last=True)
    assert engine.trainables["weight"].grad.isnan().all()
    assert engine.had_bad_gradient() and not engine.had_bad_gradient(), "since the last call"


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


def test_a_dry_run_has_zero_gradients(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends no step; afterwards gradients count again."""
    engine, deepspeed = made()
    weight = engine.trainables["weight"]
    monkeypatch.setattr(engine, "forward", lambda batch: weight * INF)
    engine.dry_run(cast(Any, "batch"))
    assert weight.grad.tolist() == [0.0, 0.0] and not engine.had_bad_gradient()
    assert [call[0] for call in deepspeed.calls] == ["boundary", "backward", "step"]
    assert deepspeed.calls[0] == ("boundary", False)
    engine.backward(weight.sum(), last=True)
    assert weight.grad.tolist() == [4.0, 4.0]


def test_modes_are_set_when_they_change(made: Any) -> None:
    engine, deepspeed = made()
    for mode in (True, False, False, True):
        engine.train(mode)
    assert deepspeed.calls == [("train", False), ("train", True)]


def test_forwards(made: Any) -> None:
    engine, deepspeed = made()
    assert engine.forward(cast(Any, "batch")).tolist() == [1.0, 1.0]
    assert engine.compare(cast(Any, "other")).tolist() == [1.0, 1.0]
    assert deepspeed.calls == [("forward", "batch", {}), ("forward", "other", {"compare": True})]


def test_a_step_sets_the_rate_of_all_groups(made: Any) -> None:
    engine, deepspeed = made()
    assert engine.step(0.25) == (2.5, False)
    assert deepspeed.calls == [("step", [0.25, 0.25])]


def test_graphs_are_the_models(made: Any) -> None:
    """Without any there is memory for them, and nothing to allow."""
    engine, _ = made()
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


def test_gates_are_closed_for_a_while(made: Any) -> None:
    """All adapter gates, and nothing else; they open again as they were, bit for bit."""
    engine, _ = made()
    gate, weight = engine.trainables["gate1"], engine.trainables["weight"]
    with engine.closed_gates():
        assert gate.tolist() == [0.0] and weight.tolist() == [1.0, 2.0]
    assert gate.tolist() == [0.5] and weight.tolist() == [1.0, 2.0]


def test_a_save_of_other_values_is_refused(made: Any) -> None:
    engine, _ = made()
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
