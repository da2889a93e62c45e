"""Gated attention on a CPU: PyTorch's fused kernel per block of the mask, merged by log-sum-exp.

The stream is a tree of segments, so the visible part of the score matrix is a list of blocks: each
segment's own lower triangle, and full rectangles of later rows against it. gate2 is one number per
head on some of the rectangles. reference.py has the definition, varlen.py is for GPUs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.attention.masks import AttentionMask, MaskBlock

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend_blocks(
    q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask
) -> Tensor:
    """Block by block; keeps q, k, v, the output and one number per row and head.

    Returns [Q, H, d].
    """
    out: Tensor = _BlockAttention.apply(q_QHd, k_THd, v_THd, gate2_H, mask.blocks)
    return out


class _BlockAttention(Function):
    """Fused attention per block, merged: out = sum_b exp(lse_b - lse) out_b.

    lse is the log-sum-exp over a row's blocks. Backward hands the kernel the merged out and lse,
    which makes each block's probabilities and gradients those of the whole softmax. gate2 shifts a
    block's scores, hence its lse_b; its gradient is the sum of the scores' gradients, sum_i p_i
    (dO_i . out_b,i - dO_i . out_i), p_i the block's share of row i.
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
        # The CPU's half-precision kernel is slower than its fp32 one.
        fq, fk, fv = q.float(), k.float(), v.float()
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
        fq, fk, fv, out_QHd, g_QHd = (x.float() for x in (q, k, v, out, gradients[0]))
        dq, dk, dv = torch.zeros_like(fq), torch.zeros_like(fk), torch.zeros_like(fv)
        gate2_gradient = None if gate2_H is None else torch.zeros_like(gate2_H)
        for block in ctx.blocks:
            rows, keys = slice(block.q_start, block.q_stop), slice(block.k_start, block.k_stop)
            lse = lse_QH[rows]
            if block.gated and gate2_H is not None and gate2_gradient is not None:
                part, part_lse = _forward(block, fq, fk, fv)
                share_rH = (part_lse + gate2_H - lse).exp_()
                difference_rH = (g_QHd[rows] * (part - out_QHd[rows])).sum(dim=-1)
                gate2_gradient += (share_rH * difference_rH).sum(dim=0)
                lse = lse - gate2_H
            part_dq, part_dk, part_dv = _backward(block, g_QHd, fq, fk, fv, out_QHd, lse)
            dq[rows] += part_dq
            dk[keys] += part_dk
            dv[keys] += part_dv
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), gate2_gradient, None


def _forward(block: MaskBlock, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(out [rows, H, d], lse [rows, H]) of one block."""
    inputs = _query_rows(block, q), _key_rows(block, k), _key_rows(block, v)
    out, lse = _kernel(*inputs, 0.0, block.causal, scale=q.shape[-1] ** -0.5)
    return _joined(out), lse.transpose(1, 2).flatten(0, 1)


def _backward(
    block: MaskBlock, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_rH: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one block's queries, keys and values; `lse_rH`: of its rows."""
    lse_nHr = lse_rH.unflatten(0, (block.count, -1)).transpose(1, 2).contiguous()
    gradient, q, out = (_query_rows(block, x) for x in (g, q, out))
    k, v = _key_rows(block, k), _key_rows(block, v)
    parts = _kernel_backward(
        gradient, q, k, v, out, lse_nHr, 0.0, block.causal, scale=q.shape[-1] ** -0.5
    )
    return tuple(_joined(part) for part in parts)


def _query_rows(block: MaskBlock, x_QHd: Tensor) -> Tensor:
    return _parts(x_QHd[block.q_start : block.q_stop], block.count)


def _key_rows(block: MaskBlock, x_THd: Tensor) -> Tensor:
    return _parts(x_THd[block.k_start : block.k_stop], block.count)


def _parts(x_THd: Tensor, count: int) -> Tensor:
    """[n, H, r, d] of `count` equal parts, as the kernel takes them."""
    return x_THd.unflatten(0, (count, -1)).transpose(1, 2)


def _joined(x_nHrd: Tensor) -> Tensor:
    return x_nHrd.transpose(1, 2).flatten(0, 1)
