"""How much of each head's attention the text behind a video gives to the video.

By the definition (reference.py), a few query rows at a time: [heads, rows, rows] is never held.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import AttentionMask
from vico.model.attention.reference import attention_weights, dense_masks
from vico.model.batch import PackedBatch

ROWS_AT_A_TIME = 64


class VideoShares:
    """Attention that also sums what lies on video rows; in the place of a model's.

    A forward calls it once per layer, in their order. Counted are the queries on which gate2 acts:
    rows of text behind their sequence's video, each row of the stream once.
    """

    def __init__(self) -> None:
        self._by_layer: list[Tensor] = []
        self.num_rows = 0
        self.num_video = 0.0  # sum over these rows: the share of video rows among those they see

    def take(self) -> Tensor:
        """fp64 [layers, H], on the host, of the last forward: sums over its `num_rows` rows."""
        sums_LH = torch.stack(self._by_layer).cpu()
        self._by_layer = []
        return sums_LH

    def __call__(
        self,
        q_QHd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        mask: AttentionMask,
    ) -> Tensor:
        visible_QT, gated_QT = dense_masks(mask, len(k_THd))
        rows = gated_QT.any(dim=1).nonzero().flatten()
        self.num_rows = len(rows)
        self.num_video = float((gated_QT[rows].sum(1) / visible_QT[rows].sum(1)).double().sum())
        sums_H = torch.zeros(q_QHd.shape[1], dtype=torch.float64, device=q_QHd.device)
        for few in rows.split(ROWS_AT_A_TIME):
            visible, gated = visible_QT[few], gated_QT[few]
            weights_HqT = attention_weights(
                q_QHd[few.to(q_QHd.device)], k_THd, gate2_H, visible, gated
            )
            sums_H += (weights_HqT * gated.to(q_QHd.device)).sum(dim=(1, 2), dtype=torch.float64)
        self._by_layer.append(sums_H)
        return attend_blocks(q_QHd, k_THd, v_THd, gate2_H, mask)


def all_rows_wanted(batch: PackedBatch) -> PackedBatch:
    """The same with every row's output wanted, so that all are queries in the last layer too."""
    wanted = batch.wanted_rows_R
    return replace(
        batch,
        wanted_rows_R=torch.arange(batch.num_rows),
        token_rows_N=wanted[batch.token_rows_N],
        frame_rows_M=wanted[batch.frame_rows_M],
    )
