"""Where the time goes: the profiler's events of a step, sorted into a few categories by operator and shape.

CPU self time on a CPU, device self time on a GPU. The categories are the rows of the report's time split.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vico.model.config import LlamaConfig

PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::linear",
    "aten::_grouped_mm",
    "mkl",
    "mkldnn",
)
# First match wins; what the name does not say (products), the shapes do.
BY_NAME = (
    (
        "attention kernel",
        (
            "scaled_dot_product",
            "_efficient_attention",
            "_flash_attention",
            "varlen_attn",
            "flash_attn",
            "fmha",
        ),
    ),
    # What our own Functions do themselves, products and attention apart: on a GPU the Triton kernels.
    (
        "own Functions",
        (
            "packedblock",
            "packedattention",
            "frozenrmsnorm",
            "swiglu",
            "rotate",
            "adapterattention",
            "triton",
        ),
    ),
    ("cross-entropy", ("nll_loss", "log_softmax", "logsumexp", "cross_entropy")),
    ("softmax", ("softmax",)),
    ("norm", ("rms_norm", "layer_norm", "rsqrt", "native_norm")),
    ("activation", ("silu", "sigmoid")),
    (
        "rows in and out",
        ("index", "embedding", "gather", "scatter", "slice_backward", "split", "select_backward"),
    ),
    (
        "copies",
        (
            "copy_",
            "cat",
            "clone",
            "contiguous",
            "fill_",
            "zero",
            "stack",
            "constant_pad",
            "pad",
            "to_copy",
            "memcpy",
            "memset",
        ),
    ),
    (
        "elementwise",
        (
            "mul",
            "add",
            "sub",
            "div",
            "pow",
            "mean",
            "exp",
            "log",
            "neg",
            "complex",
            "tanh",
            "where",
            "masked_fill",
            "sum",
            "max",
            "eq",
        ),
    ),
)


def category(name: str, shapes: Any, shape: LlamaConfig) -> str:
    if name == "host: packing":
        return "host: packing"
    if any(name.startswith(product) for product in PRODUCTS):
        sizes = {
            size
            for one in shapes or ()
            if isinstance(one, list | tuple)
            for size in one
            if isinstance(size, int)
        }
        if shape.vocab_size in sizes:
            return "head products"
        if shape.dim in sizes or shape.hidden_dim in sizes:
            return "backbone products"
        return "small products (adapter, scores)"
    lowered = name.lower()
    for found, parts in BY_NAME:
        if any(part in lowered for part in parts):
            return found
    return "other"


def time_split(
    run: Callable[[], object], shape: LlamaConfig, device: torch.device
) -> tuple[dict[str, float], list[tuple[str, str, int, float]]]:
    """(seconds by category, the 30 longest rows as (category, operator and shapes, calls, seconds)) of one call of `run`."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, record_shapes=True) as recorded:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    seconds: dict[str, float] = defaultdict(float)
    rows = []
    kernels = 0.0
    for event in recorded.key_averages(group_by_input_shape=True):
        if (
            event.device_type.name != "CPU"
        ):  # a kernel by itself: its time is also in the operator that started it
            kernels += 0.0 if event.is_user_annotation else event.self_device_time_total / 1e6
            continue
        spent = (
            event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        ) / 1e6
        if spent <= 0:
            continue
        kind = category(event.key, event.input_shapes, shape)
        seconds[kind] += spent
        rows.append(
            (kind, f"{event.key} {_sizes(event.input_shapes)}", event.count, round(spent, 5))
        )
    if kernels > sum(seconds.values()):
        seconds["kernels of no known operator"] = kernels - sum(seconds.values())
    rows.sort(key=lambda row: -row[3])
    return {
        kind: round(value, 5) for kind, value in sorted(seconds.items(), key=lambda pair: -pair[1])
    }, rows[:30]


def _sizes(shapes: Any) -> str:
    return " ".join("x".join(map(str, one)) for one in shapes or () if one)
