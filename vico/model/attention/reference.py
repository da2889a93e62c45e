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
    num_rows, _, width = k_THd.shape
    visible_TT, gated_TT = _dense_masks(mask, num_rows)
    if mask.query_rows is not None:
        visible_TT, gated_TT = visible_TT[mask.query_rows], gated_TT[mask.query_rows]
    scores_HQT = torch.einsum("qhd,khd->hqk", q_QHd.float(), k_THd.float()) / math.sqrt(width)
    if gate2_H is not None:
        gates_H11 = gate2_H.float()[:, None, None]
        scores_HQT = scores_HQT + gates_H11 * gated_TT.to(q_QHd.device)
    scores_HQT = scores_HQT.masked_fill(~visible_TT.to(q_QHd.device), -math.inf)
    weights_HQT = scores_HQT.softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights_HQT, v_THd.float()).to(q_QHd.dtype)


def _dense_masks(mask: AttentionMask, num_rows: int) -> tuple[Tensor, Tensor]:
    """(visible, gated), bool [T, T]: which row sees which, and which of these through gate2."""
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
    return visible_TT, gated_TT
