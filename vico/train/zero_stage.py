"""The ds_config of a run without --deepspeed: the planner's best for its model, batch and GPUs.

It depends only on the settings and on what the ranks exchanged at the start, so all ranks choose
the same. The choice changes no number, only where weights lie: a run may resume under another one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from vico.data.datasets import find_dataset
from vico.distributed.topology import Member, by_node
from vico.errors import UserError
from vico.model.config import KEPT_POSITIONS, QUANTIZED_BYTES, LlamaConfig, ViCoConfig
from vico.model.quantized_linear import require_available
from vico.planner.estimate import (
    FROZEN_SHARDS,
    IN_NODES,
    planned_ds_config,
)
from vico.planner.gpu_specs import GIB, Hardware, detected_gpu
from vico.planner.plan import HELP_MARK, Plan, plan
from vico.planner.request import CAPTION_TOKENS, PlanRequest, Stage, TokenLengths
from vico.train.backbone import DTYPES
from vico.train.config import RunConfig
from vico.train.ds_config import read_config, resolve_auto

AUTO = "auto"
TITLES: dict[Stage, str] = {
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3 with weights in the host's memory",
}


@dataclass(frozen=True)
class Choice:
    ds_config: dict[str, Any]
    name: str  # for the start line: the stage and, if the planner chose it, why
    notes: tuple[str, ...] = ()
    max_tokens: int | None = None  # the planner's, where --max_tokens is not given on a GPU


def choose(
    config: RunConfig,
    llama: LlamaConfig,
    num_ranks: int,
    hardware: Hardware | None,
    training: bool,
    large_nodes: bool = False,
) -> Choice:
    """The ds_config that --deepspeed names, or else the planner's. `hardware` is None on CPUs.

    `large_nodes`: there are several nodes, each of several ranks. ZeRO-3 then divides the frozen
    weights within each node where that fits, unless the ds_config says how. Raises UserError as
    `named_ds_config` does, or if the model has fewer layers than are to be recomputed.
    """
    if (config.num_checkpointed or 0) > llama.n_layers:
        raise UserError(
            f"--checkpoint_activations {config.checkpoint_activations}: the model has "
            f"{llama.n_layers} layers; full means all"
        )
    ds_config = named_ds_config(config, num_ranks)
    request = None if hardware is None else _request(config, llama, hardware, training)
    if ds_config is not None:
        return _of_named(ds_config, request, large_nodes)
    batch = (config.precision, config.batch_size, config.accum_iter, num_ranks)
    if request is None:
        reason = "no --deepspeed is named and there is no GPU to plan for"
        return Choice(read_config("zero2", *batch), f"ZeRO-2 ({reason})")
    chosen, reason, notes = _choose_stage(request)
    ds_config = resolve_auto(chosen.ds_config, Path(AUTO), *batch)
    title = f"{TITLES[chosen.stage]}{_in(ds_config)}"
    name = f"{title} (no --deepspeed is named; {reason})"
    return _with_budget(Choice(ds_config, name, notes), request, chosen.plan)


def _of_named(ds_config: dict[str, Any], request: PlanRequest | None, large_nodes: bool) -> Choice:
    """The ds_config that the user named, and what the planner decides for it."""
    stage, shards = _stage_of(ds_config), ds_config.get(FROZEN_SHARDS)
    in_nodes, best = large_nodes and stage == "zero3", None
    if request is not None:
        node_shards = None if shards is None else shards == IN_NODES
        request = replace(request, stage=stage, node_shards=node_shards)
        best, _ = _try_plan(request)
        in_nodes = best is not None and bool(best.request.node_shards)
    if in_nodes and shards is None:
        ds_config[FROZEN_SHARDS] = IN_NODES
    name = f"ZeRO-{ds_config['zero_optimization']['stage']}{_in(ds_config)}"
    return _with_budget(Choice(ds_config, name), request, best)


def _stage_of(ds_config: Mapping[str, Any]) -> Stage:
    zero = ds_config["zero_optimization"]
    if zero["stage"] < 3:
        return "zero2"
    return "zero3_offload" if zero.get("offload_param") else "zero3"


def _with_budget(choice: Choice, request: PlanRequest | None, best: Plan | None) -> Choice:
    """`choice` with the plan's token budget, if none is given and there is a plan."""
    if request is None or request.max_tokens is not None or best is None:
        return choice
    note = (
        f"--max_tokens {best.max_tokens}: not given, so the planner's, {_expected(best)}; a step's "
        "questions are the same, and --max_tokens 0 splits them by --batch_size"
    )
    return replace(choice, notes=(*choice.notes, note), max_tokens=best.max_tokens)


def _in(ds_config: Mapping[str, Any]) -> str:
    in_nodes = ds_config.get(FROZEN_SHARDS) == IN_NODES
    return ", frozen weights divided within each node" if in_nodes else ""


