"""Gated attention by kernels of our own that walk the segments (ops/segment_kernels.py).

Keys and values are read where they are: nothing is gathered, widened or padded. A launch forward
and two backward do a layer's attention, with its adapter prompt, its gates and its rotary embedding
but that of the keys. No GPU has run them yet (benchmarks/LOG.md); the tests run them by Triton's
interpreter.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.attention.segment_tiles import (
    DeviceTables,
    HostTables,
    TableSizes,
    host_tables,
    segment_tables,
    tables_from_numbers,
)
from vico.model.attention.stream import StreamAttention
from vico.model.batch import Segment
from vico.model.ops import segment_ops
from vico.model.ops.autograd import apply_rotary_emb
from vico.model.ops.prompt_heads import Gradients, PromptHeads
from vico.model.ops.segment_ops import Saved

# Rows of a tile, of queries and of keys. The tiles of fp32 take twice the room.
HALF_TILE_ROWS, FP32_TILE_ROWS = 32, 16


class SegmentAttention(StreamAttention):
    """`attend` by our own kernels."""

    takes_grouped_heads = True
    can_be_captured = True

    def __init__(self, layout: DeviceTables | None = None, tile_rows: int | None = None) -> None:
        """`tile_rows`: a power of two, 16 or more; None: by the type."""
        super().__init__(layout)
        self._tile_rows = tile_rows

    def tile_rows(self, dtype: torch.dtype) -> int:
        by_type = FP32_TILE_ROWS if dtype == torch.float32 else HALF_TILE_ROWS
        return self._tile_rows or by_type

    def make_layout(
        self, segments: tuple[Segment, ...], like: Tensor, for_backward: bool
    ) -> DeviceTables:
        return segment_tables(segments, self.tile_rows(like.dtype), like.device, for_backward)

    def host_layout(self, segments: tuple[Segment, ...], dtype: torch.dtype) -> HostTables:
        return host_tables(segments, self.tile_rows(dtype))

    def layout_from_numbers(
        self, numbers: Tensor, sizes: TableSizes, dtype: torch.dtype
    ) -> DeviceTables:
        return tables_from_numbers(numbers, sizes, self.tile_rows(dtype), for_backward=True)

    def with_layout(self, layout: DeviceTables) -> "SegmentAttention":
        return SegmentAttention(layout, self._tile_rows)

    def attend(
        self,
        q_THd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor | None,
        layout: DeviceTables,
    ) -> Tensor:
        out: Tensor = _SegmentAttentionFunction.apply(q_THd, k_TJd, v_TJd, gate2_H, layout)
        return out

    def forward_with_prompt(
        self,
        q_THd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor,
        prompt: PromptHeads,
        rotary_T1h: Tensor,
        layout: DeviceTables,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """k is turned first, as many programs read its rows; q by the one that reads it."""
        k_TJd = apply_rotary_emb(k_TJd, rotary_T1h, 1.0)
        inputs = (k_TJd, v_TJd, gate2_H)
        out_THd, saved = segment_ops.forward(q_THd, *inputs, prompt, layout, rotary_T1h)
        return out_THd, (*inputs, *prompt, *saved)

    def backward_with_prompt(
        self,
        g_THd: Tensor,
        saved: tuple[Tensor, ...],
        rotary_T1h: Tensor,
        layout: DeviceTables,
    ) -> Gradients:
        k_TJd, v_TJd, gate2_H, *others = saved
        inputs, prompt = (k_TJd, v_TJd, gate2_H), PromptHeads(*others[:3])
        return segment_ops.backward(g_THd, *inputs, prompt, Saved(*others[3:]), layout, rotary_T1h)


class _SegmentAttentionFunction(Function):
    """Attention without an adapter prompt."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor | None,
        layout: DeviceTables,
    ) -> Tensor:
        out, saved = segment_ops.forward(q_THd, k_TJd, v_TJd, gate2_H, None, layout)
        ctx.save_for_backward(k_TJd, v_TJd, gate2_H, *saved)
        ctx.layout = layout
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        k_TJd, v_TJd, gate2_H, *saved = ctx.saved_tensors
        inputs = (k_TJd, v_TJd, gate2_H)
        of = segment_ops.backward(gradients[0], *inputs, None, Saved(*saved), ctx.layout)
        return of.q_THd, of.k_TJd, of.v_TJd, of.gate2_H, None
