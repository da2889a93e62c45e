"""One rank of test_zero_options.py: trains, saves and resumes under each ds_config of a file.

FILE FLAGS: the file is a JSON object of zero_optimization sections by name. Prints a line for each.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch

from support.training_steps import training_steps
from vico.cli.flags import parse
from vico.data.batching import TrainingSteps
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.model.vico import initial_trainables
from vico.train.build import Inputs, build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.step import train_step

TASK_WEIGHTS = (1.0, 0.5)
State = dict[str, torch.Tensor]


def main(argv: list[str]) -> None:
    sections: dict[str, Any] = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    config = parse(argv[1:], "vico train", "").resolve()
    world = dist.connect()
    inputs = read_inputs(config, ("train",), world)
    steps = training_steps(inputs, rank=world.rank, world_size=world.size, micro_batch_size=2)
    first: State | None = None
    for name, section in sections.items():
        ds_config = {**inputs.ds_config, "zero_optimization": section}
        own = dataclasses.replace(inputs, ds_config=ds_config)
        result, faults = try_options(config, own, steps, world)
        first = first or result
        if any(not torch.allclose(v, first[k], rtol=1e-4, atol=1e-7) for k, v in result.items()):
            faults.append("trains otherwise")
        world.print_rank0(f"{name}: {', '.join(faults) or 'ok'}")
    dist.disconnect(world)


def try_options(
    config: RunConfig, inputs: Inputs, steps: TrainingSteps, world: World
) -> tuple[State, list[str]]:
    """(weights after three steps, what is wrong with a save after two of them)."""

    def step(engine: Engine, number: int) -> State:
        train_step(engine, steps[0, number], number + 1, TASK_WEIGHTS, lr=1e-2, world=world)
        weights, moments = engine.state()
        return {**weights, **moments}

    trainables = initial_trainables(inputs.trainable_shapes, bias=0.7, seed=0)
    trainables = {k: v + 0.3 if k.endswith("gate1") else v for k, v in trainables.items()}
    whole = build_engine(config, inputs, trainables, world)
    step(whole, 0)
    step(whole, 1)
    weights, moments = whole.state()
    faults = []
    try:
        whole.require_live(weights)
    except ValueError:
        faults.append("saves what is not live")
    resumed = build_engine(config, inputs, weights, world)
    resumed.set_moments(moments, 2)
    expected, result = step(whole, 2), step(resumed, 2)
    if any(not torch.equal(value, result[name]) for name, value in expected.items()):
        faults.append("resumes otherwise")
    return {name: expected[name] for name in weights}, faults


if __name__ == "__main__":
    main(sys.argv[1:])
