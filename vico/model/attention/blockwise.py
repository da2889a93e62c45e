"""Attention over a packed stream: out = softmax_k(s q.k + gate2 [query behind the video, key in the video]) V.

The stream is a tree of segments, so what is visible of the score matrix is a list of blocks: each segment's own lower
triangle, and full rectangles of later rows against it. gate2 is one number per head on some of the rectangles.

`attend_plain` builds the whole score matrix and is the definition. `attend_blocks` (CPU) runs PyTorch's fused kernel per
block and merges the softmaxes by their log-sum-exp. attention_packed.py has the kernels of GPUs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.batch import Segment


@dataclass(frozen=True, slots=True)
class MaskBlock:
    """Queries [q_start, q_stop) see keys [k_start, k_stop): all of them, or (causal) each those up to itself.

    `count` > 1: a causal block of that many equal triangles side by side, each seeing itself alone.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    gated: bool
    count: int = 1


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """Who sees whom among the rows of a stream. `queries`: the rows that ask, when not all do (the last layer)."""

    segments: tuple[Segment, ...]
    blocks: tuple[MaskBlock, ...]  # rows of queries counted among those that ask; each row's causal block comes first
    queries: Tensor | None = None  # int64, ascending


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionMask], Tensor]


def attention_mask(segments: tuple[Segment, ...]) -> AttentionMask:
    """All rows ask. Host work, once per micro-batch."""
    triangles = [MaskBlock(s.start, s.stop, s.start, s.stop, True, False) for s in segments]
    return AttentionMask(segments, (*_merged(triangles), *_rectangles(segments)))


def _rectangles(segments: Sequence[Segment]) -> Iterator[MaskBlock]:
    """Of each segment, the rows below it against its keys; runs of neighbouring rows of one kind are one block."""
    runs: dict[int, list[list[int]]] = {}
    for segment in segments:
        ancestor = segment.parent
        while ancestor is not None:
            found = runs.setdefault(ancestor, [])
            gated = int(segment.after_video and segments[ancestor].is_video)
            if found and found[-1][1] == segment.start and found[-1][2] == gated:
                found[-1][1] = segment.stop
            else:
                found.append([segment.start, segment.stop, gated])
            ancestor = segments[ancestor].parent
    for ancestor, found in runs.items():
        for start, stop, gated in found:
            yield MaskBlock(start, stop, segments[ancestor].start, segments[ancestor].stop, False, bool(gated))


def _merged(triangles: Sequence[MaskBlock]) -> list[MaskBlock]:
    """Neighbouring triangles of one size (the branches of options) as one block."""
    merged: list[MaskBlock] = []
    for block in triangles:
        size = block.q_stop - block.q_start
        last = merged[-1] if merged else None
        if last is not None and last.q_stop == block.q_start and (last.q_stop - last.q_start) == last.count * size:
            merged[-1] = MaskBlock(last.q_start, block.q_stop, last.k_start, block.k_stop, True, False, last.count + 1)
        else:
            merged.append(block)
    return merged


def restrict_queries(mask: AttentionMask, rows: Tensor) -> AttentionMask:
    """`mask` when only `rows` (host int64, ascending, distinct) ask: rectangles shrink, triangles split where rows are missing."""
    asked = rows.tolist()
    place = {row: i for i, row in enumerate(asked)}
    blocks: list[MaskBlock] = []
    for segment in mask.segments:
        for start, stop in _runs([row for row in range(segment.start, segment.stop) if row in place]):
            at = place[start]
            blocks.append(MaskBlock(at, at + stop - start, start, stop, True, False))
            if start > segment.start:
                blocks.append(MaskBlock(at, at + stop - start, segment.start, start, False, False))
    for block in _rectangles(mask.segments):
        inside = [place[row] for row in range(block.q_start, block.q_stop) if row in place]
        if inside:
            blocks.append(MaskBlock(inside[0], inside[-1] + 1, block.k_start, block.k_stop, False, block.gated))
    return AttentionMask(mask.segments, (*(b for b in blocks if b.causal), *(b for b in blocks if not b.causal)), rows)


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of consecutive numbers."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i


def attend_plain(q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask) -> Tensor:
    """The definition (METHOD section 1), in fp32, with the whole score matrix. Returns [Q, H, d]; Q rows ask."""
    num_rows, _, width = k_THd.shape
    visible_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    gated_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for segment in mask.segments:
        rows, ancestor = slice(segment.start, segment.stop), segment.parent
        visible_TT[rows, rows] = torch.ones_like(visible_TT[rows, rows]).tril_()
        while ancestor is not None:
            keys = slice(mask.segments[ancestor].start, mask.segments[ancestor].stop)
            visible_TT[rows, keys] = True
            gated_TT[rows, keys] = segment.after_video and mask.segments[ancestor].is_video
            ancestor = mask.segments[ancestor].parent
    if mask.queries is not None:
        visible_TT, gated_TT = visible_TT[mask.queries], gated_TT[mask.queries]
    scores_HQT = torch.einsum("qhd,khd->hqk", q_QHd.float(), k_THd.float()) / math.sqrt(width)
    if gate2_H is not None:
        scores_HQT = scores_HQT + gate2_H.float()[:, None, None] * gated_TT.to(q_QHd.device)
    scores_HQT = scores_HQT.masked_fill(~visible_TT.to(q_QHd.device), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores_HQT.softmax(dim=-1), v_THd.float()).to(q_QHd.dtype)


_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _BlockAttention(Function):
    """Fused attention per block, merged: with lse the log-sum-exp over all of a row's blocks, out = sum_b exp(lse_b - lse) out_b.

    Backward hands the kernel the merged out and lse, which makes each block's probabilities and gradients those of the
    whole softmax. gate2 shifts a block's scores, hence its lse_b; its gradient is the sum of the scores' gradients,
    sum_i p_i (dO_i . out_b,i - dO_i . out_i), p_i the block's share of row i.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, gate2_H: Tensor | None, blocks: tuple[MaskBlock, ...]) -> Tensor:
        fq, fk, fv = q.float(), k.float(), v.float()  # the CPU's half-precision kernel is the slower one
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
                gate2_gradient += (share_qH * (g_QHd[rows] * (part - out_QHd[rows])).sum(dim=-1)).sum(dim=0)
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
    out, lse = _kernel(queries, _cut(k, *keys), _cut(v, *keys), 0.0, block.causal, scale=q.shape[-1] ** -0.5)
    return _joined(out), lse.transpose(1, 2).flatten(0, 1)


def _backward(block: MaskBlock, g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse_qH: Tensor) -> tuple[Tensor, ...]:
    """Gradients of one block's queries, keys and values."""
    queries, keys = (block.q_start, block.q_stop, block.count), (block.k_start, block.k_stop, block.count)
    lse = lse_qH.unflatten(0, (block.count, -1)).transpose(1, 2).contiguous()
    parts = _kernel_backward(
        _cut(g, *queries), _cut(q, *queries), _cut(k, *keys), _cut(v, *keys), _cut(out, *queries), lse, 0.0, block.causal,
        scale=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return tuple(_joined(part) for part in parts)


def attend_blocks(q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask) -> Tensor:
    """MaskBlock by block on a CPU; keeps q, k, v, the output and one number per row and head. Returns [Q, H, d]."""
    out: Tensor = _BlockAttention.apply(q_QHd, k_THd, v_THd, gate2_H, mask.blocks)
    return out
