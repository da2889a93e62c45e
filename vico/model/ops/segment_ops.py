"""Launches of segment_kernels.py, whose docstring has the formulas."""

from typing import NamedTuple

import torch
from torch import Tensor

from vico.model.attention.segment_tiles import MAX_VISITS, DeviceTables
from vico.model.ops import triton_ops
from vico.model.ops.prompt_heads import Gradients, PromptHeads

if triton_ops.IMPORTED:
    from vico.model.ops import segment_backward_kernels, segment_kernels

# Of Triton's compiler. Not tuned: no GPU has run this. At tiles of 32 rows in half precision no
# variable is moved to memory for them.
LAUNCH = {"num_warps": 4, "num_stages": 2}


class Saved(NamedTuple):
    """What backward needs besides the inputs."""

    q_THd: Tensor  # with its rotary embedding
    rows_out_THd: Tensor  # the output without the prompt's part
    log_sums_TH: Tensor  # fp32
    tanh_gate1_H: Tensor  # anything where there is no prompt


def forward(
    q_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    gate2_H: Tensor | None,
    prompt: PromptHeads | None,
    tables: DeviceTables,
    rotary_T1h: Tensor | None = None,
) -> tuple[Tensor, Saved]:
    """(out [T, H, d], what `backward` wants saved besides k, v, gate2 and prompt).

    With `rotary_T1h` q comes without its rotary embedding, but k with it.
    """
    q_THd, k_TJd, v_TJd = (x.contiguous() for x in (q_THd, k_TJd, v_TJd))
    num_heads = q_THd.shape[1]
    out_THd = torch.empty_like(q_THd)
    has_own_rows = prompt is not None and tables.for_backward
    rows_out_THd = torch.empty_like(q_THd) if has_own_rows else out_THd
    saves_q = rotary_T1h is not None and tables.for_backward
    turned_q_THd = torch.empty_like(q_THd) if saves_q else q_THd
    log_sums_TH = _fp32(q_THd.shape[:2], q_THd)
    pk, pv = _prompt_inputs(prompt, q_THd)
    gate1_H = q_THd if prompt is None else prompt.gate1_H.float().tanh()
    segment_kernels.segment_forward_kernel[(tables.sizes.num_query_tiles, num_heads)](
        *(q_THd, k_TJd, v_TJd, _gate(gate2_H, q_THd), pk, pv, gate1_H),
        *(_angles(rotary_T1h), tables.query_tiles, tables.list_rows, tables.by_row),
        *(out_THd, turned_q_THd, rows_out_THd, log_sums_TH),
        **_constants(q_THd, k_TJd, gate2_H, prompt, tables),
        SAVES=tables.for_backward,
        AS_FP32=_as_fp32(q_THd),
        **LAUNCH,
    )
    return out_THd, Saved(turned_q_THd, rows_out_THd, log_sums_TH, gate1_H)


