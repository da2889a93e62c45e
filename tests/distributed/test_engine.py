"""The engine on one rank, in this process: what a step changes, and what it must not change."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from support.toy_dataset import ToyData
from support.training_steps import config_of, training_steps
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.model.batch import PackedBatch
from vico.model.vico import initial_trainables
from vico.train.build import build_engine, read_inputs
from vico.train.engine import Engine, let_segments_expand
from vico.train.evaluate import evaluate
from vico.train.step import train_step

NAN, INF = float("nan"), float("inf")
TASK_WEIGHTS = (1.0, 0.5)


def test_the_allocator_is_configured_unless_the_user_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """For ZeRO-3 on GPUs, by a call of torch that is private: it must be there, and take effect."""
    settings: list[str] = []
    before = torch._C._accelerator_getAllocatorSettings()
    let_segments_expand({})
    assert torch._C._accelerator_getAllocatorSettings() == "expandable_segments:True"
    torch._C._accelerator_setAllocatorSettings(before)
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", settings.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        let_segments_expand({name: "max_split_size_mb:64"})
        assert settings == []
    let_segments_expand({"PYTORCH_ALLOC_CONF": ""})
    assert settings == ["expandable_segments:True"]


def with_gates(values: dict[str, Tensor], gate: float) -> dict[str, Tensor]:
    """With the prompts' gates at `gate`: at 0 the prompts have no gradient."""
    return {
        name: torch.full_like(value, gate) if name.endswith("gate1") else value
        for name, value in values.items()
    }


def test_step_moves_the_trainables_only(toy: ToyData, alone: World) -> None:
    """After an evaluation and three steps."""
    config = config_of(toy, "--precision", "bf16")
    inputs = read_inputs(config, ("train", "val"), alone)
    values = with_gates(initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0), 0.5)
    engine = build_engine(config, inputs, values, alone)
    parameters = dict(engine.module.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    evaluate(engine, inputs, "val", config, alone)
    steps = training_steps(inputs)
    for k in range(3):
        train_step(engine, steps[0, k], k + 1, TASK_WEIGHTS, lr=1e-3, world=alone)
    moved = {name for name, value in parameters.items() if not torch.equal(value, before[name])}
    assert moved == set(inputs.trainable_shapes)
    for name, parameter in parameters.items():
        assert parameter.dtype == (torch.float32 if name in moved else torch.bfloat16), name
    weights, moments = engine.state()
    assert all(torch.equal(weights[name], parameters[name]) for name in moved)
    first_moments = {f"{name}.exp_avg" for name in moved}
    second_moments = {f"{name}.exp_avg_sq" for name in moved}
    assert set(moments) == first_moments | second_moments


@contextmanager
def scaled_gradient(engine: Engine, factor: float) -> Iterator[None]:
    """The gradient of the first micro-batch is multiplied by `factor`, that of the second by 1."""
    factors = iter((factor, 1.0))

    def scale(_module: object, _inputs: object, output: Tensor) -> None:
        number = torch.tensor(next(factors))
        output.register_hook(lambda gradient: gradient * number)

    handle = engine.module.visual_proj.register_forward_hook(scale)
    yield
    handle.remove()


@contextmanager
def added_to_losses(engine: Engine, value: float) -> Iterator[None]:
    """Only the first micro-batch's losses get `value`, which no gradient shows."""
    values = iter((value, 0.0))
    forward = engine.forward

    def forward_plus(batch: PackedBatch) -> Tensor:
        return forward(batch) + torch.tensor(next(values))

    engine.forward = forward_plus  # type: ignore[method-assign]
    yield
    engine.forward = forward  # type: ignore[method-assign]


@pytest.mark.parametrize("stage", [2, 3])
def test_non_finite_step_updates_nothing(toy: ToyData, alone: World, stage: int) -> None:
    """A gradient, a loss or a feature that is not finite, in the first of two micro-batches."""
    config = config_of(toy, "--deepspeed", f"zero{stage}", "--accum_iter", "2")
    inputs = read_inputs(config, ("train",), alone)
    values = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    engine = build_engine(config, inputs, values, alone)
    step = training_steps(inputs, accumulation=2, in_file_order=True)[0, 0]
    assert len(step.micro_batches) == 2
    train_step(engine, step, 1, TASK_WEIGHTS, lr=1e-3, world=alone)
    before, _ = engine.state()

    def assert_refused(message: str) -> None:
        with pytest.raises(TrainingError, match=message):
            train_step(engine, step, 2, TASK_WEIGHTS, lr=1e-3, world=alone)

    gradient_error = r"gradient is not finite on rank 0 in step 2 \(questions v0000/0, v0001/0, "
    for factor in (NAN, INF, -INF):
        with scaled_gradient(engine, factor):
            assert_refused(gradient_error)
    loss_error = "loss is not finite on rank 0 in step 2"
    for value in (INF, NAN):
        with added_to_losses(engine, value):
            assert_refused(loss_error)
    step.micro_batches[0].features_VFC[0, 0, 0] = NAN
    assert_refused(loss_error)
    after, _ = engine.state()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("stage", [2, 3])
def test_dry_run_leaves_no_trace(toy: ToyData, alone: World, stage: int) -> None:
    """Not even one of infinite features: two steps of two micro-batches end in the same bits."""
    config = config_of(toy, "--deepspeed", f"zero{stage}", "--accum_iter", "2")
    inputs = read_inputs(config, ("train",), alone)
    if stage == 3:
        inputs.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    values = with_gates(initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0), 0.3)
    steps = training_steps(inputs, accumulation=2)

    def dry_run(engine: Engine) -> None:
        batch, num_questions = steps.longest()
        assert num_questions == 4
        batch.features_VFC.fill_(INF)
        engine.train(True)
        engine.dry_run(batch)

    def state_after_two_steps(prepare: Callable[[Engine], None] | None) -> Any:
        engine = build_engine(config, inputs, values, alone)
        if prepare is not None:
            prepare(engine)
        for k in range(2):
            train_step(engine, steps[0, k], k + 1, TASK_WEIGHTS, lr=1e-3, world=alone)
        return engine.state()

    plain, after_dry_run = state_after_two_steps(None), state_after_two_steps(dry_run)
    for tensors, other in zip(plain, after_dry_run, strict=True):
        assert tensors.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in tensors.items())
