"""Bytes that the attention of one adapted layer reads and writes on a GPU, by formula.

Each launch counts what it must read and write once, in half precision unless said otherwise: a
tensor that several programs of a launch read counts once. So this is a lower bound for both ways,
and not a measurement. Forward and backward with everything between the products of q, k and v and
the output product.

T rows, K gathered keys, H heads of width d, E what a head is wider by, A prompt keys; every query
head has a key head.
"""

from vico.model.attention.segment_layout import SegmentLayout, segment_layout
from vico.model.attention.segment_tiles import MAX_VISITS, SegmentTables
from vico.model.batch import Segment
from vico.model.config import LlamaConfig, round_up, widened_head_dim
from vico.model.ops.triton_ops import ROWS

HALF, FP32, INT64 = 2, 4, 8
PROMPT_TILE = 16  # rows that the adapter's kernel writes for a prompt of A <= 16 keys


def _angle_bytes(num_rows: int, config: LlamaConfig) -> int:
    return num_rows * config.head_dim * FP32


def varlen_bytes(segments: tuple[Segment, ...], config: LlamaConfig) -> dict[str, int]:
    """Of --attention varlen with Triton's elementwise kernels, by step."""
    layout: SegmentLayout = segment_layout(segments)
    rows, keys, shared = layout.num_rows, len(layout.key_rows), len(layout.shared_rows)
    wide_head = widened_head_dim(config.head_dim)
    narrow, wide = config.heads_dim * HALF, config.n_heads * wide_head * HALF
    # FlashAttention-2 rounds the head width of its fp32 sums of dq up to a multiple of 32, or of 64
    # above 128.
    summed_head = round_up(wide_head, 64 if wide_head > 128 else 32)
    sums = rows * config.n_heads * summed_head * FP32
    log_sums = rows * config.n_heads * FP32
    widen = (rows + 2 * keys) * (narrow + wide)
    kernel_inputs = (rows + 2 * keys) * wide
    prompt_sums = -(-rows // ROWS) * 2 * PROMPT_TILE * config.heads_dim * FP32
    rotary = 4 * rows * narrow + _angle_bytes(rows, config)  # q and k, each read and written
    return {
        "forward: rotary embedding": rotary,
        "forward: widen": widen,
        "forward: flash": kernel_inputs + rows * wide + log_sums,
        "forward: adapter": rows * (wide + 2 * narrow),
        "backward: widen": widen,
        "backward: pad the gradient": rows * (2 * wide + narrow),
        "backward: flash, delta": 2 * rows * wide + log_sums,
        "backward: flash, sums of dq set to 0": sums,
        # Added to in memory: read and written.
        "backward: flash": kernel_inputs + rows * wide + 2 * log_sums + 2 * sums + 2 * keys * wide,
        "backward: flash, dq rounded": sums + rows * wide,
        "backward: gather dk, dv": 4 * rows * narrow,
        "backward: 0/1 product": 2 * (keys * (wide + shared * HALF) + shared * wide),
        "backward: shared rows": 4 * shared * narrow,
        "backward: adapter": 3 * rows * narrow + prompt_sums,
        "backward: adapter's sums": prompt_sums,
        "backward: add dq": rows * (2 * narrow + wide),
        "backward: rotary embedding": rotary,
    }


def segment_bytes(
    segments: tuple[Segment, ...], config: LlamaConfig, tile_rows: int, adapter_len: int = 10
) -> dict[str, int]:
    """Of --attention segment, by launch."""
    tables = SegmentTables(segments, tile_rows)
    sizes = tables.sizes
    rows, of_tables = sizes.num_rows, sum(sizes.array_lengths) * INT64
    narrow, log_sums = config.heads_dim * HALF, rows * config.n_heads * FP32
    angles = _angle_bytes(rows, config)
    num_prompt_pieces = -(-rows // (MAX_VISITS * tile_rows))
    partial = 2 * sizes.num_partial_rows * config.heads_dim * FP32
    prompt_sums = num_prompt_pieces * 2 * adapter_len * config.heads_dim * FP32
    gate_sums = (num_prompt_pieces + sizes.num_query_tiles) * config.n_heads * FP32
    sums = partial + prompt_sums + gate_sums
    num_shared = sum(stop - start for start, stop, _, _ in tables.shared_tiles)
    return {
        "forward: rotary embedding of k": 2 * rows * narrow + angles,
        # q, k, v; q with its rotary embedding; the output with the prompt's part and without.
        "forward": 6 * rows * narrow + angles + log_sums + of_tables,
        # q, k, v, the gradient and the output; dq, dk, dv.
        "backward": 8 * rows * narrow + angles + log_sums + of_tables + sums,
        "backward: sums": sums + 2 * (num_shared + adapter_len) * narrow,
    }
