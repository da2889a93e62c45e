"""One rank of test_node_shards.py: trains, evaluates, saves and resumes under ZeRO-3.

OUT KINDS FLAGS: for each kind of --quantize, first with frozen weights where the run puts them by
itself, then divided over all ranks, from the state that the first one saved. Rank 0 writes what it
saw to OUT, by kind.
"""

import dataclasses
import sys
from typing import Any

import torch

from support.training_steps import training_steps
from vico.cli.flags import parse
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.model.vico import initial_trainables
from vico.planner.estimate import FROZEN_SHARDS, OVER_ALL
from vico.train.build import Inputs, build_engine, read_inputs
from vico.train.config import RunConfig
from vico.train.engine import Engine
from vico.train.evaluate import evaluate
from vico.train.step import train_step

TASK_WEIGHTS = (1.0, 0.5)
NUM_STEPS, SAVED_STEP = 4, 2
QUESTIONS = 8  # of a step
State = dict[str, torch.Tensor]


def main(argv: list[str]) -> None:
    world, seen = dist.connect(), {}
    for kind in argv[1].split(","):
        config = parse([*argv[2:], "--quantize", kind], "vico train", "").resolve()
        inputs = read_inputs(config, ("train", "val"), world)
        seen[kind] = of_kind = steps_of_a_run(config, inputs, world)
        over_all = {**inputs.ds_config, FROZEN_SHARDS: OVER_ALL}
        again = dataclasses.replace(inputs, ds_config=over_all)
        of_kind["resumed over all"] = steps_of_a_run(config, again, world, of_kind["saved"])
    if world.is_main:
        torch.save(seen, argv[0])
    dist.disconnect(world)


def steps_of_a_run(
    config: RunConfig, inputs: Inputs, world: World, saved: tuple[State, State] | None = None
) -> dict[str, Any]:
    """Micro-batches of --batch_size. `saved`: weights and moments after SAVED_STEP steps."""
    trainables = initial_trainables(inputs.trainable_shapes, bias=0.7, seed=0)
    trainables = {k: v + 0.3 if k.endswith("gate1") else v for k, v in trainables.items()}
    engine = build_engine(config, inputs, trainables if saved is None else saved[0], world)
    if saved is not None:
        engine.set_moments(saved[1], SAVED_STEP)
    steps = training_steps(
        inputs,
        micro_batch_size=config.batch_size,
        accumulation=QUESTIONS // config.batch_size // world.size,
        rank=world.rank,
        world_size=world.size,
    )
    seen: dict[str, Any] = {"stage": inputs.stage, "losses": []}
    for k in range(0 if saved is None else SAVED_STEP, NUM_STEPS):
        step = steps[divmod(k, steps.steps_per_epoch)]
        report = train_step(engine, step, k + 1, TASK_WEIGHTS, lr=1e-3, world=world)
        seen["losses"].append(report.task_losses())
        if k + 1 == SAVED_STEP:
            seen["saved"] = engine.state()
    seen["weights"], _ = engine.state()
    engine.require_live(seen["weights"])
    seen["scores"] = evaluate(engine, inputs, "val", config, world).scores
    seen["held"] = held_share(engine)
    return seen


def held_share(engine: Engine) -> float:
    """The share of the frozen numbers that this rank keeps all the time."""
    if engine.stage < 3:
        return 1.0
    frozen: list[Any] = [p for p in engine.module.parameters() if not p.requires_grad]
    held = sum(p.ds_tensor.numel() for p in frozen)
    return float(held / sum(p.ds_numel for p in frozen))


if __name__ == "__main__":
    main(sys.argv[1:])
