"""What a run will need and how fast it can be, before anything is loaded: memory per GPU, ZeRO stage, token budget, speed.

Bytes are counted (footprint.py), rates are modelled from datasheets (hardware.py) and a stated share of them. Nothing here
imports torch, so that an answer comes at once.
"""

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from vico.errors import UserError
from vico.planner.gpu_specs import GIB, VISIBLE_SHARE, Hardware, gpu_of_size
from vico.planner.memory import (
    BYTES,
    QUANTIZED_BYTES,
    Activations,
    BatchShape,
    ModelSize,
    RunShape,
    activations,
)
from vico.planner.zero3_trace import BLOCK, gathered_modules, live_bytes

Stage = Literal["zero2", "zero3", "zero3_offload"]
STAGES: tuple[Stage, ...] = ("zero2", "zero3", "zero3_offload")
SHIPPED_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"

CONTEXT_BYTES = GIB // 2  # CUDA's context, cuBLAS's workspace
COMMUNICATOR_BYTES = GIB // 2  # NCCL's buffers, where there is more than one GPU
FRAGMENTATION = (
    0.05  # of what is allocated and freed in every step: what PyTorch's allocator holds besides
)
EFFICIENCY = 0.5  # share of the datasheet's rate that the products reach: the goal for one H100, not a measurement
LINK_SHARE = 0.8  # share of a link's datasheet rate that a gather reaches
TOKEN_STEP = 64  # budgets are multiples of this
MAX_TOKENS = 8192  # of a micro-batch; beyond, nothing gets faster
NOMINAL_SIZES = (16, 24, 32, 40, 48, 80, 96, 141, 192)  # GiB of GPUs that can be had
MAX_BUDGET = 2**17  # no budget above this is looked for
KEYS_PER_ROW = 1.5  # rows that attention gathers; 1.35 with real lengths

SIZES = {
    size.name: size
    for size in (
        ModelSize("7B", 4096, 32, 32, 11008),
        ModelSize("13B", 5120, 40, 40, 13824),
        ModelSize("33B", 6656, 60, 52, 17920),
        ModelSize("65B", 8192, 80, 64, 22016),
        ModelSize("8B", 4096, 32, 32, 14336, vocab_size=128256, kv_heads=8),
        ModelSize("70B", 8192, 80, 64, 28672, kv_heads=8),
    )
}


@dataclass(frozen=True)
class TokenLengths:
    """Tokens of a question's sequences on average, and at most; training questions of the set."""

    question: float
    caption: float
    longest: int  # question and caption together: --max_seq_len + --max_cap_len
    questions: int

    @property
    def both(self) -> float:
        return self.question + self.caption

    @property
    def target_share(self) -> float:
        """Targets per token: an answer's four, and a caption but for its instruction, slots and first words."""
        return (4 + max(0.0, self.caption - 31)) / self.both


CAPTION_TOKENS = 194  # captions of 80 to 250 tokens, the instruction and the slots


