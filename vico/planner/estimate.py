"""The memory that a run takes per GPU: weights, activations, optimizer, buckets and reserves."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vico.model.config import (
    FP8,
    QUANTIZED_BYTES,
    LlamaConfig,
    ViCoConfig,
    block_shapes,
)
from vico.planner.gpu_specs import GIB
from vico.planner.memory import FP32, ITEMSIZE, BatchShape, RunShape, activations
from vico.planner.request import TOKEN_STEP, PlanRequest, Stage, TokenLengths
from vico.planner.zero3_trace import BLOCK, gathered_modules, live_bytes

# In a checkout they lie beside the package, in an installed one inside (setup.py).
_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "ds_configs"
SHIPPED_CONFIGS = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "ds_configs"

# A key of ds_configs that is ours: over which ranks ZeRO-3 divides a frozen weight.
FROZEN_SHARDS = "frozen_shards"
IN_NODES, OVER_ALL = "node", "all"

CONTEXT_BYTES = GIB // 2  # CUDA's context, cuBLAS's workspace
COMMUNICATOR_BYTES = GIB // 2  # NCCL's buffers of a group of more than one GPU
# What PyTorch's allocator holds beyond what each step allocates and frees.
FRAGMENTATION = 0.05
# Of a GPU's memory: it stays free, as an estimate errs and the allocator splits memory.
LEFT_SHARE = 0.06
MAX_BUDGET = 2**17  # tokens; no larger budget is searched for
KEYS_PER_ROW = 1.5  # rows that attention gathers; 1.35 with real lengths


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per GPU, by category.

    The head and backward have their worst moments one after the other: the larger one counts.
    """

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
        kept = self.weights + self.gathered + self.activations + self.trainables + self.buckets
        return kept + max(self.head, self.backward) + self.reserve

    @property
    def spare(self) -> int:
        """Negative: it does not fit. LEFT_SHARE of the GPU's memory stays free."""
        return int(self.available * (1 - LEFT_SHARE)) - self.total


def batch_shape(tokens: int, lengths: TokenLengths) -> BatchShape:
    """A micro-batch of `tokens` tokens, none of them shared: an upper bound of its rows."""
    targets = math.ceil(tokens * lengths.target_share)
    clips = math.ceil(tokens / lengths.both)
    kept = math.ceil(tokens * lengths.kept_share)
    return BatchShape(tokens, targets, targets, clips, math.ceil(tokens * KEYS_PER_ROW), kept)


def sized_ds_config(stage: Stage, config: LlamaConfig) -> dict[str, Any]:
    """The shipped ds_config; under ZeRO-3 it prefetches one decoder block of this model."""
    ds_config = _shipped_config(stage)
    if stage != "zero2":
        norms, gates = 2 * config.dim, 2 * config.n_heads
        block = config.num_block_parameters + norms + gates
        zero = ds_config["zero_optimization"]
        zero["stage3_prefetch_bucket_size"] = block
        zero["stage3_max_live_parameters"] = 2 * block + config.num_embedding_parameters
    return ds_config


def planned_ds_config(request: PlanRequest, stage: Stage) -> dict[str, Any]:
    """As `sized_ds_config`; on several nodes it also says where ZeRO-3's frozen weights are."""
    ds_config = sized_ds_config(stage, request.config)
    if stage != "zero2" and request.hardware.nodes > 1:
        ds_config[FROZEN_SHARDS] = IN_NODES if request.node_shards else OVER_ALL
    return ds_config


def _shipped_config(stage: Stage) -> dict[str, Any]:
    text = (SHIPPED_CONFIGS / f"{stage}.json").read_text(encoding="utf-8")
    ds_config: dict[str, Any] = json.loads(text)
    return ds_config


def estimate_memory(
    request: PlanRequest, stage: Stage, num_checkpointed: int, tokens: int
) -> MemoryEstimate:
    """Of one GPU in the middle of a step whose micro-batches have `tokens` tokens."""
    config, hardware = request.config, request.hardware
    itemsize = ITEMSIZE[request.precision]
    half_precision = request.precision != "fp32"
    makes_weights = request.quantize in QUANTIZED_BYTES
    cuda_graphs = stage == "zero2" and not num_checkpointed and not makes_weights and half_precision
    run = RunShape(itemsize, num_checkpointed=num_checkpointed, cuda_graphs=cuda_graphs)
    acts = activations(config, batch_shape(tokens, request.lengths), run)
    gathered = _temporary_weight_bytes(request, stage)
    reserve = CONTEXT_BYTES + math.ceil(FRAGMENTATION * (acts.peak + gathered))
    num_groups = (hardware.ranks > 1) + bool(request.node_shards)
    reserve += num_groups * COMMUNICATOR_BYTES
    host = 0
    if stage == "zero3_offload":
        host = _partitioned_bytes(request) // hardware.nodes
    return MemoryEstimate(
        weights=_weight_bytes(request, stage),
        gathered=gathered,
        activations=acts.saved,
        head=acts.head,
        backward=acts.backward,
        trainables=_trainable_bytes(config, stage, hardware.ranks),
        buckets=_bucket_bytes(stage),
        reserve=reserve,
        available=int(hardware.gpu.memory_gib * GIB),
        host=host,
    )


