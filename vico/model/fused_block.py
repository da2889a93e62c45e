"""A decoder block as one autograd Function: llama.Block with its gradient written out.

It computes what the modules compute, by the same functions in the same order, and saves the same
tensors. What it saves is the host's time: autograd's bookkeeping for sixteen Functions and the
small operations between them takes a host longer than a GPU takes for the block's matrix products
(benchmarks/LOG.md).
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from vico.model.attention.segment_layout import VarlenLayout
from vico.model.attention.varlen import PackedAttention
from vico.model.interfaces import Context, DecoderBlock
from vico.model.ops.autograd import (
    adapter_attention,
    adapter_attention_backward,
    apply_rotary_emb_qk,
    linear,
    linear_add,
    rms_norm_backward,
)
from vico.model.ops.fp8 import dequantized
from vico.model.ops.product_inputs import norm_input, swiglu_backward_input, swiglu_input


def run_fused(
    block: DecoderBlock, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
) -> Tensor:
    """The block's output [T, D].

    For an adapted block with a key head per query head, under packed attention, with all rows as
    queries.
    """
    assert isinstance(context.attend, PackedAttention), "see block_runners.py"
    assert prompt_AD is not None and context.mask.query_rows is None, "see block_runners.py"
    layout = context.attend.layout(context.mask, x_TD)
    gates = block.attention.gate1.flatten(), block.attention.gate2.flatten()
    out: Tensor = FusedBlockFunction.apply(
        x_TD, prompt_AD, *gates, block, context.attend, layout, context.rotary_T1h
    )
    return out


class FusedBlockFunction(Function):
    """Holds the block, not its weights: under ZeRO-3 they are gathered again for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        prompt_AD: Tensor,
        gate1_H: Tensor,
        gate2_H: Tensor,
        block: DecoderBlock,
        attend: PackedAttention,
        layout: VarlenLayout,
        rotary_T1h: Tensor,
    ) -> Tensor:
        attention, mlp = block.attention, block.feed_forward
        normed_TD, scale1 = norm_input(attention.wq, x_TD, block.attention_norm)
        q_THd = attention.heads(linear(normed_TD, attention.wq.weight))
        k_THd = attention.heads(linear(normed_TD, attention.wk.weight))
        v_THd = attention.heads(linear(normed_TD, attention.wv.weight))
        del normed_TD
        q_THd, k_THd = apply_rotary_emb_qk(q_THd, k_THd, rotary_T1h, 1.0)
        out_THd, saved_by_kernel = attend.forward(q_THd, k_THd, v_THd, gate2_H, layout)
        k_AHd = attention.heads(linear(prompt_AD, dequantized(attention.wk.weight)))
        v_AHd = attention.heads(linear(prompt_AD, dequantized(attention.wv.weight)))
        out_THd = adapter_attention(out_THd, q_THd, k_AHd, v_AHd, gate1_H)
        h_TD = linear_add(x_TD, out_THd.flatten(-2), attention.wo.weight)
        del out_THd
        normed_TD, scale2 = norm_input(mlp.w1, h_TD, block.ffn_norm)
        a, b = linear(normed_TD, mlp.w1.weight), linear(normed_TD, mlp.w3.weight)
        del normed_TD
        saved_by_attention = (x_TD, scale1, q_THd, k_THd, v_THd, k_AHd, v_AHd, gate1_H, gate2_H)
        ctx.save_for_backward(*saved_by_attention, h_TD, scale2, a, b, *saved_by_kernel)
        ctx.block, ctx.attend, ctx.layout, ctx.rotary_T1h = block, attend, layout, rotary_T1h
        return linear_add(h_TD, swiglu_input(mlp.w2, a, b), mlp.w2.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block: DecoderBlock = ctx.block
        attention, mlp = block.attention, block.feed_forward
        x_TD, scale1, q_THd, k_THd, v_THd, k_AHd, v_AHd, gate1_H, gate2_H, *rest = ctx.saved_tensors
        h_TD, scale2, a, b, *saved_by_kernel = rest
        # The feed-forward half.
        dh_TF = linear(gradients[0], mlp.w2.weight.t())
        da, db = swiglu_backward_input(mlp.w1, dh_TF, a, b)
        dn_TD = linear_add(linear(da, mlp.w1.weight.t()), db, mlp.w3.weight.t())
        del dh_TF, da, db
        dh_TD = rms_norm_backward(dn_TD, h_TD, scale2, block.ffn_norm.weight).add_(gradients[0])
        # The attention half.
        g_THd = attention.heads(linear(dh_TD, attention.wo.weight.t()))
        dq_THd, dk_THd, dv_THd, dgate2_H = ctx.attend.backward(
            g_THd, q_THd, k_THd, v_THd, gate2_H, tuple(saved_by_kernel), ctx.layout
        )
        more_dq_THd, dk_AHd, dv_AHd, dgate1_H = adapter_attention_backward(
            g_THd, q_THd, k_AHd, v_AHd, gate1_H
        )
        more_dq_THd.add_(dq_THd)
        dq_THd, dk_THd = apply_rotary_emb_qk(more_dq_THd, dk_THd, ctx.rotary_T1h, -1.0)
        del g_THd, more_dq_THd
        wq, wk, wv = (w.weight.t() for w in (attention.wq, attention.wk, attention.wv))
        dn_TD = linear_add(linear(dq_THd.flatten(-2), wq), dk_THd.flatten(-2), wk)
        dn_TD = linear_add(dn_TD, dv_THd.flatten(-2), wv)
        dx_TD = rms_norm_backward(dn_TD, x_TD, scale1, block.attention_norm.weight).add_(dh_TD)
        wk, wv = (dequantized(w.weight).t() for w in (attention.wk, attention.wv))
        dprompt_AD = linear_add(linear(dk_AHd.flatten(-2), wk), dv_AHd.flatten(-2), wv)
        return dx_TD, dprompt_AD, dgate1_H, dgate2_H, None, None, None, None
