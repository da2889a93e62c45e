"""The ds_config of a run that names none: what the planner finds best for its model and batch on the GPUs that are there.

A function of the settings and of what the ranks told each other at the start, so that all ranks choose the same. What is
chosen changes no number, only where weights lie: a run may go on under another choice.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vico.data.datasets import DATASETS
from vico.distributed.topology import Member, by_host
from vico.errors import UserError
from vico.model.quantized_linear import library
from vico.planner import plan as planner
from vico.planner.gpu_specs import GIB, Hardware, detected_gpu
from vico.planner.memory import ModelSize, Shape, size_of
from vico.planner.plan import Plan, PlanRequest, TokenLengths
from vico.train.config import RunConfig
from vico.train.ds_config import read_config, resolve_auto

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    ds_config: dict[str, Any]
    name: str  # for the start line: what it is and, where it was chosen, why
    notes: tuple[str, ...] = ()


def named(config: RunConfig, num_ranks: int) -> dict[str, Any] | None:
    """What --deepspeed names; None: nothing. Raises UserError for a ds_config that does not fit the run, or --quantize."""
    if config.quantize is not None:
        library()
    if config.deepspeed == AUTO:
        return None
    found = read_config(
        config.deepspeed, config.precision, config.batch_size, config.accum_iter, num_ranks
    )
    if config.quantize is not None and found["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--quantize {config.quantize}: is for ZeRO-2, and --deepspeed {config.deepspeed} is ZeRO-3; leave one out"
        )
    return found


def choose(
    config: RunConfig, shape: Shape, num_ranks: int, hardware: Hardware | None, training: bool
) -> Choice:
    """`hardware`: None where the ranks have no GPUs. Raises UserError as `named` does, or for more recomputed layers than there are."""
    if (config.num_checkpointed or 0) > shape.n_layers:
        raise UserError(
            f"--checkpoint_activations {config.checkpoint_activations}: the model has {shape.n_layers} layers; full means all"
        )
    if (given := named(config, num_ranks)) is not None:
        return Choice(given, f"ZeRO-{given['zero_optimization']['stage']}")
    how = (config.precision, config.batch_size, config.accum_iter, num_ranks)
    if hardware is None:
        return Choice(
            read_config("zero2", *how),
            "ZeRO-2 (no --deepspeed is named and there is no GPU to plan for)",
        )
    size = size_of(config.model, shape, config.adapter_len, config.max_feats)
    stage, why, notes = _planned(_task(config, size, hardware, training))
    ds_config = resolve_auto(planner.ds_config(stage, size), Path(AUTO), *how)
    return Choice(ds_config, f"{_title(stage)} (no --deepspeed is named; {why})", notes)


def _task(config: RunConfig, size: ModelSize, hardware: Hardware, training: bool) -> PlanRequest:
    dataset = DATASETS[config.dataset]
    prompts = sum(task != "cap" for task in config.tasks)
    caption = planner.CAPTION_TOKENS if config.cap else 0
    longest = prompts * config.max_seq_len + (config.max_cap_len if config.cap else 0)
    lengths = TokenLengths(
        prompts * dataset.mean_question_tokens, caption, longest, dataset.num_train_questions
    )
    recomputed = (
        size.n_layers
        if config.num_checkpointed is None
        else min(config.num_checkpointed, size.n_layers)
    )
    if not training:  # nothing is kept for backward, and a forward takes few tokens
        return PlanRequest(
            size,
            hardware,
            lengths,
            config.precision,
            1,
            1,
            checkpointed=size.n_layers,
            max_tokens=longest,
            quantize=config.quantize,
        )
    budget = config.max_tokens or math.ceil(config.batch_size * lengths.both)
    return PlanRequest(
        size,
        hardware,
        lengths,
        config.precision,
        config.batch_size,
        config.accum_iter,
        checkpointed=recomputed,
        max_tokens=budget,
        quantize=config.quantize,
    )


def _planned(task: PlanRequest) -> tuple[planner.Stage, str, tuple[str, ...]]:
    """(stage, why, what the user should know). A plan is a reckoning: where it finds nothing that fits, the run is still tried."""
    found, short = _plan(task)
    if found is not None and found.stage != "zero3_offload":
        return found.stage, _expected(found), ()
    other, _ = _plan(replace(task, max_tokens=None, checkpointed=None))
    if found is not None:
        gentler = other is not None and other.stage != "zero3_offload"
        return (
            found.stage,
            _expected(found),
            (f"faster, as weights stay on the GPU: {_flags(other)}",) if other and gentler else (),
        )
    stage: planner.Stage = (
        "zero2" if task.quantize else "zero3" if task.hardware.ranks > 1 else "zero3_offload"
    )
    remedy = f"what fits: {_flags(other)}" if other else "`vico plan` tells what a model needs"
    why = "the planner knows of nothing that fits, and this takes the least"
    return stage, why, (f"warning: memory may run out: {short}; {remedy}",)


def _plan(task: PlanRequest) -> tuple[Plan | None, str]:
    """(the best way that fits, "") or (None, what is short)."""
    try:
        return planner.plan(task), ""
    except UserError as problem:
        return None, str(problem).split("; what would help: ")[0]


def _expected(plan: Plan) -> str:
    memory = plan.memory
    return f"the planner expects {memory.total / GIB:.1f} of {memory.available / GIB:.1f} GiB on {plan.task.hardware}"


def _flags(plan: Plan) -> str:
    return f"--checkpoint_activations {plan.checkpointing} --max_tokens {plan.max_tokens} (under {plan.stage})"


def _title(stage: planner.Stage) -> str:
    return {
        "zero2": "ZeRO-2",
        "zero3": "ZeRO-3",
        "zero3_offload": "ZeRO-3 with weights in the host's memory",
    }[stage]


def hardware(members: Sequence[Member]) -> Hardware | None:
    """Their machines as the planner sees them: equal ones, each the smallest that came. None where a rank has no GPU."""
    if not members or not all(m.gpu_bytes for m in members):
        return None
    hosts, smallest = by_host(members), min(members, key=lambda m: m.gpu_bytes)
    gpu, host_gib = (
        detected_gpu(smallest.device, smallest.gpu_bytes),
        min(m.host_bytes for m in members) / GIB,
    )
    return Hardware(gpu, min(map(len, hosts.values())), len(hosts), host_gib=host_gib)
