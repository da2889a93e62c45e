"""Where a packed stream's rows stand for attention's kernels: each segment is a sequence whose keys are gathered.

What is known on the host is one array of numbers, made once per micro-batch and sent in one copy that nobody waits for. It can
be made longer than the stream needs (`rounded`), so that a few sizes serve all micro-batches: graphs.py records each size once.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vico.model.batch import Segment


class LayoutSizes(NamedTuple):
    """All that a kernel's start depends on."""

    rows: int
    keys: int
    shared: int  # rows that stand among the keys more than once
    segments: int
    max_seqlen_q: int
    max_seqlen_k: int

    @property
    def numbers(self) -> int:
        return self.keys + 3 * self.rows + self.shared + 2 * (self.segments + 1)


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """A stream's segments, on the host: for each its queries, and its keys, which are its ancestors' rows and its own."""

    key_rows: np.ndarray  # of each segment in turn, its ancestors' rows and its own
    shared_rows: np.ndarray  # ascending: the rows that stand there more than once
    q_lengths: np.ndarray
    k_lengths: np.ndarray
    after_video: np.ndarray  # by segment
    is_video: np.ndarray

    @property
    def sizes(self) -> LayoutSizes:
        # Rounded up: kernels are chosen by these, and a new value for every batch would mean a new compilation.
        longest = (_up(int(lengths.max()), 64) for lengths in (self.q_lengths, self.k_lengths))
        return LayoutSizes(
            int(self.q_lengths.sum()),
            len(self.key_rows),
            len(self.shared_rows),
            len(self.q_lengths),
            *longest,
        )

    @property
    def rounded(self) -> LayoutSizes:
        """LayoutSizes that many streams have in common, with room for one row more: `numbers` fills up with segments of such rows.

        A product takes 128 rows at a time anyway, and the ends of a segment's grid that hold nothing cost next to nothing.
        """
        rows, keys, shared, segments, max_seqlen_q, max_seqlen_k = self.sizes
        more_rows = _up(rows + 1, 128)
        more_keys = more_rows + _coarse(keys - rows, 256)
        longest = (
            _up(max(max_seqlen_q, more_rows - rows), 256),
            _up(max(max_seqlen_k, more_keys - keys), 512),
        )
        return LayoutSizes(
            more_rows, more_keys, _coarse(shared, 128), _coarse(segments + 1, 32), *longest
        )

    def numbers(self, sizes: LayoutSizes) -> np.ndarray:
        """int64 [sizes.numbers]: what `on_device` cuts into a VarlenLayout. `sizes`: this stream's own, or `rounded`.

        The rows behind the stream are one more segment, which only its own rows see: they change nothing, and where what is made
        of them has a gradient of 0 they get none. Its keys fill up those of the stream; segments without rows fill up the rest.
        """
        more_rows, more_keys = (
            sizes.rows - int(self.q_lengths.sum()),
            sizes.keys - len(self.key_rows),
        )
        first = sizes.rows - more_rows
        key_rows, q_lengths, k_lengths = self.key_rows, self.q_lengths, self.k_lengths
        if more_rows:
            fill = np.concatenate(
                [np.full(more_keys - more_rows, first), np.arange(first, sizes.rows)]
            )
            key_rows = np.concatenate([key_rows, fill])
            q_lengths, k_lengths = np.append(q_lengths, more_rows), np.append(k_lengths, more_keys)
        cu_seqlens_q, cu_seqlens_k = (
            np.concatenate([[0], lengths.cumsum()]) for lengths in (q_lengths, k_lengths)
        )
        # A segment's own rows are the last of its keys, and rows stand in the order of segments.
        own_keys = np.concatenate(
            [np.arange(stop - n, stop) for stop, n in zip(cu_seqlens_k[1:], q_lengths, strict=True)]
        )
        flags = (
            _filled(np.repeat(by_segment, self.q_lengths), sizes.rows, 0)
            for by_segment in (self.after_video, self.is_video)
        )
        starts = (_filled(x, sizes.segments + 1, x[-1]) for x in (cu_seqlens_q, cu_seqlens_k))
        return np.concatenate(
            [key_rows, own_keys, *flags, _filled(self.shared_rows, sizes.shared, first), *starts]
        )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _coarse(number: int, least: int) -> int:
    """Rounded up to a multiple of `least`, or of an eighth to a quarter of itself where that is more."""
    return _up(number, max(least, 1 << max(0, number.bit_length() - 3)))


def _filled(values: np.ndarray, length: int, value: int) -> np.ndarray:
    return np.concatenate([values, np.full(length - len(values), value)]).astype(np.int64)


def segment_layout(segments: tuple[Segment, ...]) -> SegmentLayout:
    """Host work in numpy: less than a millisecond."""
    lines: list[list[Segment]] = []  # of each segment, its ancestors and itself
    for segment in segments:  # parents stand before their children
        lines.append([*([] if segment.parent is None else lines[segment.parent]), segment])
    key_rows = np.concatenate([np.arange(s.start, s.stop) for line in lines for s in line])
    q_lengths = np.array([s.stop - s.start for s in segments])
    k_lengths = np.array([sum(s.stop - s.start for s in line) for line in lines])
    shared_rows = np.flatnonzero(np.bincount(key_rows) > 1)
    flags = (np.array([getattr(s, name) for s in segments]) for name in ("after_video", "is_video"))
    return SegmentLayout(key_rows, shared_rows, q_lengths, k_lengths, *flags)


@dataclass(frozen=True, slots=True)
class VarlenLayout:
    """A stream's segments as the kernels want them, on the device. K: keys of all segments, ancestors' rows again for each."""

    key_rows_K: Tensor  # int64: of each segment in turn, its ancestors' rows and its own
    own_keys_T: Tensor  # int64: where in K each row stands as a row of its own segment
    shared_rows_S: Tensor  # int64: the rows that stand in K more than once
    sharing_SK: Tensor | None  # 1 where, else 0; None: no gradient is wanted
    cu_seqlens_q: Tensor  # int32 [segments + 1]
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    after_video_T: Tensor  # bool
    is_video_T: Tensor  # bool


def sent(numbers: np.ndarray, device: torch.device) -> Tensor:
    """On the device, by a copy that nobody waits for."""
    tensor = torch.from_numpy(numbers)
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def varlen_layout(
    segments: tuple[Segment, ...], device: torch.device, dtype: torch.dtype, gradient: bool
) -> VarlenLayout:
    """Of the stream as it is."""
    found = segment_layout(segments)
    return on_device(sent(found.numbers(found.sizes), device), found.sizes, dtype, gradient)


def on_device(
    numbers: Tensor, sizes: LayoutSizes, dtype: torch.dtype, gradient: bool
) -> VarlenLayout:
    """What `SegmentLayout.numbers` made, sent; `dtype`: of keys and values; ready for backward with `gradient`. Nothing waits."""
    rows, starts = sizes.rows, sizes.segments + 1
    key_rows_K, own_keys_T, after_T, video_T, shared_S, cu_seqlens_q, cu_seqlens_k = numbers.split(
        [sizes.keys, rows, rows, rows, sizes.shared, starts, starts]
    )
    sharing_SK = (shared_S[:, None] == key_rows_K).to(dtype) if gradient else None
    of_q, of_k = cu_seqlens_q.to(torch.int32), cu_seqlens_k.to(torch.int32)
    return VarlenLayout(
        key_rows_K,
        own_keys_T,
        shared_S,
        sharing_SK,
        of_q,
        of_k,
        sizes.max_seqlen_q,
        sizes.max_seqlen_k,
        after_T.bool(),
        video_T.bool(),
    )
