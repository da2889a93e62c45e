"""The ds_config of a run without --deepspeed: the planner's best for its model, batch and GPUs.

It depends only on the settings and on what the ranks exchanged at the start, so all ranks choose
the same. The choice changes no number, only where weights lie: a run may resume under another one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vico.data.datasets import find_dataset
from vico.distributed.topology import Member, by_host
from vico.errors import UserError
from vico.model.config import LlamaConfig, ViCoConfig
from vico.model.quantized_linear import library
from vico.planner.estimate import sized_ds_config
from vico.planner.gpu_specs import GIB, Hardware, detected_gpu
from vico.planner.plan import HELP_MARK, Plan, plan
from vico.planner.request import CAPTION_TOKENS, PlanRequest, Stage, TokenLengths
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


def choose(
    config: RunConfig,
    llama: LlamaConfig,
    num_ranks: int,
    hardware: Hardware | None,
    training: bool,
) -> Choice:
    """The ds_config that --deepspeed names, or else the planner's. `hardware` is None on CPUs.

    Raises UserError as `named_ds_config` does, or if the model has fewer layers than are to be
    recomputed.
    """
    if (config.num_checkpointed or 0) > llama.n_layers:
        raise UserError(
            f"--checkpoint_activations {config.checkpoint_activations}: the model has "
            f"{llama.n_layers} layers; full means all"
        )
    ds_config = named_ds_config(config, num_ranks)
    if ds_config is not None:
        return Choice(ds_config, f"ZeRO-{ds_config['zero_optimization']['stage']}")
    batch = (config.precision, config.batch_size, config.accum_iter, num_ranks)
    if hardware is None:
        reason = "no --deepspeed is named and there is no GPU to plan for"
        return Choice(read_config("zero2", *batch), f"ZeRO-2 ({reason})")
    request = _request(config, llama, hardware, training)
    stage, reason, notes = _choose_stage(request)
    ds_config = resolve_auto(sized_ds_config(stage, request.config), Path(AUTO), *batch)
    return Choice(ds_config, f"{TITLES[stage]} (no --deepspeed is named; {reason})", notes)


def named_ds_config(config: RunConfig, num_ranks: int) -> dict[str, Any] | None:
    """The ds_config that --deepspeed names; None if it names none.

    Raises UserError if the ds_config does not fit the run, or --quantize cannot be used.
    """
    if config.quantize is not None:
        library()
    if config.deepspeed == AUTO:
        return None
    ds_config = read_config(
        config.deepspeed, config.precision, config.batch_size, config.accum_iter, num_ranks
    )
    if config.quantize is not None and ds_config["zero_optimization"]["stage"] == 3:
        raise UserError(
            f"--quantize {config.quantize}: is for ZeRO-2, and --deepspeed {config.deepspeed} "
            "is ZeRO-3; leave one out"
        )
    return ds_config


def hardware(members: Sequence[Member]) -> Hardware | None:
    """The ranks' machines as equal ones, each the smallest. None if a rank has no GPU."""
    if not members or not all(member.gpu_bytes for member in members):
        return None
    hosts = by_host(members)
    smallest = min(members, key=lambda member: member.gpu_bytes)
    return Hardware(
        gpu=detected_gpu(smallest.device, smallest.gpu_bytes),
        gpus=min(len(ranks) for ranks in hosts.values()),
        nodes=len(hosts),
        host_gib=min(member.host_bytes for member in members) / GIB,
    )


def _request(
    config: RunConfig, llama: LlamaConfig, hardware: Hardware, training: bool
) -> PlanRequest:
    num_prompts = sum(task != "cap" for task in config.tasks)
    num_questions, num_tokens = 0.0, 0.0  # of an epoch, as published
    for choice in config.datasets:
        dataset = find_dataset(choice.name, config.folder_of(choice.name))
        count = choice.weight * dataset.num_train_questions
        num_questions += count
        num_tokens += count * dataset.mean_question_tokens
    lengths = TokenLengths(
        question=num_prompts * num_tokens / num_questions,
        caption=CAPTION_TOKENS if config.cap else 0,
        longest=num_prompts * config.max_seq_len + (config.max_cap_len if config.cap else 0),
        questions=max(1, round(num_questions)),
    )
    num_checkpointed = llama.n_layers
    if config.num_checkpointed is not None:
        num_checkpointed = min(config.num_checkpointed, llama.n_layers)
    request = PlanRequest(
        config.model,
        ViCoConfig.from_llama(llama, config.adapter_len, config.max_feats),
        hardware,
        lengths,
        precision=config.precision,
        batch_size=config.batch_size,
        accum_iter=config.accum_iter,
        num_checkpointed=num_checkpointed,
        max_tokens=config.max_tokens or math.ceil(config.batch_size * lengths.both),
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


def _choose_stage(request: PlanRequest) -> tuple[Stage, str, tuple[str, ...]]:
    """(stage, reason, notes for the user).

    A plan is an estimate: if nothing fits, the run is tried with the stage that needs the least.
    """
    best, shortage = _try_plan(request)
    if best is not None and best.stage != "zero3_offload":
        return best.stage, _expected(best), ()
    other, _ = _try_plan(replace(request, max_tokens=None, num_checkpointed=None))
    if best is not None:
        if other is None or other.stage == "zero3_offload":
            return best.stage, _expected(best), ()
        note = f"faster, as weights stay on the GPU: {_flags(other)}"
        return best.stage, _expected(best), (note,)
    remedy = f"what fits: {_flags(other)}" if other else "`vico plan` tells what a model needs"
    reason = "the planner knows of nothing that fits, and this takes the least"
    return _smallest_stage(request), reason, (f"warning: memory may run out: {shortage}; {remedy}",)


def _smallest_stage(request: PlanRequest) -> Stage:
    if request.quantize is not None:
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
