"""Ranks whose gradients arrive in different orders are stopped: their sums would mix parameters."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

from faults.emulated_ranks import EmulatedWorld, Exchange
from support.processes import start
from support.toy_dataset import ToyData
from support.training_steps import config_of, training_steps
from vico.distributed.world import World
from vico.errors import UserError
from vico.model.vico import initial_trainables
from vico.train.build import build_engine, read_inputs
from vico.train.gradient_order import NUM_CHECKS, GradientOrder

# On rank 1 a gate is used, without effect, before all else: its gradient then arrives after others.
OTHER_ORDER = """
import os
from vico.cli.main import console
from vico.model.vico import ViCo

right = ViCo.forward

def other(model, batch, **more):
    early = model.layers[-1].attention.gate1.sum() * 0
    return right(model, batch, **more) + early

if os.environ["RANK"] == "1":
    ViCo.forward = other
console()
"""


def test_a_run_with_other_orders_is_stopped(toy: ToyData, tmp_path: Path) -> None:
    """In the dry run already, on both ranks, with one line; no step is logged or saved."""
    flags = ("train", *toy.flags, "--output_dir", str(tmp_path / "run"), "--save_steps", "1")
    run = start(*flags, ranks=2, program=("-c", OTHER_ORDER))
    assert run.wait() == [UserError.exit_code] * 2, run.output
    (error,) = run.errors
    assert "rank(s) 1 (the first on " in error and "gate1" in error
    assert not list((tmp_path / "run").glob("checkpoint*"))
    assert not (tmp_path / "run" / "steps.jsonl").read_text()


class Chain(nn.Module):
    """Gradients arrive from the last layer to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(2, 2, bias=False) for _ in range(3)])

    def forward(self, early: nn.Parameter | None) -> torch.Tensor:
        start = 0 if early is None else early.sum() * 0
        return self.layers(torch.ones(2)).sum() + start


def test_ranks_and_the_first_parameter_are_named() -> None:
    """Ranks 1 and 3 of four differ, in the third step."""
    exchange = Exchange(4)

    def steps_until_error(rank: int) -> tuple[int, str]:
        world = EmulatedWorld(rank, 4, torch.device("cpu"), None, exchange=exchange)
        model = Chain()
        order = GradientOrder(dict(model.named_parameters()))
        for step in range(NUM_CHECKS):
            early = model.layers[2].weight if rank % 2 and step == 2 else None
            model(early).backward()
            try:
                order.check(world)
            except UserError as error:
                assert error.of_all_ranks
                return step, str(error)
        return NUM_CHECKS, ""

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(steps_until_error, range(4)))
    assert len(set(results)) == 1
    step, said = results[0]
    assert step == 2 and "rank(s) 1, 3 (the first on " in said
    assert "first at number 1: layers.1.weight against layers.2.weight; " in said


def module_of(name: str) -> str:
    return name.rpartition(".")[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_it_is_the_order_of_deepspeeds_buckets(
    stage: int, toy: ToyData, alone: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(toy, "--deepspeed", f"zero{stage}")
    inputs = read_inputs(config, ("train",), alone)
    values = initial_trainables(inputs.trainable_shapes, bias=0.5, seed=0)
    engine = build_engine(config, inputs, values, alone)
    names = {id(p): name for name, p in engine.trainables.items()}
    zero = engine._engine.optimizer
    put_in_bucket, bucket = zero.reduce_independent_p_g_buckets_and_remove_grads, list[str]()

    def watched(parameter: nn.Parameter, *more: object) -> None:
        bucket.append(names[id(parameter)])
        put_in_bucket(parameter, *more)

    monkeypatch.setattr(zero, "reduce_independent_p_g_buckets_and_remove_grads", watched)
    order = GradientOrder(engine.trainables)
    engine.train(True)
    engine.dry_run(training_steps(inputs)[0, 0].micro_batches[0])
    assert sorted(order._names) == sorted(bucket) == sorted(engine.trainables)
    if stage == 3:  # the gradients of a block, a leaf module, go together once all are there
        order._names, bucket = [*map(module_of, order._names)], [*map(module_of, bucket)]
    assert order._names == bucket


def test_it_costs_nothing_afterwards(alone: World) -> None:
    """No hook is left on a parameter, and on one rank not even after the first call."""
    model = Chain()
    order = GradientOrder(dict(model.named_parameters()))
    assert all(p._backward_hooks for p in model.parameters())
    order.check(alone)
    assert not any(p._backward_hooks for p in model.parameters())
