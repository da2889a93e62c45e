"""Autograd functions that save for backward only what a frozen backbone needs.

Plain autograd saves the inputs of frozen matrix products, the fp32 copies of norms and the logits;
at 7B that is 150-195 KiB per token and layer. With these functions it is 91: the residual stream
twice, q, k, v, the attention's output, w1 x and w3 x. Where a GPU has Triton, kernels
(triton_ops.py) take the place of the plain operations here.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vico.model.config import HEAD_CHUNK_BYTES
from vico.model.ops import fp8, triton_ops
from vico.model.ops.fp8 import Rows8, Weight8

# In the place of a sum of exponentials that is 0: the smallest normal number of fp32.
TINY = torch.finfo(torch.float32).tiny
FP32_BYTES = 4

# oneDNN's fp32 product, which torch.compile uses too: at these shapes 10 % faster than MKL's, the
# default. It is private, so it may be missing.
_ONEDNN_LINEAR = None
if torch.backends.mkldnn.is_available():
    _ONEDNN_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


def linear(x: Tensor | Rows8, weight: Tensor | Weight8) -> Tensor:
    """x W^T. Only x of a quantized weight may be quantized; it is quantized where it is not yet."""
    if isinstance(weight, Weight8):
        return fp8.scaled_product(x, weight)
    assert isinstance(x, Tensor)
    is_cpu_fp32 = x.device.type == "cpu" and x.dtype == torch.float32
    if _ONEDNN_LINEAR is not None and is_cpu_fp32 and x.ndim == 2 and len(x):
        return _ONEDNN_LINEAR(x, weight, None, "none", [], "")
    return x @ weight.t()


def linear_add(base: Tensor, x: Tensor | Rows8, weight: Tensor | Weight8) -> Tensor:
    """base + x W^T; on a GPU as one kernel, which rounds once, if the weight is not quantized."""
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and x.is_cuda:
        return torch.addmm(base, x, weight.t())
    return linear(x, weight).add_(base)


class FrozenLinearFunction(Function):
    """x W^T.

    Keeps a reference to the parameter, not its value: under ZeRO-3 it is gathered again for
    backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | Weight8) -> Tensor:
        ctx.weight = weight
        return linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return linear(gradients[0], ctx.weight.t()), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w x / rms(x) over the last dimension, 1 / rms(x) in fp32) (Zhang and Sennrich, 2019)."""
    if triton_ops.can_run(x):
        return triton_ops.rms_norm(x, weight, eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    mean_square = norm.square_().div_(x.shape[-1])
    scale = mean_square.add_(eps).rsqrt_()
    return (x.float() * scale).to(x.dtype).mul_(weight), scale


def rms_norm_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None = None
) -> Tensor:
    """x's gradient, plus `residual`: the gradient of x past the norm."""
    if triton_ops.can_run(x):
        return triton_ops.rms_norm_backward(gradient, x, scale, weight, residual)
    gradient, x_hat = (gradient * weight).float(), x.float() * scale
    along = (gradient * x_hat).mean(dim=-1, keepdim=True)
    of_x = gradient.addcmul_(x_hat, along, value=-1).mul_(scale).to(x.dtype)
    return of_x if residual is None else of_x.add_(residual)


class FrozenRMSNorm(Function):
    """`rms_norm`; saves x and one number per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, scale = ctx.saved_tensors
        return rms_norm_backward(gradients[0], x, scale, ctx.weight), None, None


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b (Shazeer, 2020)."""
    return triton_ops.swiglu(a, b) if triton_ops.can_run(a) else F.silu(a).mul_(b)


