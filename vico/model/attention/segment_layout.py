"""The segments of a packed stream as attention's kernels for packed sequences take them.

Each segment is a sequence of its own, whose keys (its ancestors' rows and its own) are gathered.
Everything that the host knows is sent to the device as one array of whole numbers, once per
micro-batch, in one copy that the host does not wait for. The array can be padded
(`SegmentLayout.padded_sizes`), so that a few sizes serve all micro-batches and cuda_graphs.py
captures each size once.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vico.model.batch import Segment
from vico.model.config import padded_keys, padded_rows, round_up, round_up_coarsely


class LayoutSizes(NamedTuple):
    """All that the launch of an attention kernel depends on."""

    num_rows: int
    num_keys: int
    num_shared_rows: int
    num_segments: int
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def array_lengths(self) -> tuple[int, ...]:
        """Of the arrays of LayoutArrays, in their order."""
        flags = (self.num_rows, self.num_rows)
        cu_seqlens = (self.num_segments + 1, self.num_segments + 1)
        return (self.num_keys, self.num_rows, *flags, self.num_shared_rows, *cu_seqlens)


class LayoutArrays(NamedTuple):
    """What the device needs to know of a layout, int64, in the order in which it is sent."""

    key_rows: np.ndarray  # for each segment in turn, its ancestors' rows and its own
    own_keys: np.ndarray  # for each row, its index in key_rows as a row of its own segment
    after_video: np.ndarray  # by row
    is_video: np.ndarray  # by row
    shared_rows: np.ndarray  # the rows that occur in key_rows more than once
    cu_seqlens_q: np.ndarray  # where the rows of each segment start, and the end
    cu_seqlens_k: np.ndarray  # where the keys of each segment start, and the end

    def joined(self) -> np.ndarray:
        return np.concatenate(self)


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """The segments of a stream, on the host."""

    key_rows: np.ndarray  # for each segment in turn, its ancestors' rows and its own
    shared_rows: np.ndarray  # ascending: the rows that occur there more than once
    q_lengths: np.ndarray  # rows of each segment
    k_lengths: np.ndarray  # keys of each segment
    after_video: np.ndarray  # by segment
    is_video: np.ndarray  # by segment

    @property
    def num_rows(self) -> int:
        return int(self.q_lengths.sum())

    @property
    def sizes(self) -> LayoutSizes:
        """The sizes without padding.

        The maximal lengths are rounded up: kernels are compiled for them, so there must be few
        values.
        """
        return LayoutSizes(
            num_rows=self.num_rows,
            num_keys=len(self.key_rows),
            num_shared_rows=len(self.shared_rows),
            num_segments=len(self.q_lengths),
            max_seqlen_q=round_up(int(self.q_lengths.max()), 64),
            max_seqlen_k=round_up(int(self.k_lengths.max()), 64),
        )

    @property
    def padded_sizes(self) -> LayoutSizes:
        """Sizes that many streams have in common, with at least one row of padding.

        A matrix product takes 128 rows at a time anyway, and empty tiles of a segment's grid cost
        next to nothing.
        """
        sizes = self.sizes
        num_rows = padded_rows(sizes.num_rows)
        num_keys = padded_keys(sizes.num_rows, sizes.num_keys)
        # The padding is a segment too.
        max_seqlen_q = max(sizes.max_seqlen_q, num_rows - sizes.num_rows)
        max_seqlen_k = max(sizes.max_seqlen_k, num_keys - sizes.num_keys)
        return LayoutSizes(
            num_rows=num_rows,
            num_keys=num_keys,
            num_shared_rows=round_up_coarsely(sizes.num_shared_rows, 128),
            num_segments=round_up_coarsely(sizes.num_segments + 1, 32),
            max_seqlen_q=round_up(max_seqlen_q, 256),
            max_seqlen_k=round_up(max_seqlen_k, 512),
        )

    def arrays(self, sizes: LayoutSizes) -> LayoutArrays:
        """The layout's numbers, for this stream's own sizes or its padded ones.

        Segments without rows fill up the segments. The first row of the padding fills up the shared
        rows.
        """
        layout = self if sizes.num_rows == self.num_rows else self._with_padding(sizes)
        cu_seqlens_q = _cumulative(layout.q_lengths)
        cu_seqlens_k = _cumulative(layout.k_lengths)
        # A segment's own rows are the last of its keys, and rows come in the order of segments.
        own_keys = [
            np.arange(stop - num_rows, stop)
            for stop, num_rows in zip(cu_seqlens_k[1:], layout.q_lengths, strict=True)
        ]
        return LayoutArrays(
            key_rows=layout.key_rows.astype(np.int64),
            own_keys=np.concatenate(own_keys),
            after_video=np.repeat(layout.after_video, layout.q_lengths).astype(np.int64),
            is_video=np.repeat(layout.is_video, layout.q_lengths).astype(np.int64),
            shared_rows=_filled(layout.shared_rows, sizes.num_shared_rows, self.num_rows),
            cu_seqlens_q=_filled(cu_seqlens_q, sizes.num_segments + 1, cu_seqlens_q[-1]),
            cu_seqlens_k=_filled(cu_seqlens_k, sizes.num_segments + 1, cu_seqlens_k[-1]),
        )

    def joined(self, sizes: LayoutSizes) -> np.ndarray:
        """`arrays` as they are sent."""
        return self.arrays(sizes).joined()

    def _with_padding(self, sizes: LayoutSizes) -> "SegmentLayout":
        """The rows up to `sizes.num_rows` as one more segment, which only its own rows see.

        They do not change the stream's rows, and where their outputs have a gradient of 0 they get
        none. The segment's keys fill up those of the stream: its first row as often as needed, then
        all its rows.
        """
        padding_rows = np.arange(self.num_rows, sizes.num_rows)
        num_padding_keys = sizes.num_keys - len(self.key_rows)
        repeated_row = np.full(num_padding_keys - len(padding_rows), self.num_rows)
        return SegmentLayout(
            key_rows=np.concatenate([self.key_rows, repeated_row, padding_rows]),
            shared_rows=self.shared_rows,
            q_lengths=np.append(self.q_lengths, len(padding_rows)),
            k_lengths=np.append(self.k_lengths, num_padding_keys),
            after_video=np.append(self.after_video, False),
            is_video=np.append(self.is_video, False),
        )


def _cumulative(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], lengths.cumsum()])


def _filled(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), value)]).astype(np.int64)


@lru_cache(maxsize=16)  # of a step's micro-batches: asked for before the step, and in it
def segment_layout(segments: tuple[Segment, ...]) -> SegmentLayout:
    """Host work in numpy: less than a millisecond."""
    visible: list[np.ndarray] = []  # by segment: its ancestors' rows and its own
    for segment in segments:  # parents come before their children
        own_rows = np.arange(segment.start, segment.stop)
        if segment.parent is not None:
            own_rows = np.concatenate([visible[segment.parent], own_rows])
        visible.append(own_rows)
    key_rows = np.concatenate(visible)
    return SegmentLayout(
        key_rows=key_rows,
        shared_rows=np.flatnonzero(np.bincount(key_rows) > 1),
        q_lengths=np.array([segment.num_rows for segment in segments]),
        k_lengths=np.array([len(rows) for rows in visible]),
        after_video=np.array([segment.after_video for segment in segments]),
        is_video=np.array([segment.is_video for segment in segments]),
    )


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """The segments of a stream on the device, as the kernels for packed sequences take them."""

    key_rows_K: Tensor  # int64: for each segment in turn, its ancestors' rows and its own
    own_keys_T: Tensor  # int64: for each row, its index in K as a row of its own segment
    shared_rows_P: Tensor  # int64: the rows that occur in K more than once
    sharing_PK: Tensor | None  # 1 where the key is that row, else 0; None: no gradient is wanted
    cu_seqlens_q: Tensor  # int32 [segments + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    after_video_T: Tensor  # bool
    is_video_T: Tensor  # bool

    @property
    def for_backward(self) -> bool:
        return self.sharing_PK is not None

    @property
    def lengths(self) -> tuple[Tensor, Tensor, int, int]:
        """In the order in which the kernels take them."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q, self.max_seqlen_k


