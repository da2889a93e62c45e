"""The definition of the gated attention, with the whole score matrix."""

import math

import torch
from torch import Tensor

from vico.model.attention.masks import AttentionMask


def attend_plain(
    q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, mask: AttentionMask
) -> Tensor:
    """The definition (METHOD section 1), in fp32, with the whole score matrix. Returns [Q, H, d]; Q rows ask."""
    num_rows, _, width = k_THd.shape
    visible_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    gated_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    for segment in mask.segments:
        rows, ancestor = slice(segment.start, segment.stop), segment.parent
        visible_TT[rows, rows] = torch.ones_like(visible_TT[rows, rows]).tril_()
        while ancestor is not None:
            keys = slice(mask.segments[ancestor].start, mask.segments[ancestor].stop)
            visible_TT[rows, keys] = True
            gated_TT[rows, keys] = segment.after_video and mask.segments[ancestor].is_video
            ancestor = mask.segments[ancestor].parent
    if mask.queries is not None:
        visible_TT, gated_TT = visible_TT[mask.queries], gated_TT[mask.queries]
    scores_HQT = torch.einsum("qhd,khd->hqk", q_QHd.float(), k_THd.float()) / math.sqrt(width)
    if gate2_H is not None:
        scores_HQT = scores_HQT + gate2_H.float()[:, None, None] * gated_TT.to(q_QHd.device)
    scores_HQT = scores_HQT.masked_fill(~visible_TT.to(q_QHd.device), -math.inf)
    return torch.einsum("hqk,khd->qhd", scores_HQT.softmax(dim=-1), v_THd.float()).to(q_QHd.dtype)
