"""A decoder block as one autograd Function: llama.Block with its gradient written out.

It computes what the modules compute, by the same functions in the same order, and saves the same
tensors. What it saves is the host's time: autograd's bookkeeping for sixteen Functions and the
small operations between them takes a host longer than a GPU takes for the block's matrix products
(benchmarks/LOG.md).
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from vico.model.attention.stream import StreamAttention
from vico.model.interfaces import Context, DecoderBlock
from vico.model.ops.autograd import linear, linear_add, rms_norm_backward
from vico.model.ops.fp8 import dequantized
from vico.model.ops.product_inputs import norm_input, swiglu_backward_input, swiglu_input
from vico.model.ops.prompt_heads import PromptHeads


def run_fused(
    block: DecoderBlock, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
) -> Tensor:
    """The block's output [T, D].

    For an adapted block under attention over the whole stream, with all rows as queries. With
    grouped heads only where that attention takes them.
    """
    assert isinstance(context.attend, StreamAttention), "see block_runners.py"
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
        attend: StreamAttention,
        layout: Any,
        rotary_T1h: Tensor,
    ) -> Tensor:
        attention, mlp = block.attention, block.feed_forward
        normed_TD, scale1 = norm_input(attention.wq, x_TD, block.attention_norm)
        q_THd = attention.heads(linear(normed_TD, attention.wq.weight))
        k_TJd = attention.heads(linear(normed_TD, attention.wk.weight))
        v_TJd = attention.heads(linear(normed_TD, attention.wv.weight))
        del normed_TD
        k_AJd = attention.heads(linear(prompt_AD, dequantized(attention.wk.weight)))
        v_AJd = attention.heads(linear(prompt_AD, dequantized(attention.wv.weight)))
        prompt = PromptHeads(k_AJd, v_AJd, gate1_H)
        inputs = (q_THd, k_TJd, v_TJd, gate2_H, prompt, rotary_T1h)
        out_THd, saved_by_attention = attend.forward_with_prompt(*inputs, layout)
        del q_THd, k_TJd, v_TJd, inputs
        h_TD = linear_add(x_TD, out_THd.flatten(-2), attention.wo.weight)
        del out_THd
        normed_TD, scale2 = norm_input(mlp.w1, h_TD, block.ffn_norm)
        a, b = linear(normed_TD, mlp.w1.weight), linear(normed_TD, mlp.w3.weight)
        del normed_TD
        ctx.save_for_backward(x_TD, scale1, h_TD, scale2, a, b, *saved_by_attention)
        ctx.block, ctx.attend, ctx.layout, ctx.rotary_T1h = block, attend, layout, rotary_T1h
        return linear_add(h_TD, swiglu_input(mlp.w2, a, b), mlp.w2.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        block: DecoderBlock = ctx.block
        attention, mlp = block.attention, block.feed_forward
        x_TD, scale1, h_TD, scale2, a, b, *saved_by_attention = ctx.saved_tensors
        # The feed-forward half.
        dh_TF = linear(gradients[0], mlp.w2.weight.t())
        da, db = swiglu_backward_input(mlp, dh_TF, a, b)
        dn_TD = linear_add(linear(da, mlp.w1.weight.t()), db, mlp.w3.weight.t())
        del dh_TF, da, db
        weight = block.ffn_norm.weight
        dh_TD = rms_norm_backward(dn_TD, h_TD, scale2, weight, gradients[0])
        # The attention half.
        g_THd = attention.heads(linear(dh_TD, attention.wo.weight.t()))
        dq_THd, dk_TJd, dv_TJd, dgate2_H, of_prompt = ctx.attend.backward_with_prompt(
            g_THd, tuple(saved_by_attention), ctx.rotary_T1h, ctx.layout
        )
        del g_THd
        wq, wk, wv = (w.weight.t() for w in (attention.wq, attention.wk, attention.wv))
        dn_TD = linear_add(linear(dq_THd.flatten(-2), wq), dk_TJd.flatten(-2), wk)
        dn_TD = linear_add(dn_TD, dv_TJd.flatten(-2), wv)
        dx_TD = rms_norm_backward(dn_TD, x_TD, scale1, block.attention_norm.weight, dh_TD)
        wk, wv = (dequantized(w.weight).t() for w in (attention.wk, attention.wv))
        dprompt_AD = linear_add(
            linear(of_prompt.k_AJd.flatten(-2), wk), of_prompt.v_AJd.flatten(-2), wv
        )
        return dx_TD, dprompt_AD, of_prompt.gate1_H, dgate2_H, None, None, None, None
