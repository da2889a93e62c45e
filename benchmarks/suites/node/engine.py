"""The engine of a case: as a training run builds it, with random weights.

They are a function of the seed and the parameter's name. Every rank makes each tensor and keeps its
part. So neither the stage nor the number of ranks changes them, and nothing is sent.
"""

import argparse
import zlib

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from benchmarks.baseline.models import make_fast, random_value
from vico.distributed.world import World
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.ops import triton_ops
from vico.planner.estimate import FROZEN_SHARDS, IN_NODES
from vico.train.backbone import DTYPES
from vico.train.build import frozen_group, why_no_graphs
from vico.train.ds_config import read_config
from vico.train.engine import Engine, load_parameter, zero_init
from vico.train.optim import make_optimizer

WEIGHT_DECAY = 0.14


def make_engine(
    args: argparse.Namespace,
    world: World,
    config: LlamaConfig,
    stage: int,
    questions: int,
    in_nodes: bool = False,
    keeps_weights: bool = False,
) -> Engine:
    """As vico.train.build.build_engine does. A collective.

    `questions`: of a micro-batch. `in_nodes`: ZeRO-3 divides the frozen weights within each node.
    `keeps_weights`: each rank has all of them instead, so that ZeRO-3 gathers none.
    """
    dtype = DTYPES[args.precision]
    attend, reason = choose_attention(args.attention, world.device, dtype)
    ds_config = read_config(f"zero{stage}", args.precision, questions, 1, world.size)
    if in_nodes:
        ds_config[FROZEN_SHARDS] = IN_NODES
    group = frozen_group(ds_config, world)
    if keeps_weights:
        group, _ = torch_dist.new_subgroups_by_enumeration([[rank] for rank in range(world.size)])
    with zero_init(ds_config, world.device, group):
        model = make_fast(config, dtype)
    set_random_weights(model, args.seed, world.device)
    graphs = choose_block_runners(model, attend, no_graphs=why_no_graphs(ds_config))
    description = f"{reason}, {triton_ops.describe(world.device)}, {graphs}"
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainables, WEIGHT_DECAY)
    return Engine(model, optimizer, ds_config, dtype, description)


def set_random_weights(model: nn.Module, seed: int, device: torch.device) -> None:
    for name, parameter in model.named_parameters():
        generator = torch.Generator(device)
        generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        shape = getattr(parameter, "ds_shape", parameter.shape)
        set_value(parameter, random_value(name, shape, generator))


def set_value(parameter: nn.Parameter, value: Tensor) -> None:
    """`value`: the whole tensor. Under stage 3 each rank keeps its part."""
    load_parameter(parameter, lambda start, stop: value.flatten()[start:stop])