def named_ds_config(config: RunConfig, num_ranks: int) -> dict[str, Any] | None:
    """The ds_config that --deepspeed names; None if it names none.

    Raises UserError if the ds_config does not fit the run, or --quantize cannot be used.
    """
    ds_config = None
    if config.deepspeed != AUTO:
        batch = (config.precision, config.batch_size, config.accum_iter, num_ranks)
        ds_config = read_config(config.deepspeed, *batch)
    is_stage_3 = ds_config is not None and ds_config["zero_optimization"]["stage"] == 3
    if config.quantize in QUANTIZED_BYTES and is_stage_3:
        raise UserError(
            f"--quantize {config.quantize}: is for ZeRO-2, and --deepspeed {config.deepspeed} "
            "is ZeRO-3; leave one out"
        )
    if config.quantize is not None:
        require_available(config.quantize, DTYPES[config.precision])
    return ds_config


def hardware(members: Sequence[Member]) -> Hardware | None:
    """The ranks' machines as equal ones, each the smallest. None if a rank has no GPU."""
    if not members or not all(member.gpu_bytes for member in members):
        return None
    nodes = by_node(members)
    smallest = min(members, key=lambda member: member.gpu_bytes)
    return Hardware(
        gpu=detected_gpu(smallest.device, smallest.gpu_bytes),
        gpus=min(map(len, nodes)),
        nodes=len(nodes),
        host_gib=min(member.host_bytes for member in members) / GIB,
    )


def _request(
    config: RunConfig, llama: LlamaConfig, hardware: Hardware, training: bool
) -> PlanRequest:
    num_prompts = sum(task not in ("cap", "keep") for task in config.tasks)
    text = KEPT_POSITIONS if config.keep and training else 0
    num_questions, num_tokens = 0.0, 0.0  # of an epoch, as published
    for choice in config.datasets:
        dataset = find_dataset(choice.name, config.folder_of(choice.name))
        count = choice.weight * dataset.num_train_questions
        num_questions += count
        num_tokens += count * dataset.mean_question_tokens
    lengths = TokenLengths(
        question=num_prompts * num_tokens / num_questions,
        caption=CAPTION_TOKENS if config.cap else 0,
        longest=num_prompts * config.max_seq_len + (config.max_cap_len if config.cap else 0) + text,
        questions=max(1, round(num_questions)),
        text=text,
    )
    num_checkpointed = llama.n_layers
    if config.num_checkpointed is not None:
        num_checkpointed = min(config.num_checkpointed, llama.n_layers)
    max_tokens = config.max_tokens
    if max_tokens == 0:
        max_tokens = math.ceil(config.batch_size * lengths.both)
    request = PlanRequest(
        config.model,
        ViCoConfig.from_llama(llama, config.adapter_len, config.max_feats),
        hardware,
        lengths,
        precision=config.precision,
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        num_checkpointed=num_checkpointed,
        max_tokens=max_tokens,
        quantize=config.quantize,
    )
    if training:
        return request
    # An evaluation keeps nothing for backward, and a forward takes few tokens.
    return replace(
        request,
        batch_size=1,
        accum_iter=1,
        num_checkpointed=llama.n_layers,
        max_tokens=lengths.longest,
    )


class _Chosen(NamedTuple):
    stage: Stage
    ds_config: dict[str, Any]
    plan: Plan | None


def _choose_stage(request: PlanRequest) -> tuple[_Chosen, str, tuple[str, ...]]:
    """(the choice, its reason, notes for the user).

    A plan is an estimate: if nothing fits, the run is tried with the stage that needs the least.
    """
    best, shortage = _try_plan(request)
    if best is not None and best.stage != "zero3_offload":
        return _Chosen(best.stage, best.ds_config, best), _expected(best), ()
    other, _ = _try_plan(replace(request, max_tokens=None, num_checkpointed=None))
    if best is not None:
        if other is None or other.stage == "zero3_offload":
            return _Chosen(best.stage, best.ds_config, best), _expected(best), ()
        note = f"faster, as weights stay on the GPU: {_flags(other)}"
        return _Chosen(best.stage, best.ds_config, best), _expected(best), (note,)
    remedy = f"what fits: {_flags(other)}" if other else "`vico plan` tells what a model needs"
    reason = "the planner knows of nothing that fits, and this takes the least"
    stage = _smallest_stage(request)
    chosen = _Chosen(stage, planned_ds_config(request, stage), None)
    return chosen, reason, (f"warning: memory may run out: {shortage}; {remedy}",)


def _smallest_stage(request: PlanRequest) -> Stage:
    if request.quantize in QUANTIZED_BYTES:
        return "zero2"
    return "zero3" if request.hardware.ranks > 1 else "zero3_offload"


def _try_plan(request: PlanRequest) -> tuple[Plan | None, str]:
    """(the best plan, "") or (None, what is short)."""
    try:
        return plan(request), ""
    except UserError as error:
        return None, str(error).split(HELP_MARK)[0]


def _expected(best: Plan) -> str:
    total, available = best.memory.total / GIB, best.memory.available / GIB
    machine = best.request.hardware
    return f"the planner expects {total:.1f} of {available:.1f} GiB on {machine}"


def _flags(other: Plan) -> str:
    return (
        f"--checkpoint_activations {other.checkpointing} --max_tokens {other.max_tokens} "
        f"(under {other.stage})"
    )
