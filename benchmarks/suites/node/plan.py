"""What the planner says of a case of the `node` suite: its questions, its memory and its speed."""

import argparse
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.baseline.models import ADAPTER_LEN
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN, NUM_SLOTS
from benchmarks.measure.workload import SyntheticWorkload
from vico.distributed.topology import has_large_nodes
from vico.distributed.world import World
from vico.errors import UserError
from vico.model.config import LlamaConfig, ViCoConfig
from vico.planner.estimate import estimate_memory, max_budget
from vico.planner.gpu_specs import GIB, Hardware
from vico.planner.plan import plan
from vico.planner.request import PlanRequest, Stage, TokenLengths
from vico.planner.speed import estimate_speed
from vico.train.backbone import DTYPES
from vico.train.zero_stage import hardware

MAX_QUESTIONS = 24  # of a micro-batch; more are not faster
QUESTIONS_WITHOUT_GPU = 2
SAMPLE = 64  # questions whose mean length counts
# Share of a GPU's memory that the frozen weights may take.
MAX_WEIGHT_SHARE = 0.92
STAGES: dict[int, Stage] = {2: "zero2", 3: "zero3"}


class CasePlan(NamedTuple):
    questions: int  # of a micro-batch; 0: not even one fits
    predicted: dict[str, Any]  # {} without a GPU
    in_nodes: bool = False  # ZeRO-3 divides the frozen weights within each node
    keeps_fit: bool = True  # the same step fits where each rank has all weights


def plan_case(
    args: argparse.Namespace,
    world: World,
    size: str,
    config: LlamaConfig,
    stage: int,
    workload: SyntheticWorkload,
) -> CasePlan:
    """--questions, or as many as the planner says fit, at most MAX_QUESTIONS."""
    machine = hardware(world.members)
    if machine is None:
        in_nodes = stage == 3 and has_large_nodes(world.members)
        return CasePlan(args.questions or QUESTIONS_WITHOUT_GPU, {}, in_nodes)
    return plan_on(machine, args.questions, args.precision, size, config, stage, workload)


def plan_on(
    machine: Hardware,
    questions: int | None,
    precision: str,
    size: str,
    config: LlamaConfig,
    stage: int,
    workload: SyntheticWorkload,
) -> CasePlan:
    """The plan of a case on this hardware, no layer recomputed."""
    work = workload.training(0, SAMPLE)
    lengths = TokenLengths(
        question=sum(len(s.tokens) for s in work.vqa) / SAMPLE,
        caption=sum(len(s.tokens) for s in work.cap) / SAMPLE,
        longest=MAX_SEQ_LEN + MAX_CAP_LEN,
        questions=SAMPLE,
    )
    name = STAGES[stage]
    request = PlanRequest(
        size,
        ViCoConfig.from_llama(config, ADAPTER_LEN, NUM_SLOTS),
        machine,
        lengths,
        precision=precision,
        accum_iter=1,
        stage=name,
        num_checkpointed=0,
    )
    request = replace(request, node_shards=_in_nodes(request))
    largest = max_budget(request, name, 0)
    if questions is None:
        questions = min(MAX_QUESTIONS, int(largest / lengths.both))
    tokens = round(max(1, questions) * lengths.both)
    speed, unknown = estimate_speed(request, name, 0, tokens)
    predicted = {
        "largest_tokens": largest,
        "memory_gib": estimate_memory(request, name, 0, tokens).total / GIB,
        "available_gib": machine.gpu.memory_gib,
        "real_tokens_per_second": unknown if speed is None else speed.tokens_per_second,
    }
    alone = replace(request, hardware=replace(machine, gpus=1, nodes=1), node_shards=False)
    keeps_fit = estimate_memory(alone, name, 0, tokens).spare >= 0
    return CasePlan(questions, predicted, bool(request.node_shards), keeps_fit)


def _in_nodes(request: PlanRequest) -> bool:
    """As a training run decides (vico/train/zero_stage.py)."""
    try:
        return bool(plan(request).request.node_shards)
    except UserError:
        return False


def too_large(
    args: argparse.Namespace, world: World, config: LlamaConfig, stage: int
) -> str | None:
    """Why the weights of ZeRO-2 cannot lie on each GPU; None: they can."""
    if stage == 3 or world.device.type != "cuda":
        return None
    weights = config.num_parameters * DTYPES[args.precision].itemsize
    total = torch.cuda.get_device_properties(world.device).total_memory
    if weights <= MAX_WEIGHT_SHARE * total:
        return None
    return f"{weights / GIB:.0f} GiB of weights per GPU, {total / GIB:.0f} GiB of memory"


def small(config: LlamaConfig) -> LlamaConfig:
    """A model of this size's proportions that any machine trains in seconds."""
    return LlamaConfig(32 * config.n_layers // 16, config.n_layers // 16, 2, 600, multiple_of=32)


def out_of_memory(error: torch.cuda.OutOfMemoryError) -> str:
    return str(error).split(". ", 1)[0]
