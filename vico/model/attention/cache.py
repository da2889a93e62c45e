"""The key/value cache of generation: what earlier rows have computed, so that a new token is a row.

A first forward runs the prompts as a packed stream and fills the cache, in which each sequence has
its rows side by side, whatever it shared with others in the stream. Every later forward runs one
row per sequence, which attends to the cache and is added to it. What is computed is METHOD
section 1; reference.py has the same for a whole stream.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vico.model.batch import PackedBatch

ADDED_COLUMNS = 64  # at a time, so that not every token copies the cache


class KeyValueCache:
    """Of B sequences, padded on their right to the longest prompt; generated rows come after that.

    All rows come after their sequence's video slots, where it has some: gate2 acts on these.
    """

    def __init__(self, num_layers: int, prompts: PackedBatch) -> None:
        """Empty, for the rows of `prompts`, each of which predicts one token."""
        device = prompts.token_ids_T.device
        rows = _rows_of_sequences(prompts)
        longest = max(map(len, rows))
        padded = [[*own, *[0] * (longest - len(own))] for own in rows]
        self.rows_BL = torch.tensor(padded, device=device)
        self.lengths_B = torch.tensor([len(own) for own in rows], device=device)
        columns_L = torch.arange(longest, device=device)
        self.is_hidden_BL = columns_L >= self.lengths_B[:, None]
        is_video_T = torch.zeros(prompts.num_rows, dtype=torch.bool, device=device)
        is_video_T[prompts.slot_rows_S] = True
        self.is_video_BL = is_video_T[self.rows_BL] & ~self.is_hidden_BL
        self.layers = tuple(LayerCache(self) for _ in range(num_layers))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these of the sequences, in this order; one may be named several times."""
        if list(rows) == list(range(len(self.lengths_B))):
            return
        rows_B = torch.tensor(rows, device=self.lengths_B.device)
        self.lengths_B = self.lengths_B[rows_B]
        self.is_hidden_BL, self.is_video_BL = self.is_hidden_BL[rows_B], self.is_video_BL[rows_B]
        for layer in self.layers:
            layer.select(rows_B)

    def grow(self) -> Tensor:
        """A column more, for the rows of the next forward, whose positions [B] are returned."""
        positions_B, self.lengths_B = self.lengths_B, self.lengths_B + 1
        self.is_hidden_BL = F.pad(self.is_hidden_BL, (0, 1))
        self.is_video_BL = F.pad(self.is_video_BL, (0, 1))
        return positions_B


class LayerCache:
    """Keys, with their rotary embedding, and values of one layer, for its J heads."""

    def __init__(self, cache: KeyValueCache) -> None:
        self._cache = cache
        self._k_BJLd: Tensor | None = None
        self._v_BJLd: Tensor | None = None
        self._num_columns = 0  # of L, that hold rows
        # Of the adapter prompt, the same for all rows; a head for each query head.
        self.prompt_heads: tuple[Tensor, Tensor] | None = None

    @property
    def is_filled(self) -> bool:
        return self._k_BJLd is not None

    def fill(self, k_TJd: Tensor, v_TJd: Tensor) -> None:
        """Take the rows of the prompts' stream."""
        rows_BL = self._cache.rows_BL
        self._k_BJLd = k_TJd[rows_BL].transpose(1, 2).contiguous()
        self._v_BJLd = v_TJd[rows_BL].transpose(1, 2).contiguous()
        self._num_columns = rows_BL.shape[1]

    def select(self, rows_B: Tensor) -> None:
        assert self._k_BJLd is not None and self._v_BJLd is not None, "filled before"
        self._k_BJLd, self._v_BJLd = self._k_BJLd[rows_B], self._v_BJLd[rows_B]

    def attend(self, q_BHd: Tensor, k_BJd: Tensor, v_BJd: Tensor, gate2_H: Tensor | None) -> Tensor:
        """Add a row to each sequence, and attend from it to all of its sequence, in fp32."""
        assert self._k_BJLd is not None and self._v_BJLd is not None, "filled before"
        column, num_heads = self._num_columns, k_BJd.shape[1]
        if column == self._k_BJLd.shape[2]:
            self._k_BJLd = F.pad(self._k_BJLd, (0, 0, 0, ADDED_COLUMNS))
            self._v_BJLd = F.pad(self._v_BJLd, (0, 0, 0, ADDED_COLUMNS))
        self._k_BJLd[:, :, column], self._v_BJLd[:, :, column] = k_BJd, v_BJd
        self._num_columns = column + 1
        k_BJLd = self._k_BJLd[:, :, : self._num_columns]
        v_BJLd = self._v_BJLd[:, :, : self._num_columns]
        # Neighbouring query heads share a key head: J groups of g.
        q_BJgd = q_BHd.float().unflatten(1, (num_heads, -1))
        scores_BJgL = q_BJgd @ k_BJLd.float().transpose(2, 3) / math.sqrt(q_BHd.shape[-1])
        if gate2_H is not None:
            gates_Jg1 = gate2_H.float().unflatten(0, (num_heads, -1))[..., None]
            scores_BJgL = scores_BJgL + gates_Jg1 * self._cache.is_video_BL[:, None, None]
        scores_BJgL = scores_BJgL.masked_fill(self._cache.is_hidden_BL[:, None, None], -math.inf)
        out_BJgd = scores_BJgL.softmax(dim=-1) @ v_BJLd.float()
        return out_BJgd.flatten(1, 2).to(q_BHd.dtype)


def _rows_of_sequences(prompts: PackedBatch) -> list[list[int]]:
    """The rows of each sequence, which ends with the row that predicts its target."""
    segments = prompts.segments
    ending_in: dict[int, int] = {segment.stop - 1: i for i, segment in enumerate(segments)}
    last_rows: Sequence[int] = prompts.wanted_rows_R[prompts.token_rows_N.cpu()].tolist()
    sequences = []
    for last_row in last_rows:
        rows: list[int] = []
        index: int | None = ending_in[last_row]
        while index is not None:
            rows = [*range(segments[index].start, segments[index].stop), *rows]
            index = segments[index].parent
        sequences.append(rows)
    return sequences
