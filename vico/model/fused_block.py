"""A decoder block as one autograd Function: llama.py's Block with its gradient written out, for packed attention.

It computes what the modules compute, by the same functions in the same order, and keeps the same tensors. What it saves is
the host's time: autograd's bookkeeping for sixteen Functions and the small operations between them takes a host longer than
a GPU takes for the block's products (benchmarks/LOG.md). Below, D is the width of the model, T the rows, A the prompt.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.autograd import Function

from vico.model.attention.segment_layout import VarlenLayout
from vico.model.attention.varlen import PackedAttention
from vico.model.ops.autograd import (
    adapter,
    adapter_backward,
    apply_rotary_emb_qk,
    linear,
    linear_add,
    norm,
    norm_backward,
    swiglu,
    swiglu_backward,
)

if TYPE_CHECKING:
    from vico.model.llama import Block, Context


def run(
    block: "Block", x_TD: Tensor, prompt_AD: Tensor | None, context: "Context"
) -> Tensor | None:
    """The block's output [T, D]; None where the modules must run: no prompt, few rows that ask, shared heads, other attention."""
    attention, attend = block.attention, context.attend
    whole = prompt_AD is not None and context.mask.queries is None and attention.group == 1
    if not whole or not isinstance(attend, PackedAttention):
        return None
    layout = attend.varlen_layout(context.mask, x_TD)
    gates = attention.gate1.flatten(), attention.gate2.flatten()
    out: Tensor = FusedBlockFunction.apply(
        x_TD, prompt_AD, *gates, block, attend, layout, context.rotary_T
    )
    return out


class FusedBlockFunction(Function):
    """Refers to the weights through the block: under ZeRO-3 they are gathered again for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        prompt_AD: Tensor,
        gate1_H: Tensor,
        gate2_H: Tensor,
        block: "Block",
        attend: PackedAttention,
        layout: VarlenLayout,
        rotary_T: Tensor,
    ) -> Tensor:
        attention, mlp = block.attention, block.feed_forward
        normed_TD, scale1 = norm(x_TD, block.attention_norm.weight, block.attention_norm.eps)
        q_THd, k_THd, v_THd = (
            attention.heads(linear(normed_TD, w.weight))
            for w in (attention.wq, attention.wk, attention.wv)
        )
        del normed_TD
        q_THd, k_THd = apply_rotary_emb_qk(q_THd, k_THd, rotary_T, 1.0)
        out_THd, kept = attend.forward(q_THd, k_THd, v_THd, gate2_H, layout)
        k_AHd, v_AHd = (
            attention.heads(linear(prompt_AD, w.weight)) for w in (attention.wk, attention.wv)
        )
        out_THd = adapter(out_THd, q_THd, k_AHd, v_AHd, gate1_H)
        h_TD = linear_add(x_TD, out_THd.flatten(-2), attention.wo.weight)
        del out_THd
        normed_TD, scale2 = norm(h_TD, block.ffn_norm.weight, block.ffn_norm.eps)
        a, b = linear(normed_TD, mlp.w1.weight), linear(normed_TD, mlp.w3.weight)
        del normed_TD
        ctx.save_for_backward(
            x_TD,
            scale1,
            q_THd,
            k_THd,
            v_THd,
            k_AHd,
            v_AHd,
            gate1_H,
            gate2_H,
            h_TD,
            scale2,
            a,
            b,
            *kept,
        )
        ctx.block, ctx.attend, ctx.layout, ctx.rotary = block, attend, layout, rotary_T
        return linear_add(h_TD, swiglu(a, b), mlp.w2.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (
            x_TD,
            scale1,
            q_THd,
            k_THd,
            v_THd,
            k_AHd,
            v_AHd,
            gate1_H,
            gate2_H,
            h_TD,
            scale2,
            a,
            b,
            *kept,
        ) = ctx.saved_tensors
        block, attention, mlp = ctx.block, ctx.block.attention, ctx.block.feed_forward
        da, db = swiglu_backward(linear(gradients[0], mlp.w2.weight.t()), a, b)
        dn_TD = linear_add(linear(da, mlp.w1.weight.t()), db, mlp.w3.weight.t())
        del da, db
        dh_TD = norm_backward(dn_TD, h_TD, scale2, block.ffn_norm.weight).add_(gradients[0])
        g_THd = attention.heads(linear(dh_TD, attention.wo.weight.t()))
        dq_THd, dk_THd, dv_THd, dgate2_H = ctx.attend.backward(
            g_THd, q_THd, k_THd, v_THd, gate2_H, tuple(kept), ctx.layout
        )
        more_THd, dk_AHd, dv_AHd, dgate1_H = adapter_backward(g_THd, q_THd, k_AHd, v_AHd, gate1_H)
        dq_THd, dk_THd = apply_rotary_emb_qk(more_THd.add_(dq_THd), dk_THd, ctx.rotary, -1.0)
        del g_THd, more_THd
        wq, wk, wv = (w.weight.t() for w in (attention.wq, attention.wk, attention.wv))
        dn_TD = linear_add(linear(dq_THd.flatten(-2), wq), dk_THd.flatten(-2), wk)
        dn_TD = linear_add(dn_TD, dv_THd.flatten(-2), wv)
        dx_TD = norm_backward(dn_TD, x_TD, scale1, block.attention_norm.weight).add_(dh_TD)
        dprompt_AD = linear_add(linear(dk_AHd.flatten(-2), wk), dv_AHd.flatten(-2), wv)
        return dx_TD, dprompt_AD, dgate1_H, dgate2_H, None, None, None, None