def swiglu_backward(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if triton_ops.can_run(a):
        return triton_ops.swiglu_backward(gradient, a, b)
    sigmoid = a.sigmoid()
    silu = a * sigmoid
    # d silu / da = sigmoid + silu (1 - sigmoid)
    slope = sigmoid.addcmul(silu, 1 - sigmoid)
    return slope.mul_(gradient).mul_(b), silu.mul_(gradient)


class SwiGLU(Function):
    """`swiglu`; saves a and b."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return swiglu(a, b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return swiglu_backward(gradients[0], a, b)


def rotate(x_THd: Tensor, rotary_T1h: Tensor) -> Tensor:
    """Rotary embedding in fp32.

    The pairs (x0, x1), (x2, x3), ... are complex numbers, multiplied by those of the angles.
    """
    pairs = torch.view_as_complex(x_THd.float().contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary_T1h).flatten(-2).to(x_THd.dtype)


def apply_rotary_emb(x_THd: Tensor, rotary_T1h: Tensor, sign: float) -> Tensor:
    """`rotate` (sign 1), or its inverse (-1), which is its gradient."""
    if triton_ops.can_run_on_heads(x_THd):
        return triton_ops.apply_rotary_emb(x_THd, torch.view_as_real(rotary_T1h), sign)
    return rotate(x_THd, rotary_T1h if sign > 0 else rotary_T1h.conj())


def apply_rotary_emb_qk(
    q_THd: Tensor, k_THd: Tensor, rotary_T1h: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb` of both; in one launch where there is a key head per query head."""
    if q_THd.shape == k_THd.shape and triton_ops.can_run_on_heads(q_THd):
        angles_T1h2 = torch.view_as_real(rotary_T1h)
        return triton_ops.apply_rotary_emb_qk(q_THd, k_THd, angles_T1h2, sign)
    return apply_rotary_emb(q_THd, rotary_T1h, sign), apply_rotary_emb(k_THd, rotary_T1h, sign)


class RotaryEmbedding(Function):
    """`rotate`; saves nothing but the angles, which all layers share."""

    @staticmethod
    def forward(ctx: Any, x_THd: Tensor, rotary_T1h: Tensor) -> Tensor:
        ctx.rotary = rotary_T1h
        return apply_rotary_emb(x_THd, rotary_T1h, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return apply_rotary_emb(gradients[0], ctx.rotary, -1.0), None


def adapter_attention(
    base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
) -> Tensor:
    """base + tanh(gate1_h) softmax_a(q.K_a / sqrt d) V, the same few keys for every row."""
    if triton_ops.can_run_on_heads(q_THd):
        return triton_ops.adapter_attention(base_THd, q_THd, k_AHd, v_AHd, gate1_H.tanh())
    weights_HTA = _adapter_weights(q_THd, k_AHd) * gate1_H.tanh()[:, None, None]
    out_HTd = torch.matmul(weights_HTA.to(v_AHd.dtype), v_AHd.transpose(0, 1))
    return base_THd + out_HTd.transpose(0, 1)


def adapter_attention_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, K, V and gate1; that of `base` is the gradient itself."""
    gate_H = gate1_H.tanh()
    backward = _adapter_attention_backward
    if triton_ops.can_run_on_heads(q_THd):
        backward = triton_ops.adapter_attention_backward
    dq_THd, dk_AHd, dv_AHd, dgate_H = backward(g_THd, q_THd, k_AHd, v_AHd, gate_H)
    # d tanh(x) / dx = 1 - tanh(x)^2
    return dq_THd, dk_AHd, dv_AHd, dgate_H * (1 - gate_H.square())


def _adapter_attention_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, K, V and of the gate, tanh(gate1)."""
    g_HTd, gate_H11 = g_THd.transpose(0, 1), gate_H[:, None, None]
    weights_HTA = _adapter_weights(q_THd, k_AHd)
    # The gradient with respect to the softmax's weights, before the gate.
    dweights_HTA = torch.matmul(g_HTd, v_AHd.permute(1, 2, 0)).float()
    mean_HT1 = (weights_HTA * dweights_HTA).sum(dim=-1, keepdim=True)
    factor_H11 = gate_H11 / q_THd.shape[-1] ** 0.5
    dscores_HTA = (weights_HTA * (dweights_HTA - mean_HT1) * factor_H11).to(q_THd.dtype)
    dq_HTd = torch.matmul(dscores_HTA, k_AHd.transpose(0, 1))
    dk_HAd = torch.matmul(dscores_HTA.transpose(1, 2), q_THd.transpose(0, 1))
    gated_HTA = (weights_HTA * gate_H11).to(g_HTd.dtype)
    dv_HAd = torch.matmul(gated_HTA.transpose(1, 2), g_HTd)
    dgate_H = mean_HT1.sum(dim=(1, 2))
    return dq_HTd.transpose(0, 1), dk_HAd.transpose(0, 1), dv_HAd.transpose(0, 1), dgate_H


def _adapter_weights(q_THd: Tensor, k_AHd: Tensor) -> Tensor:
    scores_HTA = torch.matmul(q_THd.transpose(0, 1), k_AHd.permute(1, 2, 0)).float()
    return scores_HTA.mul_(q_THd.shape[-1] ** -0.5).softmax(dim=-1)


class AdapterAttention(Function):
    """`adapter_attention`; saves q and the prompt's keys and values, and recomputes the rest."""

    @staticmethod
    def forward(
        ctx: Any, base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate1_H: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q_THd, k_AHd, v_AHd, gate1_H)
        return adapter_attention(base_THd, q_THd, k_AHd, v_AHd, gate1_H)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients[0], *adapter_attention_backward(gradients[0], *ctx.saved_tensors)


def linear_cross_entropy(h_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
    """Cross-entropy [N], fp32, of tokens ids_N at rows rows_N of h_RD W^T, without keeping logits.

    The product runs in chunks of rows.
    """
    is_half = h_RD.dtype != torch.float32
    function: type[Function] = HalfLinearCrossEntropy if is_half else FusedLinearCrossEntropy
    losses_N: Tensor = function.apply(h_RD, weight_WD, rows_N, ids_N)
    return losses_N


def fp32_rows(width: int, weight: Tensor, share: int = 1) -> int:
    """How many rows of `width` fp32 numbers a `share`-th of HEAD_CHUNK_BYTES holds; 1 or more."""
    chunk_bytes = HEAD_CHUNK_BYTES["cuda" if weight.is_cuda else "cpu"]
    return max(1, chunk_bytes // (FP32_BYTES * share * width))


def row_chunks(num_rows: int, weight_WD: Tensor, share: int = 1) -> Iterator[slice]:
    """Rows whose logits are held at a time: a `share`-th of HEAD_CHUNK_BYTES."""
    chunk = fp32_rows(weight_WD.shape[0], weight_WD, share)
    for first in range(0, num_rows, chunk):
        yield slice(first, min(first + chunk, num_rows))


def _exponentials(logits_CW: Tensor, max_C1: Tensor) -> Tensor:
    """exp(logits - max), in place: by hand, as torch.logsumexp takes 15 times as long on a CPU."""
    return logits_CW.sub_(max_C1).exp_()


def _half_exponentials(h_CD: Tensor, weight_WD: Tensor) -> tuple[Tensor, Tensor]:
    """(exp(logits - max), max), in fp32, with the largest logit of each row in fp32 as well.

    Where it is not the target's, the loss moves by as much as this one logit is rounded.
    """
    logits_CW = linear(h_CD, weight_WD).float()
    max_C1, top_C1 = logits_CW.max(dim=-1, keepdim=True)
    top_logits_C = _exact_logits(h_CD, weight_WD[top_C1.squeeze(-1)])
    return _exponentials(logits_CW.scatter_(1, top_C1, top_logits_C[:, None]), max_C1), max_C1


def _exact_logits(h_ND: Tensor, weights_ND: Tensor) -> Tensor:
    """h . W[id], multiplied and summed in fp32."""
    return (h_ND.float() * weights_ND.float()).sum(dim=-1)


def _sum_by_row(gradients_ND: Tensor, rows_N: Tensor, num_rows: int) -> Tensor:
    """Added, because several targets may have the same row."""
    zeros_RD = gradients_ND.new_zeros(num_rows, gradients_ND.shape[1])
    return zeros_RD.index_add_(0, rows_N, gradients_ND)


class FusedLinearCrossEntropy(Function):
    """`linear_cross_entropy` in fp32.

    A target's gradient is its loss's gradient times (softmax W - W[id]), which forward can already
    compute: [N, D] is saved.
    """

    @staticmethod
    def forward(ctx: Any, h_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
        normalizer_R = h_RD.new_empty(len(h_RD))
        expected_RD = torch.empty_like(h_RD) if ctx.needs_input_grad[0] else None
        for rows in row_chunks(len(h_RD), weight_WD):
            logits_CW = linear(h_RD[rows], weight_WD)
            max_C1 = logits_CW.amax(dim=-1, keepdim=True)
            exponentials_CW = _exponentials(logits_CW, max_C1)
            total_C1 = exponentials_CW.sum(dim=-1, keepdim=True)
            normalizer_R[rows] = (total_C1.log() + max_C1).squeeze(-1)
            if expected_RD is not None:
                expected_RD[rows] = exponentials_CW.div_(total_C1) @ weight_WD
        targets_ND = weight_WD[ids_N]
        target_logits_N = _exact_logits(h_RD[rows_N], targets_ND)
        if expected_RD is not None:
            ctx.save_for_backward(expected_RD[rows_N].sub_(targets_ND), rows_N)
            ctx.num_rows = len(h_RD)
        return normalizer_R[rows_N] - target_logits_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference_ND, rows_N = ctx.saved_tensors
        scaled_ND = difference_ND * gradients[0][:, None]
        return _sum_by_row(scaled_ND, rows_N, ctx.num_rows), None, None, None


class HalfLinearCrossEntropy(Function):
    """`linear_cross_entropy` in bf16 or fp16, whose products round the logits.

    A confident token's loss is a small difference of large logits, of which one must not be rounded
    where the other is not. So the target is left out of the sum over rounded logits. With l the
    logits of the other tokens, t the target's in fp32, and p the target's probability:

        loss = log(sum exp l + exp t) - t = softplus(log sum exp l - t) >= 0
        d loss / d h = (1 - p) (softmax(l) W - W[id])

    [N, D] is saved, the difference in the last brackets, and [N], its factor.
    """

    @staticmethod
    def forward(ctx: Any, h_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return _half_losses(h_RD, weight_WD, rows_N, ids_N)
        losses_N = h_RD.new_empty(len(rows_N), dtype=torch.float32)
        difference_ND = h_RD.new_empty(len(rows_N), h_RD.shape[1])
        for part in row_chunks(len(rows_N), weight_WD):
            # A row for each target. In training no row has two.
            chunk = _half_chunk(h_RD[rows_N[part]], weight_WD, ids_N[part])
            losses_N[part], difference_ND[part] = chunk
        # 1 - p = 1 - exp(-loss)
        ctx.save_for_backward(difference_ND, -torch.expm1(-losses_N), rows_N)
        ctx.num_rows = len(h_RD)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        difference_ND, factor_N, rows_N = ctx.saved_tensors
        factor_N1 = (gradients[0] * factor_N)[:, None]
        # Multiplied in fp32 and rounded once, without a whole fp32 tensor on a GPU.
        scaled_ND = torch.mul(difference_ND, factor_N1, out=torch.empty_like(difference_ND))
        return _sum_by_row(scaled_ND, rows_N, ctx.num_rows), None, None, None


def _half_chunk(h_CD: Tensor, weight_WD: Tensor, ids_C: Tensor) -> tuple[Tensor, Tensor]:
    """(losses [C], softmax(l) W - W[id] [C, D]) of targets with a row each."""
    exponentials_CW, max_C1 = _half_exponentials(h_CD, weight_WD)
    exponentials_CW.scatter_(1, ids_C[:, None], 0.0)
    others_C1 = exponentials_CW.sum(dim=-1, keepdim=True)
    targets_CD = weight_WD[ids_C]
    log_others_C = _log_others(others_C1, max_C1).squeeze(-1)
    losses_C = F.softplus(log_others_C - _exact_logits(h_CD, targets_CD))
    weights_CW = exponentials_CW.div_(others_C1.clamp_(min=TINY)).to(weight_WD.dtype)
    return losses_C, (weights_CW @ weight_WD).sub_(targets_CD)


def _half_losses(h_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor) -> Tensor:
    """The losses of HalfLinearCrossEntropy; each row's logits are computed once."""
    log_others_N = h_RD.new_empty(len(rows_N), dtype=torch.float32)
    for rows in row_chunks(len(h_RD), weight_WD):
        exponentials_CW, max_C1 = _half_exponentials(h_RD[rows], weight_WD)
        total_C1 = exponentials_CW.sum(dim=-1, keepdim=True)
        # By a mask over all targets: a GPU does not tell the host how many are in this chunk.
        is_here_N = (rows_N >= rows.start) & (rows_N < rows.stop)
        places_N = (rows_N - rows.start).clamp(0, rows.stop - rows.start - 1)
        others_N = total_C1[places_N, 0] - exponentials_CW[places_N, ids_N]
        log_here_N = _log_others(others_N, max_C1[places_N, 0])
        log_others_N = torch.where(is_here_N, log_here_N, log_others_N)
    return F.softplus(log_others_N - _exact_logits(h_RD[rows_N], weight_WD[ids_N]))


def _log_others(others: Tensor, max_logit: Tensor) -> Tensor:
    """log sum exp of all logits but the target's."""
    return others.clamp(min=TINY).log() + max_logit
