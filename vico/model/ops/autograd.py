"""Autograd functions that keep for backward only what a frozen backbone needs, with the gradient written out.

Plain autograd keeps the inputs of frozen products, the fp32 copies of norms and the logits; at 7B that is 150-195 KiB
per token and layer. With these it is 91: of the residual stream twice, q, k, v, the attention's output, w1 x and w3 x.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vico.model.config import HEAD_CHUNK_BYTES
from vico.model.ops import triton_ops

# oneDNN's fp32 product, which torch.compile uses too: 10 % faster than MKL's, the default, at these shapes. Private: guarded.
_ONEDNN_LINEAR = (
    getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if torch.backends.mkldnn.is_available()
    else None
)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T."""
    if (
        _ONEDNN_LINEAR is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.ndim == 2
        and len(x)
    ):
        return _ONEDNN_LINEAR(x, weight, None, "none", [], "")
    return x @ weight.t()


def linear_add(base: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """base + x W^T; on a GPU as one kernel, which rounds once."""
    return torch.addmm(base, x, weight.t()) if x.is_cuda else linear(x, weight).add_(base)


class FrozenLinearFunction(Function):
    """x W^T. Keeps a reference to the parameter, not its value: under ZeRO-3 the value is gathered again for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return linear(gradients[0], ctx.weight.t()) if ctx.needs_input_grad[0] else None, None


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w x / rms(x) over the last dimension, 1 / rms(x)), in fp32."""
    if triton_ops.serve(x):
        return triton_ops.norm(x, weight, eps)
    mean_square = (
        torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        .square_()
        .div_(x.shape[-1])
    )
    scale = mean_square.add_(eps).rsqrt_()
    return (x.float() * scale).to(x.dtype).mul_(weight), scale


def norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    if triton_ops.serve(x):
        return triton_ops.norm_backward(gradient, x, scale, weight)
    gradient, x_hat = (gradient * weight).float(), x.float() * scale
    along = (gradient * x_hat).mean(dim=-1, keepdim=True)
    return gradient.addcmul_(x_hat, along, value=-1).mul_(scale).to(x.dtype)


class FrozenRMSNorm(Function):
    """w x / rms(x); keeps x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = norm(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        return norm_backward(gradients[0], x, scale, ctx.weight), None, None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b."""
    return triton_ops.swiglu(a, b) if triton_ops.serve(a) else F.silu(a).mul_(b)


def swiglu_backward(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if triton_ops.serve(a):
        return triton_ops.swiglu_backward(gradient, a, b)
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    # d silu / da = sigmoid + silu (1 - sigmoid)
    slope = sigmoid.addcmul(silu, 1 - sigmoid)
    return slope.mul_(gradient).mul_(b), silu.mul_(gradient)


class SwiGLU(Function):
    """silu(a) * b; keeps a and b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return swiglu(a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return swiglu_backward(gradients[0], a, b)


def rotate(x_THd: Tensor, rotary_T1h: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (x0, x1), (x2, x3), ..., in fp32: each pair is a complex number that turns."""
    pairs = torch.view_as_complex(x_THd.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary_T1h).flatten(-2).to(x_THd.dtype)


def apply_rotary_emb(x_THd: Tensor, rotary_T1h: Tensor, sign: float) -> Tensor:
    """`rotate` (sign 1), or back (-1), which is its gradient."""
    if triton_ops.serve_heads(x_THd):
        return triton_ops.rotate(x_THd, torch.view_as_real(rotary_T1h), sign)
    return rotate(x_THd, rotary_T1h if sign > 0 else rotary_T1h.conj())


def apply_rotary_emb_qk(
    q_THd: Tensor, k_THd: Tensor, rotary_T1h: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    if triton_ops.serve_heads(q_THd):
        return triton_ops.rotate_qk(q_THd, k_THd, torch.view_as_real(rotary_T1h), sign)
    return apply_rotary_emb(q_THd, rotary_T1h, sign), apply_rotary_emb(k_THd, rotary_T1h, sign)


class RotaryEmbedding(Function):
    """`rotate`, keeping nothing but the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, rotary_T1h: Tensor) -> Tensor:
        ctx.rotary = rotary_T1h
        return apply_rotary_emb(x_THd, rotary_T1h, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return apply_rotary_emb(gradients[0], ctx.rotary, -1.0), None


def adapter(
    base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
) -> Tensor:
    """base + tanh(gate1_h) softmax_a(q.K_a / sqrt d) V, the same few keys for every row."""
    if triton_ops.serve_heads(q_THd):
        return triton_ops.adapter(base_THd, q_THd, k_AHd, v_AHd, gate1_H.tanh())
    weights_HTA = _adapter_weights(q_THd, k_AHd) * gate1_H.tanh()[:, None, None]
    return base_THd + torch.matmul(weights_HTA.to(v_AHd.dtype), v_AHd.transpose(0, 1)).transpose(
        0, 1
    )


def adapter_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, K, V and gate1; that of `base` is the gradient itself."""
    gate_H = gate1_H.tanh()
    backward = triton_ops.adapter_backward if triton_ops.serve_heads(q_THd) else _adapter_backward
    q_gradient, k_gradient, v_gradient, gate_gradient = backward(g_THd, q_THd, k_AHd, v_AHd, gate_H)
    return q_gradient, k_gradient, v_gradient, gate_gradient * (1 - gate_H.square())


def _adapter_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, K, V and of the gate, tanh(gate1)."""
    g_HTd, gate_H11 = g_THd.transpose(0, 1), gate_H[:, None, None]
    weights_HTA = _adapter_weights(q_THd, k_AHd)
    # Gradient with respect to the softmax's output, before the gate.
    along_HTA = torch.matmul(g_HTd, v_AHd.permute(1, 2, 0)).float()
    mean_HT1 = (weights_HTA * along_HTA).sum(dim=-1, keepdim=True)
    scores_HTA = (weights_HTA * (along_HTA - mean_HT1) * (gate_H11 / q_THd.shape[-1] ** 0.5)).to(
        q_THd.dtype
    )
    q_gradient = torch.matmul(scores_HTA, k_AHd.transpose(0, 1)).transpose(0, 1)
    k_gradient = torch.matmul(scores_HTA.transpose(1, 2), q_THd.transpose(0, 1)).transpose(0, 1)
    v_gradient = torch.matmul(
        (weights_HTA * gate_H11).to(g_HTd.dtype).transpose(1, 2), g_HTd
    ).transpose(0, 1)
    return q_gradient, k_gradient, v_gradient, mean_HT1.sum(dim=(1, 2))


def _adapter_weights(q_THd: Tensor, k_AHd: Tensor) -> Tensor:
    scores_HTA = torch.matmul(q_THd.transpose(0, 1), k_AHd.permute(1, 2, 0)).float()
    return scores_HTA.mul_(q_THd.shape[-1] ** -0.5).softmax(dim=-1)


class AdapterAttention(Function):
    """`adapter`; keeps q and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q_THd, k_AHd, v_AHd, gate1_H)
        return adapter(base_THd, q_THd, k_AHd, v_AHd, gate1_H)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *adapter_backward(gradients[0], *ctx.saved_tensors)


class FusedLinearCrossEntropy(Function):
    """Losses [N] of targets (heads_N, ids_N) under softmax(h_RD W^T), in chunks of rows; no logits are kept.

    A target's gradient is its loss's gradient times (softmax W - W[id]), which forward can already make: [N, D] is kept.
    """

    @staticmethod
    def forward(
        ctx: Any, h_RD: Tensor, weight_VD: Tensor, heads_N: Tensor, ids_N: Tensor
    ) -> Tensor:
        num_rows = h_RD.shape[0]
        chunk = max(
            1, HEAD_CHUNK_BYTES["cuda" if h_RD.is_cuda else "cpu"] // (4 * weight_VD.shape[0])
        )
        normalizer_R = h_RD.new_empty(num_rows, dtype=torch.float32)
        expected_RD = torch.empty_like(h_RD) if ctx.needs_input_grad[0] else None
        for first in range(0, num_rows, chunk):
            rows = slice(first, first + chunk)
            logits = linear(h_RD[rows], weight_VD).float()
            largest = logits.amax(dim=-1, keepdim=True)
            # exp and sum by hand: torch.logsumexp takes 15 times as long on a CPU.
            exponentials = logits.sub_(largest).exp_()
            total = exponentials.sum(dim=-1, keepdim=True)
            normalizer_R[rows] = (total.log() + largest).squeeze(-1)
            if expected_RD is not None:
                expected_RD[rows] = exponentials.div_(total).to(weight_VD.dtype) @ weight_VD
        chosen_ND = weight_VD[ids_N]
        target_logits_N = (h_RD[heads_N].float() * chosen_ND.float()).sum(dim=-1)
        if expected_RD is not None:
            ctx.save_for_backward(expected_RD[heads_N].sub_(chosen_ND), heads_N)
            ctx.num_rows = num_rows
        return normalizer_R[heads_N] - target_logits_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference_ND, heads_N = ctx.saved_tensors
        scaled_ND = difference_ND * gradients[0].to(difference_ND.dtype)[:, None]
        # Each row has one target where nothing is shared; adding is right where several have the same row.
        return (
            scaled_ND.new_zeros(ctx.num_rows, scaled_ND.shape[1]).index_add_(0, heads_N, scaled_ND),
            None,
            None,
            None,
        )
