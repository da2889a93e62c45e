"""What a run needs before anything is loaded: ZeRO stage, recomputed layers and token budget.

Bytes are counted (memory.py, zero3_trace.py), rates are modelled from datasheets (speed.py).
Nothing here imports torch, so that an answer comes at once.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vico.errors import UserError
from vico.model.config import QUANTIZED_BYTES
from vico.planner.estimate import (
    LEFT_SHARE,
    MemoryEstimate,
    binary_search,
    estimate_memory,
    max_budget,
    planned_ds_config,
)
from vico.planner.gpu_specs import GIB, VISIBLE_SHARE, Hardware, gpu_of_size
from vico.planner.request import MAX_TOKENS, STAGES, PlanRequest, Stage
from vico.planner.speed import Speed, estimate_speed

NOMINAL_SIZES = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB of GPUs on the market
HELP_MARK = "; what would help: "  # in the message of a request that does not fit


@dataclass(frozen=True)
class Plan:
    request: PlanRequest
    stage: Stage
    num_checkpointed: int
    largest_tokens: int  # the largest budget that fits
    max_tokens: int  # the budget to use
    memory: MemoryEstimate
    speed: Speed | None  # None: a rate is unknown
    unknown_rate: str
    ds_config: dict[str, Any]

    @property
    def checkpointing(self) -> str:
        """The value of --checkpoint_activations."""
        named = {0: "none", self.request.config.n_layers: "full"}
        return named.get(self.num_checkpointed, str(self.num_checkpointed))


class Candidate(NamedTuple):
    stage: Stage
    num_checkpointed: int | None  # None: as few layers as the batch needs
    node_shards: bool


def plan(request: PlanRequest) -> Plan:
    """The best plan that fits. If none does, UserError says what is short and what would help."""
    attempts = [_plan_candidate(request, candidate) for candidate in _candidates(request)]
    plans = [attempt for attempt in attempts if attempt is not None]
    if not plans:
        raise UserError(_shortage(request))
    roomy = [plan for plan in plans if plan.largest_tokens >= request.batch_tokens]
    if not roomy:
        return max(plans, key=lambda plan: plan.largest_tokens)
    on_gpu = [plan for plan in roomy if plan.stage != "zero3_offload"]
    return _fastest(on_gpu or roomy)  # off-loading is the last resort


def _fastest(plans: list[Plan]) -> Plan:
    """The first of the fastest, or the first of all if a speed is unknown."""
    best, best_rank = plans[0], -math.inf
    for plan in plans:
        if plan.speed is None:
            return plans[0]
        # Speeds within 2 % count as equal: the simpler plan, which comes first, wins.
        rank = round(math.log(plan.speed.tokens_per_second) * 50)
        if rank > best_rank:
            best, best_rank = plan, rank
    return best


def _candidates(request: PlanRequest) -> list[Candidate]:
    """What to try, the simplest first and off-loading last."""
    stages: list[Stage]
    if request.stage is not None:
        stages = [request.stage]
    elif request.quantize in QUANTIZED_BYTES:
        stages = ["zero2"]
    else:
        several_ranks = request.hardware.ranks > 1
        stages = [stage for stage in STAGES if stage != "zero3" or several_ranks]
    counts = [0, None] if request.num_checkpointed is None else [request.num_checkpointed]
    candidates = []
    for count in counts:
        for stage in stages:
            for node_shards in _shards(request, stage):
                candidates.append(Candidate(stage, count, node_shards))
    return sorted(candidates, key=lambda candidate: candidate.stage == "zero3_offload")


def _shards(request: PlanRequest, stage: Stage) -> list[bool]:
    """Whether to divide frozen weights within each node: what to try, the faster first."""
    if stage != "zero3" or request.hardware.nodes == 1 or request.hardware.gpus == 1:
        return [False]
    return [True, False] if request.node_shards is None else [request.node_shards]


def _plan_candidate(request: PlanRequest, candidate: Candidate) -> Plan | None:
    """The plan for this candidate, or None if it does not fit."""
    stage, num_checkpointed, node_shards = candidate
    request = replace(request, node_shards=node_shards)
    if num_checkpointed is None:
        num_checkpointed = _fewest_checkpointed(request, stage)
    largest = max_budget(request, stage, num_checkpointed)
    if request.max_tokens is None:
        tokens = min(largest, MAX_TOKENS)
        if tokens < request.lengths.longest:
            return None
    else:
        tokens = request.max_tokens
    memory = estimate_memory(request, stage, num_checkpointed, tokens)
    if memory.spare >= 0:
        largest = max(largest, tokens)  # a given budget need not be a multiple of TOKEN_STEP
    host_gib = request.hardware.host_gib
    if largest < tokens or (host_gib is not None and memory.host > host_gib * GIB):
        return None
    speed, unknown_rate = estimate_speed(request, stage, num_checkpointed, tokens)
    ds_config = planned_ds_config(request, stage)
    return Plan(
        request,
        stage,
        num_checkpointed,
        largest,
        tokens,
        memory,
        speed,
        unknown_rate,
        ds_config,
    )


def _fewest_checkpointed(request: PlanRequest, stage: Stage) -> int:
    """The fewest layers to recompute so that the batch fits; all if it never does."""
    tokens = request.max_tokens or max(request.batch_tokens, request.longest_tokens)

    def fits(num_checkpointed: int) -> bool:
        return estimate_memory(request, stage, num_checkpointed, tokens).spare >= 0

    return binary_search(0, request.config.n_layers, fits)


def _fits(request: PlanRequest) -> bool:
    for candidate in _candidates(request):
        if _plan_candidate(request, candidate) is not None:
            return True
    return False


def _shortage(request: PlanRequest) -> str:
    """One line: the candidate that comes nearest, what it lacks, and what would help."""
    tokens, n_layers = request.max_tokens or request.longest_tokens, request.config.n_layers
    best: MemoryEstimate | None = None
    for stage, count, node_shards in _candidates(request):
        num_checkpointed = n_layers if count is None else count
        candidate = replace(request, node_shards=node_shards)
        memory = estimate_memory(candidate, stage, num_checkpointed, tokens)
        if best is None or memory.spare > best.spare:
            best = memory
            layers = describe_layers(num_checkpointed, n_layers)
            setting = f"{stage}, {layers} recomputed, {tokens} tokens"
    assert best is not None
    if best.spare >= 0:
        need = f"{best.host / GIB:.1f} GiB of host memory per node"
        lack = f"{request.hardware.host_gib:g} available"
    else:
        need = f"{best.total / GIB:.1f} GiB per GPU"
        lack = (
            f"{best.available / GIB:.1f} available, of which {LEFT_SHARE:.0%} stay free, "
            f"{-best.spare / GIB:.1f} GiB short"
        )
    return (
        f"{request.model} on {request.hardware}: does not fit; {setting} needs {need}, {lack}"
        f"{HELP_MARK}{', or '.join(_suggestions(request))}"
    )


def describe_layers(count: int, n_layers: int) -> str:
    if count == 0:
        return "no layer"
    return "all layers" if count == n_layers else f"{count} of {n_layers} layers"


def _suggestions(request: PlanRequest) -> list[str]:
    """Changes that would each make the run fit; the last one is only worth a try."""
    hardware = request.hardware
    suggestions: list[str] = []
    if _fits(replace(request, hardware=replace(hardware, host_gib=None))):
        suggestions.append("more host memory")
    else:
        more_gpus = [replace(hardware, gpus=hardware.gpus * n) for n in (2, 4, 8, 16)]
        visible_gib = hardware.gpu.memory_gib
        sizes = [gib for gib in NOMINAL_SIZES if gib * VISIBLE_SHARE > visible_gib]
        larger_gpus = [replace(hardware, gpu=gpu_of_size(gib)) for gib in sizes]
        suggestions += _first_fitting(request, more_gpus) + _first_fitting(request, larger_gpus)
    if request.quantize is None and request.stage in (None, "zero2"):
        for kind in QUANTIZED_BYTES:
            if _fits(replace(request, quantize=kind)):
                suggestions.append(f"--quantize {kind}")
                break
    forced = {
        "--deepspeed": request.stage,
        "--checkpoint_activations": request.num_checkpointed,
        "--max_tokens": request.max_tokens,
    }
    given = [flag for flag, value in forced.items() if value is not None]
    if given:
        suggestions.append(f"leaving out {' and '.join(given)}")
    else:
        suggestions.append("a shorter --max_cap_len or --max_seq_len")
    return suggestions


def _first_fitting(request: PlanRequest, machines: Iterable[Hardware]) -> list[str]:
    """The name of the first machine on which the run fits, or nothing."""
    for hardware in machines:
        if _fits(replace(request, hardware=hardware)):
            return [str(hardware)]
    return []