def send_to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """By a copy that the host does not wait for."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def varlen_layout(
    segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, for_backward: bool
) -> VarlenLayout:
    """The layout of a stream without padding."""
    layout = segment_layout(segments)
    numbers = send_to_device(layout.joined(layout.sizes), device)
    return layout_from_numbers(numbers, layout.sizes, dtype, for_backward)


def layout_from_numbers(
    numbers: Tensor, sizes: LayoutSizes, dtype: torch.dtype, for_backward: bool
) -> VarlenLayout:
    """The layout whose `LayoutArrays.joined` is `numbers`, without a wait for the device.

    `dtype`: of keys and values. `for_backward`: with what the gradients of keys and values need.
    """
    arrays = numbers.split(list(sizes.array_lengths))
    key_rows_K, own_keys_T, after_video_T, is_video_T, shared_rows_P = arrays[:5]
    cu_seqlens_q, cu_seqlens_k = arrays[5:]
    sharing_PK = None
    if for_backward:
        sharing_PK = (shared_rows_P[:, None] == key_rows_K).to(dtype)
    return VarlenLayout(
        key_rows_K=key_rows_K,
        own_keys_T=own_keys_T,
        shared_rows_P=shared_rows_P,
        sharing_PK=sharing_PK,
        cu_seqlens_q=cu_seqlens_q.to(torch.int32),
        cu_seqlens_k=cu_seqlens_k.to(torch.int32),
        max_seqlen_q=sizes.max_seqlen_q,
        max_seqlen_k=sizes.max_seqlen_k,
        after_video_T=after_video_T.bool(),
        is_video_T=is_video_T.bool(),
    )
