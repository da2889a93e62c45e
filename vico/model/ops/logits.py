"""Logits of the whole vocabulary, where a loss alone is not enough: generation and comparison."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from vico.model.config import HEAD_CHUNK_BYTES
from vico.model.ops.autograd import linear, row_chunks


def vocabulary_logits(h_RD: Tensor, weight_WD: Tensor) -> Tensor:
    """h_RD W^T [R, W], multiplied and summed in fp32: a rounded logit could name another token.

    In half precision some rows of the weight are converted at a time.
    """
    if h_RD.dtype == torch.float32:
        return linear(h_RD, weight_WD)
    chunk_bytes = HEAD_CHUNK_BYTES["cuda" if weight_WD.is_cuda else "cpu"]
    chunk = max(1, chunk_bytes // (4 * weight_WD.shape[1]))
    h_RD = h_RD.float()
    return torch.cat([linear(h_RD, part.float()) for part in weight_WD.split(chunk)], dim=1)


class Divergence(Function):
    """KL(frozen || adapted) [N] of the tokens that hidden states [N, D] predict, fp32, in nats.

    sum_w p_w (log p_w - log q_w) with p of the frozen model, whose gradient by the adapted logits
    is q - p: forward computes (q - p) W, and [N, D] is saved. Logits are held for some rows at a
    time.
    """

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, frozen_ND: Tensor, weight_WD: Tensor) -> Tensor:
        divergences_N = h_ND.new_empty(len(h_ND), dtype=torch.float32)
        difference_ND = torch.empty_like(h_ND)
        for chunk in row_chunks(len(h_ND), weight_WD):
            p_CW, q_CW = (
                vocabulary_logits(states_ND[chunk], weight_WD).log_softmax(dim=-1)
                for states_ND in (frozen_ND, h_ND)
            )
            weights_CW = p_CW.exp()
            divergences_N[chunk] = p_CW.sub_(q_CW).mul_(weights_CW).sum(dim=-1)
            difference_CW = q_CW.exp_().sub_(weights_CW).to(weight_WD.dtype)
            difference_ND[chunk] = difference_CW @ weight_WD
        ctx.save_for_backward(difference_ND)
        return divergences_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (difference_ND,) = ctx.saved_tensors
        return (difference_ND * gradients[0][:, None]).to(difference_ND.dtype), None, None


def compare_predictions(
    frozen_RD: Tensor, adapted_RD: Tensor, weight_WD: Tensor, rows_N: Tensor, ids_N: Tensor
) -> Tensor:
    """How two models predict tokens ids_N at rows rows_N, float64 [6, N].

    The cross-entropy of the frozen and of the adapted model; KL(frozen || adapted) of what they
    predict, sum_w p_w (log p_w - log q_w) in nats (Kullback and Leibler, 1951); 1 where both find
    the same token the likeliest; and 1 where this is the target, of the frozen and of the adapted
    model. Logits are held for some targets at a time.
    """
    parts = [frozen_RD.new_empty(6, 0, dtype=torch.float64)]
    for chunk in row_chunks(len(ids_N), weight_WD):
        p_CW, q_CW = (
            vocabulary_logits(h_RD[rows_N[chunk]], weight_WD).double().log_softmax(dim=-1)
            for h_RD in (frozen_RD, adapted_RD)
        )
        ids_C1 = ids_N[chunk, None]
        p_top_C, q_top_C = p_CW.argmax(dim=-1), q_CW.argmax(dim=-1)
        parts.append(
            torch.stack(
                [
                    -p_CW.gather(1, ids_C1)[:, 0],
                    -q_CW.gather(1, ids_C1)[:, 0],
                    (p_CW.exp() * (p_CW - q_CW)).sum(dim=-1),
                    (p_top_C == q_top_C).double(),
                    (p_top_C == ids_C1[:, 0]).double(),
                    (q_top_C == ids_C1[:, 0]).double(),
                ]
            )
        )
    return torch.cat(parts, dim=1)
