"""What the planner says of a case of the `node` suite: its questions, its memory and its speed."""

import argparse
from typing import Any, NamedTuple

import torch

from benchmarks.baseline.models import ADAPTER_LEN
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN, NUM_SLOTS
from benchmarks.measure.workload import SyntheticWorkload
from vico.distributed.world import World
from vico.model.config import LlamaConfig, ViCoConfig
from vico.planner.estimate import estimate_memory, max_budget
from vico.planner.gpu_specs import GIB, Hardware
from vico.planner.request import PlanRequest, Stage, TokenLengths
from vico.planner.speed import estimate_speed
from vico.train.zero_stage import hardware

MAX_QUESTIONS = 24  # of a micro-batch; more are not faster
QUESTIONS_WITHOUT_GPU = 2
SAMPLE = 64  # questions whose mean length counts
STAGES: dict[int, Stage] = {2: "zero2", 3: "zero3"}


class CasePlan(NamedTuple):
    questions: int  # of a micro-batch; 0: not even one fits
    predicted: dict[str, Any]  # {} without a GPU


def plan_case(
    args: argparse.Namespace, world: World, size: str, config: LlamaConfig, stage: int
) -> CasePlan:
    """--questions, or as many as the planner says fit, at most MAX_QUESTIONS."""
    machine = hardware(world.members)
    if machine is None:
        return CasePlan(args.questions or QUESTIONS_WITHOUT_GPU, {})
    return plan_on(machine, args.questions, args.precision, size, config, stage)


def plan_on(
    machine: Hardware,
    questions: int | None,
    precision: str,
    size: str,
    config: LlamaConfig,
    stage: int,
) -> CasePlan:
    """The plan of a case on this hardware, no layer recomputed."""
    work = SyntheticWorkload(config.vocab_size).training(0, SAMPLE)
    lengths = TokenLengths(
        question=sum(len(s.tokens) for s in work.vqa) / SAMPLE,
        caption=sum(len(s.tokens) for s in work.cap) / SAMPLE,
        longest=MAX_SEQ_LEN + MAX_CAP_LEN,
        questions=SAMPLE,
    )
    request = PlanRequest(
        size,
        ViCoConfig.from_llama(config, ADAPTER_LEN, NUM_SLOTS),
        machine,
        lengths,
        precision=precision,
        accum_iter=1,
    )
    name = STAGES[stage]
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
    return CasePlan(questions, predicted)


def small(config: LlamaConfig) -> LlamaConfig:
    """A model of this size's proportions that any machine trains in seconds."""
    return LlamaConfig(32 * config.n_layers // 16, config.n_layers // 16, 2, 600, multiple_of=32)


def out_of_memory(error: torch.cuda.OutOfMemoryError) -> str:
    return str(error).split(". ", 1)[0]
