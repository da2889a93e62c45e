"""Gated attention by a fused kernel for packed sequences: one call per layer.

Each segment is a sequence of the kernel whose keys are its ancestors' rows and its own, gathered;
the kernel aligns the causal triangle at the bottom right. gate2 is an extra dimension of q and k.
backends.py has the kernels.

What is gathered and widened for the kernel is made again in backward: no second copy of q, k and v
is kept.
"""

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vico.model.attention.segment_layout import (
    LayoutSizes,
    SegmentLayout,
    VarlenLayout,
    layout_from_numbers,
    segment_layout,
    varlen_layout,
)
from vico.model.attention.stream import StreamAttention
from vico.model.batch import Segment
from vico.model.config import widened_head_dim
from vico.model.ops import triton_ops
from vico.model.ops.autograd import (
    adapter_attention,
    adapter_attention_backward,
    apply_rotary_emb_qk,
)
from vico.model.ops.prompt_heads import Gradients, PromptHeads

Qkv = tuple[Tensor, Tensor, Tensor]


class VarlenKernel(Protocol):
    """Attention of each segment's queries [T, H, d + E] to its own keys [K, H, d + E].

    Causal, with the triangle at the bottom right.
    """

    can_be_captured: bool  # by CUDA graphs

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(out, what `backward` wants saved)."""
        ...

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> Qkv: ...


class PackedAttention(StreamAttention):
    """`attend` by a kernel for packed sequences."""

    def __init__(self, kernel: VarlenKernel, layout: VarlenLayout | None = None) -> None:
        super().__init__(layout)
        self.kernel = kernel
        self.can_be_captured = kernel.can_be_captured

    def make_layout(
        self, segments: tuple[Segment, ...], like: Tensor, for_backward: bool
    ) -> VarlenLayout:
        return varlen_layout(segments, like.device, like.dtype, for_backward)

    def host_layout(self, segments: tuple[Segment, ...], dtype: torch.dtype) -> SegmentLayout:
        return segment_layout(segments)

    def layout_from_numbers(
        self, numbers: Tensor, sizes: LayoutSizes, dtype: torch.dtype
    ) -> VarlenLayout:
        return layout_from_numbers(numbers, sizes, dtype, for_backward=True)

    def with_layout(self, layout: VarlenLayout) -> "PackedAttention":
        return PackedAttention(self.kernel, layout)

    def attend(
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        layout: VarlenLayout,
    ) -> Tensor:
        out: Tensor = _PackedAttentionFunction.apply(q_THd, k_THd, v_THd, gate2_H, self, layout)
        return out

    def forward_with_prompt(
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor,
        prompt: PromptHeads,
        rotary_T1h: Tensor,
        layout: VarlenLayout,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        q_THd, k_THd = apply_rotary_emb_qk(q_THd, k_THd, rotary_T1h, 1.0)
        inputs = (q_THd, k_THd, v_THd, gate2_H)
        out_THd, saved = self.forward(*inputs, layout)
        return adapter_attention(out_THd, q_THd, *prompt), (*inputs, *prompt, *saved)

    def backward_with_prompt(
        self,
        g_THd: Tensor,
        saved: tuple[Tensor, ...],
        rotary_T1h: Tensor,
        layout: VarlenLayout,
    ) -> Gradients:
        q_THd, k_THd, v_THd, gate2_H, *others = saved
        prompt, by_kernel = PromptHeads(*others[:3]), tuple(others[3:])
        dq_THd, dk_THd, dv_THd, dgate2_H = self.backward(
            g_THd, q_THd, k_THd, v_THd, gate2_H, by_kernel, layout
        )
        more_dq_THd, *of_prompt = adapter_attention_backward(g_THd, q_THd, *prompt)
        dq_THd = more_dq_THd.add_(dq_THd)
        dq_THd, dk_THd = apply_rotary_emb_qk(dq_THd, dk_THd, rotary_T1h, -1.0)
        return Gradients(dq_THd, dk_THd, dv_THd, dgate2_H, PromptHeads(*of_prompt))

    def forward(
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        layout: VarlenLayout,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(out [T, H, d], what `backward` wants saved besides the inputs)."""
        width = q_THd.shape[-1]
        inputs = _kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout)
        # The scale is that of the real head width, not of the widened one.
        out, saved = self.kernel.forward(*inputs, layout, width**-0.5)
        return out[..., :width], saved

    def backward(
        self,
        g_THd: Tensor,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        saved: tuple[Tensor, ...],
        layout: VarlenLayout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and gate2.

        Rows that several segments see get one sum in fp32, in a fixed order.
        """
        width = q_THd.shape[-1]
        q, k, v = _kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout)
        gradient = F.pad(g_THd, (0, q.shape[-1] - width))
        dq, dk, dv = self.kernel.backward(gradient, q, k, v, saved, layout, width**-0.5)
        del q, k, v, gradient  # widened tensors, at the peak of a step's memory
        gate2_gradient = None
        if gate2_H is not None:
            # hi and lo are parts of one number, lo only its rounding: a row's score moves with hi
            # alone.
            per_row_TH = dq[..., width].float() * layout.after_video_T[:, None]
            gate2_gradient = per_row_TH.sum(dim=0) * (math.sqrt(width) / gate_unit(width))
        dk_THd, dv_THd = _sum_by_row(dk, layout, width), _sum_by_row(dv, layout, width)
        return dq[..., :width], dk_THd, dv_THd, gate2_gradient


class _PackedAttentionFunction(Function):
    """Saves q, k, v and what the kernel wants; what is gathered and widened is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        attention: PackedAttention,
        layout: VarlenLayout,
    ) -> Tensor:
        out, saved = attention.forward(q_THd, k_THd, v_THd, gate2_H, layout)
        ctx.save_for_backward(q_THd, k_THd, v_THd, gate2_H, *saved)
        ctx.attention, ctx.layout = attention, layout
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_THd, v_THd, gate2_H, *saved = ctx.saved_tensors
        inputs = (q_THd, k_THd, v_THd, gate2_H)
        of_inputs = ctx.attention.backward(gradients[0], *inputs, tuple(saved), ctx.layout)
        return (*of_inputs, None, None)


