"""Where the time goes: profiler events of a step, sorted into categories by operator and shape.

Times are self times: of the CPU on a CPU, of the device on a GPU. The categories are the rows of
the report's time split.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from vico.model.config import LlamaConfig
from vico.model.fused_block import FusedBlockFunction
from vico.model.ops.autograd import AdapterAttention, FrozenRMSNorm, RotaryEmbedding, SwiGLU

PACKING = "host: packing"
MATMUL_PREFIXES = tuple(
    "aten::mm aten::addmm aten::bmm aten::baddbmm aten::linear aten::_grouped_mm mkl mkldnn".split()
)
OWN_FUNCTIONS = [
    function.__name__.lower()
    for function in (FusedBlockFunction, FrozenRMSNorm, SwiGLU, RotaryEmbedding, AdapterAttention)
]
# By parts of an operator's name, lower case; the first match wins.
CATEGORIES = {
    "attention kernel": "scaled_dot_product _efficient_attention _flash_attention varlen_attn "
    "flash_attn fmha segment_forward segment_backward segment_sums",
    # What they compute besides products and attention: on a GPU, Triton kernels.
    "own Functions": " ".join([*OWN_FUNCTIONS, "packedattention", "triton"]),
    "cross-entropy": "nll_loss log_softmax logsumexp cross_entropy",
    "softmax": "softmax",
    "norm": "rms_norm layer_norm rsqrt native_norm",
    "activation": "silu sigmoid",
    "rows in and out": "index embedding gather scatter slice_backward split select_backward",
    "copies": "copy_ cat clone contiguous fill_ zero stack constant_pad pad to_copy memcpy memset",
    "elementwise": "mul add sub div pow mean exp log neg complex tanh where masked_fill sum max eq",
}
MAX_ROWS = 30

Row = tuple[str, str, int, float]  # category, operator and shapes, calls, seconds


def category(name: str, shapes: Any, config: LlamaConfig) -> str:
    """The category of an operator; the shapes of a matrix product tell whose product it is."""
    if name == PACKING:
        return PACKING
    if name.startswith(MATMUL_PREFIXES):
        sizes = set(_sizes(shapes))
        if config.vocab_size in sizes:
            return "head products"
        if config.dim in sizes or config.hidden_dim in sizes:
            return "backbone products"
        return "small products (adapter, scores)"
    lowered = name.lower()
    for label, parts in CATEGORIES.items():
        if any(part in lowered for part in parts.split()):
            return label
    return "other"


def _sizes(shapes: Any) -> Iterator[int]:
    """All sizes of all tensor shapes; the profiler gives other arguments no shape."""
    for shape in shapes or ():
        if isinstance(shape, list | tuple):
            yield from (size for size in shape if isinstance(size, int))


def time_split(
    run: Callable[[], object], config: LlamaConfig, device: torch.device
) -> tuple[dict[str, float], list[Row]]:
    """(seconds by category, the longest rows) of one call of `run`."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    by_category: dict[str, float] = defaultdict(float)
    rows: list[Row] = []
    kernel_seconds = 0.0
    for event in profiler.key_averages(group_by_input_shape=True):
        if event.device_type.name != "CPU":
            # A kernel on its own; the operator that launched it has its time too.
            if not event.is_user_annotation:
                kernel_seconds += event.self_device_time_total / 1e6
            continue
        self_time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        seconds = self_time / 1e6
        if seconds <= 0:
            continue
        label = category(event.key, event.input_shapes, config)
        by_category[label] += seconds
        operator = f"{event.key} {_shapes_text(event.input_shapes)}"
        rows.append((label, operator, event.count, round(seconds, 5)))
    unknown = kernel_seconds - sum(by_category.values())
    if unknown > 0:
        by_category["kernels of no known operator"] = unknown
    rows.sort(key=lambda row: -row[3])
    largest_first = sorted(by_category.items(), key=lambda pair: -pair[1])
    return {label: round(seconds, 5) for label, seconds in largest_first}, rows[:MAX_ROWS]


def _shapes_text(shapes: Any) -> str:
    return " ".join("x".join(map(str, shape)) for shape in shapes or () if shape)
