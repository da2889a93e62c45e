"""The definition of the gated attention, with the whole score matrix.

out = softmax_k(q.k / sqrt(d) + gate2 [query after the video, key in the video]) V
"""

import math

import torch
from torch import Tensor

from vico.model.attention.masks import AttentionMask


def attend_plain(
    q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask
) -> Tensor:
    """Attention as METHOD section 1 defines it, in fp32. Returns [Q, H, d]."""
    visible_QT, gated_QT = dense_masks(mask, len(k_THd))
    weights_HQT = attention_weights(q_QHd, k_THd, gate2_H, visible_QT, gated_QT)
    return torch.einsum("hqk,khd->qhd", weights_HQT, v_THd.float()).to(q_QHd.dtype)


def attention_weights(
    q_QHd: Tensor, k_THd: Tensor, gate2_H: Tensor | None, visible_QT: Tensor, gated_QT: Tensor
) -> Tensor:
    """The softmax [H, Q, T] of the definition, fp32. `visible_QT`, `gated_QT`: as `dense_masks`."""
    width = k_THd.shape[-1]
    scores_HQT = torch.einsum("qhd,khd->hqk", q_QHd.float(), k_THd.float()) / math.sqrt(width)
    if gate2_H is not None:
        gates_H11 = gate2_H.float()[:, None, None]
        scores_HQT = scores_HQT + gates_H11 * gated_QT.to(q_QHd.device)
    scores_HQT = scores_HQT.masked_fill(~visible_QT.to(q_QHd.device), -math.inf)
    return scores_HQT.softmax(dim=-1)


def dense_masks(mask: AttentionMask, num_rows: int) -> tuple[Tensor, Tensor]:
    """(visible, gated), bool [Q, T]: which row each query sees, and which of these through gate2.

    On the host.
    """
    visible_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    gated_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for segment in mask.segments:
        rows, parent = slice(segment.start, segment.stop), segment.parent
        visible_TT[rows, rows] = torch.ones_like(visible_TT[rows, rows]).tril_()
        while parent is not None:
            ancestor = mask.segments[parent]
            keys = slice(ancestor.start, ancestor.stop)
            visible_TT[rows, keys] = True
            gated_TT[rows, keys] = segment.after_video and ancestor.is_video
            parent = ancestor.parent
    if mask.query_rows is None:
        return visible_TT, gated_TT
    return visible_TT[mask.query_rows], gated_TT[mask.query_rows]
