"""Logits of the whole vocabulary, where a loss alone is not enough: generation and comparison."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.config import DIVERGENCE_COPIES
from vico.model.ops.autograd import fp32_rows, linear, row_chunks

# As DIVERGENCE_COPIES, of `compare_predictions`: logits of both models in fp32, and in float64 a
# copy and two log-probabilities, 7 in all.
COMPARED_COPIES = 8


def vocabulary_logits(h_RD: Tensor, weight_WD: Tensor) -> Tensor:
    """h_RD W^T [R, W], multiplied and summed in fp32: a rounded logit could name another token."""
    (logits_RW,) = _logits([h_RD], weight_WD)
    return logits_RW


def _logits(states: Sequence[Tensor], weight_WD: Tensor, share: int = 1) -> list[Tensor]:
    """`vocabulary_logits` of each of `states`, by the same products.

    In half precision some rows of the weight are converted at a time, for all states: a `share`-th
    of HEAD_CHUNK_BYTES.
    """
    if weight_WD.dtype == torch.float32:
        return [linear(h_RD, weight_WD) for h_RD in states]
    size, width = weight_WD.shape
    chunk = fp32_rows(width, weight_WD, share)
    inputs = [h_RD.float() for h_RD in states]
    logits = [h_RD.new_empty(len(h_RD), size) for h_RD in inputs]
    for first in range(0, size, chunk):
        ids = slice(first, min(first + chunk, size))
        _fill(logits, inputs, weight_WD, ids)
    return logits


def _fill(
    logits: Sequence[Tensor], inputs: Sequence[Tensor], weight_WD: Tensor, ids: slice
) -> None:
    """The columns `ids`. The converted part of the weight is freed before the next is made."""
    part_CD = weight_WD[ids].float()
    for logits_RW, h_RD in zip(logits, inputs, strict=True):
        logits_RW[:, ids] = linear(h_RD, part_CD)


class Divergence(Function):
    """KL(frozen || adapted) [N] of the tokens that hidden states [N, D] predict, fp32, in nats.

    sum_w p_w (log p_w - log q_w) with p of the frozen model, whose gradient by the adapted logits
    is q - p: forward computes (q - p) W, and [N, D] is saved. Logits are held for some rows at a
    time: with all that is made of them, HEAD_CHUNK_BYTES at most.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, frozen_ND: Tensor, weight_WD: Tensor) -> Tensor:
        divergences_N = h_ND.new_empty(len(h_ND), dtype=torch.float32)
        difference_ND = torch.empty_like(h_ND)
        for chunk in row_chunks(len(h_ND), weight_WD, DIVERGENCE_COPIES):
            states = (frozen_ND[chunk], h_ND[chunk])
            divergences_N[chunk], difference_ND[chunk] = _divergences(states, weight_WD)
        ctx.save_for_backward(difference_ND)
        return divergences_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (difference_ND,) = ctx.saved_tensors
        return (difference_ND * gradients[0][:, None]).to(difference_ND.dtype), None, None


def _divergences(states: Sequence[Tensor], weight_WD: Tensor) -> tuple[Tensor, Tensor]:
    """(KL [C], its gradient [C, D]) of the (frozen, adapted) model's states [C, D]."""
    logits = _logits(states, weight_WD, DIVERGENCE_COPIES)
    # A model's logits are freed with its log-probabilities made.
    p_CW, q_CW = logits.pop(0).log_softmax(dim=-1), logits.pop().log_softmax(dim=-1)
    weights_CW = p_CW.exp()
    divergences_C = p_CW.sub_(q_CW).mul_(weights_CW).sum(dim=-1)
    difference_CW = q_CW.exp_().sub_(weights_CW).to(weight_WD.dtype)
    return divergences_C, difference_CW @ weight_WD


def compare_predictions(
    frozen_RD: Tensor, adapted_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor
) -> Tensor:
    """How two models predict tokens ids_N at rows rows_N, float64 [6, N].

    The cross-entropy of the frozen and of the adapted model; KL(frozen || adapted) of what they
    predict, sum_w p_w (log p_w - log q_w) in nats (Kullback and Leibler, 1951); 1 where both find
    the same token the likeliest; and 1 where this is the target, of the frozen and of the adapted
    model. Logits are held for some targets at a time: with all that is made of them,
    HEAD_CHUNK_BYTES at most.
    """
    parts = [frozen_RD.new_empty(6, 0, dtype=torch.float64)]
    for chunk in row_chunks(len(ids_N), weight_WD, COMPARED_COPIES):
        states = [h_RD[rows_N[chunk]] for h_RD in (frozen_RD, adapted_RD)]
        parts.append(_compared(states, weight_WD, ids_N[chunk]))
    return torch.cat(parts, dim=1)


def _compared(states: Sequence[Tensor], weight_WD: Tensor, ids_C: Tensor) -> Tensor:
    """`compare_predictions` [6, C] of the (frozen, adapted) model's states [C, D]."""
    logits = _logits(states, weight_WD, COMPARED_COPIES)
    # As in _divergences.
    p_CW = logits.pop(0).double().log_softmax(dim=-1)
    q_CW = logits.pop().double().log_softmax(dim=-1)
    ids_C1 = ids_C[:, None]
    p_top_C, q_top_C = p_CW.argmax(dim=-1), q_CW.argmax(dim=-1)
    losses = [-log_CW.gather(1, ids_C1)[:, 0] for log_CW in (p_CW, q_CW)]
    weights_CW = p_CW.exp()
    divergences_C = p_CW.sub_(q_CW).mul_(weights_CW).sum(dim=-1)
    hits = [p_top_C == q_top_C, p_top_C == ids_C, q_top_C == ids_C]
    return torch.stack([*losses, divergences_C, *(hit.double() for hit in hits)])
