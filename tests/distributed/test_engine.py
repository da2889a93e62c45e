"""The engine in this process: what moves and what does not; and the ds_config that a run gets."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

from support.processes import ROOT
from support.toy_dataset import ToyData
from vico.cli.flags import parse
from vico.data.batching import TrainingSteps
from vico.distributed import world as dist
from vico.errors import TrainingError, UserError
from vico.model.vico import initial_trainables
from vico.train.build import build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.ds_config import read_config
from vico.train.evaluate import evaluate
from vico.train.optim import learning_rate, peak_learning_rate
from vico.train.step import train_step


def config_of(toy: ToyData, *flags: str) -> RunConfig:
    return parse([*toy.flags, "--batch_size", "4", *flags], "vico train", "").resolve()


def test_after_an_evaluation_trainables_move_and_nothing_else(
    toy: ToyData, alone: dist.World
) -> None:
    config = config_of(toy, "--precision", "bf16")
    inputs = read_inputs(config, ("train", "val"), alone)
    values = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    for name, value in values.items():
        if name.endswith("gate1"):
            value.fill_(0.5)  # at 0 the prompts have no gradient
    engine = build_engine(config, inputs, values, alone)
    model = engine.module
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    evaluate(engine, inputs, "val", config, alone)
    steps = TrainingSteps(
        inputs.questions["train"],
        inputs.captions,
        inputs.features,
        inputs.prompts,
        num_slots=10,
        tasks=("vqa", "cap"),
        micro_batch_size=4,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        crop=True,
    )
    for k in range(3):
        train_step(engine, steps[0, k], k + 1, (1.0, 0.5), lr=1e-3, world=alone)
    moved = {
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter, before[name])
    }
    assert moved == set(inputs.trainable_shapes)
    assert all(
        p.dtype == (torch.float32 if n in moved else torch.bfloat16)
        for n, p in model.named_parameters()
    )
    weights, moments = engine.state()
    assert all(torch.equal(weights[n], dict(model.named_parameters())[n]) for n in moved)
    assert set(moments) == {f"{n}.{m}" for n in moved for m in ("exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_or_gradient_that_is_not_finite_updates_nothing(
    toy: ToyData, alone: dist.World, stage: int
) -> None:
    """In the first of two micro-batches."""
    config = config_of(toy, "--deepspeed", f"zero{stage}", "--accum_iter", "2")
    inputs = read_inputs(config, ("train",), alone)
    engine = build_engine(
        config, inputs, initial_trainables(inputs.trainable_shapes, 0.5, 0), alone
    )
    steps = TrainingSteps(
        inputs.questions["train"],
        inputs.captions,
        inputs.features,
        inputs.prompts,
        num_slots=10,
        tasks=("vqa", "cap"),
        micro_batch_size=4,
        accumulation=2,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=False,
        crop=False,
    )
    step = steps[0, 0]
    assert len(step.micro_batches) == 2
    train_step(engine, step, 1, (1.0, 0.5), lr=1e-3, world=alone)
    before, _ = engine.state()
    for factor in (float("nan"), float("inf"), -float("inf")):
        factors = iter((factor, 1.0))
        spoil = engine.module.visual_proj.register_forward_hook(
            lambda _module, _inputs, out, f=factors: (
                out.register_hook(partial(torch.mul, torch.tensor(next(f)))) and None
            )
        )
        with pytest.raises(
            TrainingError,
            match=r"gradient is not finite on rank 0 in step 2 \(questions v0000/0, v0001/0, ",
        ):
            train_step(engine, step, 2, (1.0, 0.5), lr=1e-3, world=alone)
        spoil.remove()
    forward = engine.forward
    for value in (
        float("inf"),
        float("nan"),
    ):  # of the losses alone, whose gradients say nothing of it
        values = iter((value, 0.0))
        engine.forward = lambda batch, v=values: forward(batch) + torch.tensor(next(v))  # type: ignore[method-assign]
        with pytest.raises(TrainingError, match="loss is not finite on rank 0 in step 2"):
            train_step(engine, step, 2, (1.0, 0.5), lr=1e-3, world=alone)
        engine.forward = forward  # type: ignore[method-assign]
    step.micro_batches[0].features_VFC[0, 0, 0] = float("nan")
    with pytest.raises(TrainingError, match="loss is not finite on rank 0 in step 2"):
        train_step(engine, step, 2, (1.0, 0.5), lr=1e-3, world=alone)
    after, _ = engine.state()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("stage", [2, 3])
def test_a_rehearsal_leaves_no_trace(toy: ToyData, alone: dist.World, stage: int) -> None:
    """Not even of numbers that are not finite. The same bits after two steps of two micro-batches each."""
    config = config_of(toy, "--deepspeed", f"zero{stage}", "--accum_iter", "2")
    inputs = read_inputs(config, ("train",), alone)
    if stage == 3:
        inputs.ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    values = {
        name: torch.full_like(v, 0.3) if "gate1" in name else v
        for name, v in initial_trainables(inputs.trainable_shapes, 0.5, 0).items()
    }
    steps = TrainingSteps(
        inputs.questions["train"],
        inputs.captions,
        inputs.features,
        inputs.prompts,
        num_slots=10,
        tasks=("vqa", "cap"),
        micro_batch_size=4,
        accumulation=2,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        crop=True,
    )
    ends = []
    for rehearsed in (False, True):
        engine = build_engine(config, inputs, values, alone)
        if rehearsed:
            batch, num_questions = steps.longest()
            assert num_questions == 4
            batch.features_VFC.fill_(float("inf"))
            engine.train(True)
            engine.dry_run(batch)
        for k in range(2):
            train_step(engine, steps[0, k], k + 1, (1.0, 0.5), lr=1e-3, world=alone)
        ends.append(engine.state())
    for one, other in zip(*ends, strict=True):
        assert one.keys() == other.keys() and all(
            torch.equal(value, other[name]) for name, value in one.items()
        )


@pytest.mark.parametrize("max_tokens", [None, 700, 1500])
def test_no_micro_batch_is_longer_than_the_longest(
    toy: ToyData, alone: dist.World, max_tokens: int | None
) -> None:
    inputs = read_inputs(config_of(toy), ("train",), alone)
    steps = TrainingSteps(
        inputs.questions["train"],
        inputs.captions,
        inputs.features,
        inputs.prompts,
        num_slots=10,
        tasks=("vqa", "cap"),
        micro_batch_size=2,
        accumulation=4,
        rank=0,
        world_size=1,
        seed=0,
        shuffle=True,
        crop=True,
        max_tokens=max_tokens,
    )
    met = [
        batch.num_real_tokens
        for epoch in range(4)
        for k in range(3)
        for batch in steps[epoch, k].micro_batches
    ]
    longest = steps.longest()[0].num_real_tokens
    assert longest <= (max_tokens or longest)
    assert max(met) <= (longest if max_tokens is None else longest + 0.01 * max_tokens)


def test_order_is_a_function_of_seed_and_epoch_and_ranks_divide_it(
    toy: ToyData, alone: dist.World
) -> None:
    inputs = read_inputs(config_of(toy), ("train",), alone)

    def steps(rank: int, size: int, seed: int = 0) -> TrainingSteps:
        return TrainingSteps(
            inputs.questions["train"],
            inputs.captions,
            inputs.features,
            inputs.prompts,
            num_slots=10,
            tasks=("vqa", "cap"),
            micro_batch_size=8 // size,
            accumulation=1,
            rank=rank,
            world_size=size,
            seed=seed,
            shuffle=True,
            crop=True,
        )

    one = steps(0, 1)
    assert sorted(one.order(0)) == list(range(20)) and list(one.order(0)) != list(
        one.order(1)
    ) != list(steps(0, 1, seed=1).order(1))
    assert one.steps_per_epoch == 3
    for size in (2, 4, 8):
        ranks = [steps(rank, size) for rank in range(size)]
        for k in range(3):
            parts = [r[0, k] for r in ranks]
            assert all(p.dummy is not None and (p.dummy.target_tasks == 2).all() for p in parts), (
                "of no task"
            )
            assert sum(p.target_counts for p in parts).tolist() == one[0, k].target_counts.tolist()  # type: ignore[union-attr]
            assert sum(p.num_real_tokens for p in parts) == one[0, k].num_real_tokens


def test_micro_batches_of_a_token_budget(toy: ToyData, alone: dist.World) -> None:
    inputs = read_inputs(config_of(toy), ("train",), alone)
    how = {
        "num_slots": 10,
        "tasks": ("vqa", "cap"),
        "micro_batch_size": 10,
        "accumulation": 1,
        "rank": 0,
        "world_size": 1,
        "seed": 0,
    }
    common = (inputs.questions["train"], inputs.captions, inputs.features, inputs.prompts)
    whole = TrainingSteps(*common, **how, shuffle=True, crop=True)[0, 0]  # type: ignore[arg-type]
    cut = TrainingSteps(*common, **how, shuffle=True, crop=True, max_tokens=900)[0, 0]  # type: ignore[arg-type]
    assert len(whole.micro_batches) == 1 < len(cut.micro_batches)
    assert all(batch.num_real_tokens <= 900 for batch in cut.micro_batches)
    assert (
        torch.equal(whole.target_counts, cut.target_counts)
        and whole.num_real_tokens == cut.num_real_tokens
    )


def test_learning_rate() -> None:
    def lr(step: int) -> float:
        return learning_rate(
            step, steps_per_epoch=10, peak=1.0, minimum=0.1, warmup_epochs=2, epochs=10
        )

    assert [lr(0), lr(5), lr(20), lr(60), lr(100)] == pytest.approx([0.0, 0.25, 1.0, 0.55, 0.1])
    assert learning_rate(7, 10, 1.0, 0.0, warmup_epochs=40, epochs=5) == pytest.approx(0.7 / 40), (
        "a warm-up that never ends"
    )
    assert (
        peak_learning_rate(None, 9e-2, 128) == pytest.approx(0.045)
        and peak_learning_rate(0.3, 9e-2, 128) == 0.3
    )


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_shipped_ds_configs(name: str) -> None:
    config = read_config(name, "bf16", micro_batch_size=8, accumulation=2, world_size=4)
    assert (
        config["train_micro_batch_size_per_gpu"],
        config["gradient_accumulation_steps"],
        config["train_batch_size"],
    ) == (8, 2, 64)
    assert (
        config["zero_optimization"]["stage"] == int(name[-1]) and config["gradient_clipping"] == 0.0
    )
    assert "auto" not in json.dumps(config) and "bf16" not in config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_batch_size": 7},
            r"train_batch_size 7 does not fit --batch_size 8 --accum_iter 2 on 4 rank\(s\), which make 64",
        ),
        (
            {"zero_optimizaton": {}},
            "unknown key 'zero_optimizaton'; did you mean 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stage": 2, "reduce_bucket_sze": 1}},
            "did you mean 'reduce_bucket_size'",
        ),
        ({"zero_optimization": {"stage": 0}}, "stage is 0; use 1, 2 or 3"),
        ({"optimizer": {"type": "Adam"}}, "'optimizer' must go"),
        ({"bf16": {"enabled": False}}, "bf16.enabled false against --precision bf16"),
    ],
)
def test_ds_configs_that_do_not_fit(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({**json.loads((ROOT / "ds_configs" / "zero2.json").read_text()), **change})
    )
    with pytest.raises(UserError, match=message):
        read_config(str(path), "bf16", micro_batch_size=8, accumulation=2, world_size=4)