def _kernel_inputs(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, layout: VarlenLayout
) -> Qkv:
    """q [T, H, d + E], k and v [K, H, d + E], as the kernels take them; without gates E is 0."""
    rows_K = layout.key_rows_K
    if gate2_H is None:
        return q_THd, k_THd.index_select(0, rows_K), v_THd.index_select(0, rows_K)
    width = k_THd.shape[-1]
    unit, num_extra = gate_unit(width), widened_head_dim(width) - width
    widen = triton_ops.widen if triton_ops.can_run_on_heads(q_THd) else widen_heads
    flags = layout.after_video_T, layout.is_video_T
    return widen(q_THd, k_THd, v_THd, gate2_H, *flags, rows_K, unit, num_extra)


def gate_unit(width: int) -> float:
    """A power of two near sqrt(d): what a video key carries for gate2."""
    return 2.0 ** round(math.log2(math.sqrt(width)))


def widen_heads(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    gate2_H: Tensor,
    after_video_T: Tensor,
    is_video_T: Tensor,
    rows_K: Tensor,
    unit: float,
    num_extra: int,
) -> Qkv:
    """q and k widened so that q'.k' = q.k + sqrt(d) gate2 on gated pairs; v with zeros.

    A pair is gated where a row after the video meets a video key. With c the unit, q gets [hi, lo]
    = gate2 sqrt(d) / c in two parts of the arithmetic's precision (together about 16 bits in bf16)
    and k gets [c, c].
    """
    num_rows, num_heads, width = k_THd.shape
    gate_H = gate2_H.float() * (math.sqrt(width) / unit)
    hi_H = gate_H.to(q_THd.dtype)
    lo_H = (gate_H - hi_H.float()).to(q_THd.dtype)
    zeros_HE = q_THd.new_zeros(num_heads, num_extra - 2)
    q_extra_HE = torch.cat([hi_H[:, None], lo_H[:, None], zeros_HE], dim=1)
    q_extra_THE = after_video_T[:, None, None] * q_extra_HE
    k_extra_E = k_THd.new_zeros(num_extra)
    k_extra_E[:2] = unit
    k_extra_T1E = is_video_T.to(k_THd.dtype)[:, None, None] * k_extra_E
    k_extra_THE = k_extra_T1E.expand(num_rows, num_heads, num_extra)
    wide_q = torch.cat([q_THd, q_extra_THE], dim=-1)
    wide_k = torch.cat([k_THd, k_extra_THE], dim=-1).index_select(0, rows_K)
    wide_v = F.pad(v_THd, (0, num_extra)).index_select(0, rows_K)
    return wide_q, wide_k, wide_v


def _sum_by_row(gradient_KHd: Tensor, layout: VarlenLayout, width: int) -> Tensor:
    """[T, H, width]: for each row, the sum over its copies among the keys."""
    out_THd = gradient_KHd[..., :width].index_select(0, layout.own_keys_T)
    if layout.sharing_PK is not None and len(layout.sharing_PK):
        # As a product with zeros and ones: half precision is summed in fp32, and always in the same
        # order.
        sums_PHd = layout.sharing_PK @ gradient_KHd.flatten(1)
        sums_PHd = sums_PHd.unflatten(1, gradient_KHd.shape[1:])
        out_THd.index_copy_(0, layout.shared_rows_P, sums_PHd[..., :width])
    return out_THd