def backward(
    g_THd: Tensor,
    k_TJd: Tensor,
    v_TJd: Tensor,
    gate2_H: Tensor | None,
    prompt: PromptHeads | None,
    saved: Saved,
    tables: DeviceTables,
    rotary_T1h: Tensor | None = None,
) -> Gradients:
    """Gradients of all inputs; equal inputs give equal bits.

    With `rotary_T1h` those of q and k are of them without their rotary embedding.
    """
    q_THd, (g_THd, k_TJd, v_TJd) = saved.q_THd, (x.contiguous() for x in (g_THd, k_TJd, v_TJd))
    (num_rows, num_heads, width), num_key_heads = q_THd.shape, k_TJd.shape[1]
    pk, pv = _prompt_inputs(prompt, q_THd)
    sizes, length = tables.sizes, len(pk)
    piece_rows = MAX_VISITS * tables.tile_rows
    num_prompt_pieces = -(-num_rows // piece_rows) if prompt is not None else 0
    dq, dk, dv = (torch.empty_like(x) for x in (q_THd, k_TJd, v_TJd))
    partial = _fp32((sizes.num_partial_rows, 2, num_key_heads, width), q_THd)
    prompt_sums = _fp32((num_prompt_pieces, 2, length, num_key_heads, width), q_THd)
    gate1_sums = _fp32((num_prompt_pieces, num_heads), q_THd)
    gate2_sums = _fp32((sizes.num_query_tiles, num_heads), q_THd)
    constants = _constants(q_THd, k_TJd, gate2_H, prompt, tables)
    num_programs = sizes.num_key_pieces + sizes.num_query_tiles + num_prompt_pieces
    segment_backward_kernels.segment_backward_kernel[(num_programs, num_heads)](
        *(g_THd, q_THd, k_TJd, v_TJd, _gate(gate2_H, q_THd), pk, pv, saved.tanh_gate1_H),
        *(saved.rows_out_THd, saved.log_sums_TH, _angles(rotary_T1h)),
        *(tables.query_tiles, tables.list_rows, tables.by_row),
        *(tables.key_pieces, tables.visits, dq, dk, dv, partial),
        *(prompt_sums, gate1_sums, gate2_sums),
        *(num_rows, sizes.num_key_pieces, sizes.num_query_tiles),
        **constants,
        PIECE=piece_rows,
        AS_FP32=_as_fp32(q_THd),
        **LAUNCH,
    )
    dpk, dpv = torch.empty_like(pk), torch.empty_like(pv)
    dgate1, dgate2 = _fp32((num_heads,), q_THd), _fp32((num_heads,), q_THd)
    segment_kernels.segment_sums_kernel[(sizes.num_shared_tiles + 1, num_heads)](
        *(partial, prompt_sums, gate1_sums, gate2_sums, saved.tanh_gate1_H),
        *(tables.shared_tiles, dk, dv, dpk, dpv, dgate1, dgate2),
        *(sizes.num_shared_tiles, num_prompt_pieces, sizes.num_query_tiles),
        **constants,
        **LAUNCH,
    )
    of_prompt = None if prompt is None else PromptHeads(dpk, dpv, dgate1)
    return Gradients(dq, dk, dv, None if gate2_H is None else dgate2, of_prompt)


def _constants(
    q_THd: Tensor,
    k_TJd: Tensor,
    gate2_H: Tensor | None,
    prompt: PromptHeads | None,
    tables: DeviceTables,
) -> dict[str, int | bool]:
    """Those of all three kernels. Tiles of a product are powers of two, of 16 or more."""
    num_heads, width = q_THd.shape[1:]
    length = 0 if prompt is None else len(prompt.k_AJd)
    return {
        "heads": num_heads,
        "group": num_heads // k_TJd.shape[1],
        "width": width,
        "length": length,
        "TILE": tables.tile_rows,
        "WIDTH": _tile_size(width),
        "KEYS": _tile_size(length),
        "HAS_GATE": gate2_H is not None,
    }


def _fp32(size: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_empty(size, dtype=torch.float32)


def _tile_size(number: int) -> int:
    return max(16, 1 << (number - 1).bit_length())


def _gate(gate2_H: Tensor | None, q_THd: Tensor) -> Tensor:
    """In fp32; where there is none, any pointer: it is not read."""
    return q_THd if gate2_H is None else gate2_H.float().contiguous()


def _angles(rotary_T1h: Tensor | None) -> Tensor | None:
    """(cosine, sine) of each pair, fp32."""
    return None if rotary_T1h is None else torch.view_as_real(rotary_T1h).contiguous()


def _prompt_inputs(prompt: PromptHeads | None, q_THd: Tensor) -> tuple[Tensor, Tensor]:
    """(keys, values); where there is no prompt, any pointers: they are not read."""
    if prompt is None:
        return q_THd[:1], q_THd[:1]
    return prompt.k_AJd.contiguous(), prompt.v_AJd.contiguous()


def _as_fp32(x: Tensor) -> bool:
    """Triton's interpreter (3.9) takes bf16 for whole numbers in products."""
    return triton_ops.INTERPRETED and x.dtype == torch.bfloat16
