"""Attention over a packed stream: out = softmax_k(s q.k + gate2 [query behind the video, key in the video]) V.

The stream is a tree of segments, so what is visible of the score matrix is a list of blocks: each segment's own lower
triangle, and full rectangles of later rows against it. gate2 is one number per head on some of the rectangles.

`attend_plain` builds the whole score matrix and is the definition. `attend_blocks` (CPU) runs PyTorch's fused kernel per
block and merges the softmaxes by their log-sum-exp. attention_packed.py has the kernels of GPUs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.attention.masks import AttentionMask, MaskBlock

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _BlockAttention(Function):
    """Fused attention per block, merged: with lse the log-sum-exp over all of a row's blocks, out = sum_b exp(lse_b - lse) out_b.

    Backward hands the kernel the merged out and lse, which makes each block's probabilities and gradients those of the
    whole softmax. gate2 shifts a block's scores, hence its lse_b; its gradient is the sum of the scores' gradients,
    sum_i p_i (dO_i . out_b,i - dO_i . out_i), p_i the block's share of row i.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate2_H: Tensor | None,
        blocks: tuple[MaskBlock, ...],
    ) -> Tensor:
        fq, fk, fv = (
            q.float(),
            k.float(),
            v.float(),
        )  # the CPU's half-precision kernel is the slower one
        out_QHd, lse_QH = torch.empty_like(fq), fq.new_empty(fq.shape[:2])
        for block in blocks:
            rows = slice(block.q_start, block.q_stop)
            part, lse = _forward(block, fq, fk, fv)
            if block.gated and gate2_H is not None:
                lse = lse + gate2_H
            if block.causal:  # the first block of its rows
                out_QHd[rows], lse_QH[rows] = part, lse
                continue
            before = lse_QH[rows]
            total = torch.logaddexp(before, lse)
            out_QHd[rows] *= (before - total).exp_()[..., None]
            out_QHd[rows].addcmul_(part, (lse - total).exp_()[..., None])
            lse_QH[rows] = total
        out_QHd = out_QHd.to(q.dtype)
        ctx.save_for_backward(q, k, v, gate2_H, out_QHd, lse_QH)
        ctx.blocks = blocks
        return out_QHd

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, gate2_H, out, lse_QH = ctx.saved_tensors
        fq, fk, fv, out_QHd, g_QHd = (t.float() for t in (q, k, v, out, gradients[0]))
        dq, dk, dv = torch.zeros_like(fq), torch.zeros_like(fk), torch.zeros_like(fv)
        gate2_gradient = None if gate2_H is None else torch.zeros_like(gate2_H)
        for block in ctx.blocks:
            rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            lse = lse_QH[rows]
            if block.gated and gate2_H is not None and gate2_gradient is not None:
                part, part_lse = _forward(block, fq, fk, fv)
                share_qH = (part_lse + gate2_H - lse).exp_()
                gate2_gradient += (
                    share_qH * (g_QHd[rows] * (part - out_QHd[rows])).sum(dim=-1)
                ).sum(dim=0)
                lse = lse - gate2_H
            part_dq, part_dk, part_dv = _backward(block, g_QHd, fq, fk, fv, out_QHd, lse)
            dq[rows] += part_dq
            dk[keys] += part_dk
            dv[keys] += part_dv
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), gate2_gradient, None


def _cut(x_THd: Tensor, start: int, stop: int, count: int) -> Tensor:
    """Rows [start, stop) as the kernel takes them: [count, H, rows, d]."""
    return x_THd[start:stop].unflatten(0, (count, -1)).transpose(1, 2)


def _joined(x_nHrd: Tensor) -> Tensor:
    return x_nHrd.transpose(1, 2).flatten(0, 1)


def _forward(block: MaskBlock, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [rows, H, d], lse [rows, H]) of one block."""
    keys = (block.k_start, block.k_stop, block.count)
    queries = _cut(q, block.q_start, block.q_stop, block.count)
    out, lse = _kernel(
        queries, _cut(k, *keys), _cut(v, *keys), 0.0, block.causal, scale=q.shape[-1] ** -0.5
    )
    return _joined(out), lse.transpose(1, 2).flatten(0, 1)


def _backward(
    block: MaskBlock, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_qH: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one block's queries, keys and values."""
    queries, keys = (
        (block.q_start, block.q_stop, block.count),
        (block.k_start, block.k_stop, block.count),
    )
    lse = lse_qH.unflatten(0, (block.count, -1)).transpose(1, 2).contiguous()
    parts = _kernel_backward(
        _cut(g, *queries),
        _cut(q, *queries),
        _cut(k, *keys),
        _cut(v, *keys),
        _cut(out, *queries),
        lse,
        0.0,
        block.causal,
        scale=q.shape[-1] ** -0.5,
    )
    return tuple(_joined(part) for part in parts)


def attend_blocks(
    q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask
) -> Tensor:
    """Block by block on a CPU; keeps q, k, v, the output and one number per row and head. Returns [Q, H, d]."""
    out: Tensor = _BlockAttention.apply(q_QHd, k_THd, v_THd, gate2_H, mask.blocks)
    return out