def _weight_bytes(request: PlanRequest, stage: Stage) -> int:
    """Frozen weights that a GPU holds all the time."""
    config, itemsize = request.config, ITEMSIZE[request.precision]
    if stage == "zero2":
        return frozen_bytes(config, itemsize, request.quantize)
    whole = config.num_norm_parameters * itemsize  # below the persistence threshold
    if request.quantize == FP8:
        whole += _scale_bytes(config)
    if stage == "zero3_offload":
        return whole
    return math.ceil(_partitioned_bytes(request) / request.num_shards) + whole


def _partitioned_bytes(request: PlanRequest) -> int:
    """Of the frozen weights that ZeRO-3 divides. In fp8 the transposes are not kept."""
    config, itemsize = request.config, ITEMSIZE[request.precision]
    linear = config.n_layers * config.num_block_parameters if request.quantize == FP8 else 0
    return (config.num_parameters - linear) * itemsize + linear


def _scale_bytes(config: LlamaConfig) -> int:
    """In fp8: one number in fp32 for each output and each input of each layer."""
    sizes = sum(sum(shape) for shape in block_shapes(config).values() if len(shape) == 2)
    return FP32 * config.n_layers * sizes


def frozen_bytes(config: LlamaConfig, itemsize: int, quantize: str | None = None) -> int:
    """Of the backbone. --quantize changes the linear layers of its decoder blocks."""
    if quantize is None:
        return config.num_parameters * itemsize
    linear = config.n_layers * config.num_block_parameters
    rest = config.num_parameters - linear
    if quantize == FP8:
        # A byte for the weight and one for its transpose.
        return 2 * linear + _scale_bytes(config) + rest * itemsize
    return math.ceil(linear * QUANTIZED_BYTES[quantize]) + rest * itemsize


def _temporary_weight_bytes(request: PlanRequest, stage: Stage) -> int:
    """Frozen weights that a GPU holds for a moment: gathered by ZeRO-3, or dequantized."""
    config, itemsize = request.config, ITEMSIZE[request.precision]
    in_fp8 = request.quantize == FP8
    made = 2 * config.dim * config.kv_heads * config.head_dim * itemsize  # wk, wv: prompts' rows
    if stage != "zero2":
        made = max(made, config.dim * config.hidden_dim) if in_fp8 else 0  # the largest transpose
        return _gathered_bytes(stage, config, itemsize, 1 if in_fp8 else itemsize) + made
    if request.quantize is None:
        return 0
    if in_fp8:
        return made
    # The larger of wq, wk and wv together, and w1 alone.
    return config.dim * max(3 * config.heads_dim, config.hidden_dim) * itemsize


@lru_cache(maxsize=256)
def _gathered_bytes(stage: Stage, config: ViCoConfig, itemsize: int, linear_itemsize: int) -> int:
    zero = sized_ds_config(stage, config)["zero_optimization"]
    whole_blocks = BLOCK in zero.get("leaf_module", {}).get("classes", ())
    threshold = zero["stage3_param_persistence_threshold"]
    modules = gathered_modules(config, itemsize, threshold, whole_blocks, linear_itemsize)
    prefetch, max_live = zero["stage3_prefetch_bucket_size"], zero["stage3_max_live_parameters"]
    _, with_buffers = live_bytes(modules, prefetch, max_live)
    return with_buffers


def _trainable_bytes(config: ViCoConfig, stage: Stage, num_ranks: int) -> int:
    """Of the trainables, their gradients and the optimizer's state, all in fp32.

    Below stage 3 each GPU has all weights and gradients. The ranks share the rest: the optimizer's
    copy, its two moments and the summed gradient.
    """
    num_bytes = config.num_trainables * FP32
    if stage == "zero2":
        return 2 * num_bytes + math.ceil(4 * num_bytes / num_ranks)
    return num_bytes + math.ceil(6 * num_bytes / num_ranks)


@lru_cache(maxsize=16)
def _bucket_bytes(stage: Stage) -> int:
    zero = _shipped_config(stage)["zero_optimization"]
    num_buckets: int = 2 if zero.get("overlap_comm") else 1
    bucket_size: int = zero["reduce_bucket_size"]
    return FP32 * bucket_size * num_buckets


def max_budget(request: PlanRequest, stage: Stage, num_checkpointed: int) -> int:
    """The most tokens per micro-batch that fit, a multiple of TOKEN_STEP; 0 if none does."""

    def is_too_large(steps: int) -> bool:
        return estimate_memory(request, stage, num_checkpointed, steps * TOKEN_STEP).spare < 0

    largest = MAX_BUDGET // TOKEN_STEP
    return TOKEN_STEP * (binary_search(0, largest + 1, is_too_large) - 1)


def binary_search(low: int, high: int, is_enough: Callable[[int], bool]) -> int:
    """The smallest number above `low` that is enough; `high` if no smaller one is.

    Neither `low` nor `high` is tried. All numbers above one that is enough must be enough.
    """
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(middle):
            high = middle
        else:
            low = middle
    return high