@dataclass(frozen=True)
class PlanRequest:
    """What is to be trained on what, and what the user has decided already (None: the planner does)."""

    size: ModelSize
    hardware: Hardware
    lengths: TokenLengths
    precision: str = "bf16"
    batch_size: int = 8
    accum_iter: int = 2
    efficiency: float = EFFICIENCY
    stage: Stage | None = None
    checkpointed: int | None = None  # layers
    max_tokens: int | None = None
    quantize: str | None = None  # --quantize

    @property
    def batch_tokens(self) -> int:
        """Of a micro-batch of --batch_size questions, on average, up to the next possible budget."""
        return min(
            MAX_TOKENS, math.ceil(self.batch_size * self.lengths.both / TOKEN_STEP) * TOKEN_STEP
        )

    @property
    def longest_tokens(self) -> int:
        """Of the longest question with its caption, up to the next possible budget."""
        return math.ceil(self.lengths.longest / TOKEN_STEP) * TOKEN_STEP

    @property
    def step_tokens(self) -> float:
        """Of one GPU's share of an optimizer step, on average."""
        return self.batch_size * self.accum_iter * self.lengths.both


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU, by category. The head and backward have their worst moments one after the other: the larger one counts."""

    weights: int
    gathered: int
    activations: int
    head: int
    backward: int
    trainables: int
    buckets: int
    reserve: int
    available: int
    host: int  # per node, not on the GPU

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.gathered
            + self.activations
            + max(self.head, self.backward)
            + self.trainables
            + self.buckets
            + self.reserve
        )

    @property
    def spare(self) -> int:
        return self.available - self.total


@dataclass(frozen=True)
class Speed:
    """Modelled. None where something it needs is not known."""

    tokens_per_second: float  # real tokens, all GPUs
    epoch_seconds: float
    compute_seconds: float  # of a micro-batch
    gather_seconds: float


@dataclass(frozen=True)
class Plan:
    task: PlanRequest
    stage: Stage
    checkpointed: int
    largest_tokens: int  # the largest budget that fits
    max_tokens: int  # the one to use
    memory: MemoryEstimate
    speed: Speed | None
    unknown: str  # what the speed would need
    ds_config: dict[str, Any]

    @property
    def checkpointing(self) -> str:
        """The value of --checkpoint_activations."""
        return {0: "none", self.task.size.n_layers: "full"}.get(
            self.checkpointed, str(self.checkpointed)
        )


def batch_shape(tokens: int, lengths: TokenLengths) -> BatchShape:
    """A micro-batch of so many tokens, none of them shared: an upper bound of its rows."""
    targets = math.ceil(tokens * lengths.target_share)
    return BatchShape(
        tokens, targets, targets, math.ceil(tokens / lengths.both), math.ceil(tokens * KEYS_PER_ROW)
    )


def ds_config(stage: Stage, size: ModelSize) -> dict[str, Any]:
    """The shipped config, under ZeRO-3 with the prefetch of one decoder block of this model."""
    config: dict[str, Any] = json.loads(
        (SHIPPED_CONFIGS / f"{stage}.json").read_text(encoding="utf-8")
    )
    if stage != "zero2":
        block = size.block + 2 * size.dim + 2 * size.n_heads
        sized = {
            "stage3_prefetch_bucket_size": block,
            "stage3_max_live_parameters": 2 * block + size.head,
        }
        config["zero_optimization"] = {**config["zero_optimization"], **sized}
    return config


@lru_cache(maxsize=256)
def _gathered(stage: Stage, size: ModelSize, width: int) -> int:
    zero = ds_config(stage, size)["zero_optimization"]
    whole = BLOCK in zero.get("leaf_module", {}).get("classes", ())
    modules = gathered_modules(size, width, zero["stage3_param_persistence_threshold"], whole)
    return live_bytes(
        modules, zero["stage3_prefetch_bucket_size"], zero["stage3_max_live_parameters"]
    )[1]


@lru_cache(maxsize=16)
def _buckets(stage: Stage) -> int:
    zero = json.loads((SHIPPED_CONFIGS / f"{stage}.json").read_text(encoding="utf-8"))[
        "zero_optimization"
    ]
    return 4 * zero["reduce_bucket_size"] * (2 if zero.get("overlap_comm") else 1)


def memory(task: PlanRequest, stage: Stage, checkpointed: int, tokens: int) -> MemoryEstimate:
    """Of one GPU in the middle of a step whose micro-batches have `tokens` tokens."""
    size, ranks, width = task.size, task.hardware.ranks, BYTES[task.precision]
    replayed = (
        stage == "zero2" and not checkpointed and task.quantize is None and task.precision != "fp32"
    )
    setting = RunShape(width, num_checkpointed=checkpointed, replayed=replayed)
    acts: Activations = activations(size, batch_shape(tokens, task.lengths), setting)
    small = size.norms * width if stage != "zero2" else 0
    whole = size.frozen_bytes(width, task.quantize)
    share = {
        "zero2": whole,
        "zero3": math.ceil(size.frozen * width / ranks) + small,
        "zero3_offload": small,
    }[stage]
    unpacked = (
        size.dim * max(3 * size.dim, size.hidden_dim) * width if task.quantize else 0
    )  # w1 alone; wq, wk and wv together
    gathered = unpacked if stage == "zero2" else _gathered(stage, size, width)
    trained = size.trainables * 4
    # Weights and gradients whole below stage 3; the optimizer's copy, its two moments and the summed gradient by ranks.
    optimizer = (
        2 * trained + math.ceil(4 * trained / ranks)
        if stage == "zero2"
        else trained + math.ceil(6 * trained / ranks)
    )
    moving = acts.peak + gathered
    reserve = (
        CONTEXT_BYTES + (COMMUNICATOR_BYTES if ranks > 1 else 0) + math.ceil(FRAGMENTATION * moving)
    )
    host = size.frozen * width // task.hardware.nodes if stage == "zero3_offload" else 0
    available = int(task.hardware.gpu.memory_gib * GIB)
    return MemoryEstimate(
        share,
        gathered,
        acts.saved,
        acts.head,
        acts.backward,
        optimizer,
        _buckets(stage),
        reserve,
        available,
        host,
    )


def max_budget(task: PlanRequest, stage: Stage, checkpointed: int) -> int:
    """The most tokens of a micro-batch that fit, a multiple of TOKEN_STEP; 0: not even a few do."""
    low, high = 0, MAX_BUDGET // TOKEN_STEP + 1
    while high - low > 1:
        middle = (low + high) // 2
        fits = memory(task, stage, checkpointed, middle * TOKEN_STEP).spare >= 0
        low, high = (middle, high) if fits else (low, middle)
    return low * TOKEN_STEP


def speed(
    task: PlanRequest, stage: Stage, checkpointed: int, max_tokens: int
) -> tuple[Speed | None, str]:
    """(modelled speed, "") or (None, what is not known). Per micro-batch: the slower of products and gathers, which overlap."""
    hardware, size = task.hardware, task.size
    tflops = hardware.gpu.peak(task.precision)
    if task.quantize is not None:
        return None, f"how fast {hardware.gpu.name} unpacks weights"
    if tflops is None:
        return None, f"the rate of {hardware.gpu.name} in {task.precision}"
    pieces = math.ceil(task.step_tokens / max_tokens)
    tokens = task.step_tokens / pieces
    layers = size.n_layers * size.block
    flops = (
        4 * (layers + size.head * task.lengths.target_share)
        + 2 * layers * checkpointed / size.n_layers
    )
    compute, gather = flops * tokens / (tflops * 1e12 * task.efficiency), 0.0
    if stage != "zero2":
        rates = [hardware.gpu.link_gb] if hardware.gpus > 1 else []
        rates += [hardware.network_gbit and hardware.network_gbit / 8] if hardware.nodes > 1 else []
        if None in rates:
            return (
                None,
                "the link between the GPUs (--link)"
                if hardware.gpu.link_gb is None
                else "the network of a node (--network)",
            )
        moved = 2 * size.frozen * BYTES[task.precision]
        slowest = min((rate for rate in rates if rate), default=math.inf)
        gather = moved * (hardware.ranks - 1) / hardware.ranks / (slowest * 1e9 * LINK_SHARE)
        if stage == "zero3_offload":
            if hardware.gpu.host_gb is None:
                return None, f"the link of {hardware.gpu.name} to the host"
            gather = max(gather, moved / hardware.ranks / (hardware.gpu.host_gb * 1e9 * LINK_SHARE))
    rate = hardware.ranks * tokens / max(compute, gather)
    return Speed(rate, task.lengths.questions * task.lengths.both / rate, compute, gather), ""


def plan(task: PlanRequest) -> Plan:
    """The best way that fits. Raises UserError, saying what is short and what would help, where none does."""
    ways = [
        way
        for way in (_try_candidate(task, stage, n) for stage, n in _candidates(task))
        if way is not None
    ]
    if not ways:
        raise UserError(_shortage(task))
    roomy = [way for way in ways if way.largest_tokens >= task.batch_tokens]
    roomy = [
        way for way in roomy if way.stage != "zero3_offload"
    ] or roomy  # off-loading is the last resort
    if not roomy:
        return max(ways, key=lambda way: way.largest_tokens)
    if all(way.speed is not None for way in roomy):
        # In hundredths, so that between equals the simpler one, which comes first, wins.
        return max(
            roomy,
            key=lambda way: round(math.log(way.speed.tokens_per_second) * 50) if way.speed else 0,
        )
    return roomy[0]


def _candidates(task: PlanRequest) -> list[tuple[Stage, int | None]]:
    """Ways to run, the simplest first; None: as many recomputed layers as are needed."""
    possible = STAGES if task.quantize is None else STAGES[:1]
    stages = (
        [task.stage]
        if task.stage
        else [s for s in possible if s != "zero3" or task.hardware.ranks > 1]
    )
    counts = [task.checkpointed] if task.checkpointed is not None else [0, None]
    on_gpu: list[tuple[Stage, int | None]] = [
        (s, n) for n in counts for s in stages if s != "zero3_offload"
    ]
    return on_gpu + [("zero3_offload", n) for n in counts if "zero3_offload" in stages]


def _try_candidate(task: PlanRequest, stage: Stage, checkpointed: int | None) -> Plan | None:
    """The plan of this stage, or None where it does not fit."""
    layers = task.size.n_layers
    if checkpointed is None:
        wanted = task.max_tokens or max(task.batch_tokens, task.longest_tokens)
        low, high = (
            0,
            layers,
        )  # the fewest layers with which the batch fits in one piece; all of them where none does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (
                (low, middle) if memory(task, stage, middle, wanted).spare >= 0 else (middle, high)
            )
        checkpointed = high
    largest = max_budget(task, stage, checkpointed)
    if task.max_tokens and memory(task, stage, checkpointed, task.max_tokens).spare >= 0:
        largest = max(largest, task.max_tokens)  # which need not be a multiple
    used = task.max_tokens or min(largest, MAX_TOKENS)
    if largest < used or used < min(task.lengths.longest, task.max_tokens or MAX_BUDGET):
        return None
    needs = memory(task, stage, checkpointed, used)
    if task.hardware.host_gib is not None and needs.host > task.hardware.host_gib * GIB:
        return None
    modelled, unknown = speed(task, stage, checkpointed, used)
    return Plan(
        task,
        stage,
        checkpointed,
        largest,
        used,
        needs,
        modelled,
        unknown,
        ds_config(stage, task.size),
    )


def _shortage(task: PlanRequest) -> str:
    """One line: the way that comes nearest, by how much it fails, and what would help."""
    tokens = task.max_tokens or task.longest_tokens
    named = [(stage, task.size.n_layers if n is None else n) for stage, n in _candidates(task)]
    nearest = [(memory(task, stage, n, tokens), stage, n) for stage, n in named]
    best, stage, layers = max(nearest, key=lambda each: each[0].spare)
    how = f"{stage}, {layers_named(layers, task.size)} recomputed, {tokens} tokens"
    if best.spare >= 0:
        short = f"needs {best.host / GIB:.1f} GiB of host memory per node and {task.hardware.host_gib:g} are there"
    else:
        short = f"needs {best.total / GIB:.1f} GiB per GPU and {best.available / GIB:.1f} are there, {-best.spare / GIB:.1f} GiB short"
    return f"{task.size.name} on {task.hardware}: does not fit; {how} {short}; {_suggestions(task)}"


def layers_named(count: int, size: ModelSize) -> str:
    return (
        "no layer"
        if count == 0
        else "all layers"
        if count == size.n_layers
        else f"{count} of {size.n_layers} layers"
    )


def _suggestions(task: PlanRequest) -> str:
    hardware = task.hardware
    gpu = hardware.gpu
    free = replace(task, hardware=replace(hardware, host_gib=None))
    helps = ["more host memory"] if _fits(free) else []
    more = (replace(hardware, gpus=hardware.gpus * factor) for factor in (2, 4, 8, 16))
    larger = (
        replace(hardware, gpu=gpu_of_size(gib))
        for gib in NOMINAL_SIZES
        if gib * VISIBLE_SHARE > gpu.memory_gib
    )
    if not helps:
        found = (
            next((machine for machine in machines if _fits(replace(task, hardware=machine))), None)
            for machines in (more, larger)
        )
        helps = [str(machine) for machine in found if machine is not None]
    if task.quantize is None and task.stage in (None, "zero2"):
        helps += [
            f"--quantize {kind}"
            for kind in list(QUANTIZED_BYTES)
            if _fits(replace(task, quantize=kind))
        ][:1]
    forced = {
        "--deepspeed": task.stage,
        "--checkpoint_activations": task.checkpointed,
        "--max_tokens": task.max_tokens,
    }
    given = [flag for flag, value in forced.items() if value is not None]
    helps.append(
        f"leaving {' and '.join(given)} out"
        if given
        else "a shorter --max_cap_len or --max_seq_len"
    )
    return f"what would help: {', or '.join(helps)}"


def _fits(task: PlanRequest) -> bool:
    return any(_try_candidate(task, stage, n) is not None for stage, n in _candidates(task))
