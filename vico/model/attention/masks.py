"""Which rows of a packed stream see which, as a list of blocks of the score matrix."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vico.model.batch import Segment


@dataclass(frozen=True, slots=True)
class MaskBlock:
    """Queries [q_start, q_stop) see keys [k_start, k_stop): all of them, or (causal) each those up to itself.

    `count` > 1: a causal block of that many equal triangles side by side, each seeing itself alone.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    causal: bool
    gated: bool
    count: int = 1


@dataclass(frozen=True, slots=True)
class AttentionMask:
    """Who sees whom among the rows of a stream. `queries`: the rows that ask, when not all do (the last layer)."""

    segments: tuple[Segment, ...]
    blocks: tuple[
        MaskBlock, ...
    ]  # rows of queries counted among those that ask; each row's causal block comes first
    queries: Tensor | None = None  # int64, ascending


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionMask], Tensor]


def attention_mask(segments: tuple[Segment, ...]) -> AttentionMask:
    """All rows ask. Host work, once per micro-batch."""
    triangles = [MaskBlock(s.start, s.stop, s.start, s.stop, True, False) for s in segments]
    return AttentionMask(segments, (*_merged(triangles), *_rectangles(segments)))


def _rectangles(segments: Sequence[Segment]) -> Iterator[MaskBlock]:
    """Of each segment, the rows below it against its keys; runs of neighbouring rows of one kind are one block."""
    runs: dict[int, list[list[int]]] = {}
    for segment in segments:
        ancestor = segment.parent
        while ancestor is not None:
            found = runs.setdefault(ancestor, [])
            gated = int(segment.after_video and segments[ancestor].is_video)
            if found and found[-1][1] == segment.start and found[-1][2] == gated:
                found[-1][1] = segment.stop
            else:
                found.append([segment.start, segment.stop, gated])
            ancestor = segments[ancestor].parent
    for ancestor, found in runs.items():
        for start, stop, gated in found:
            yield MaskBlock(
                start, stop, segments[ancestor].start, segments[ancestor].stop, False, bool(gated)
            )


def _merged(triangles: Sequence[MaskBlock]) -> list[MaskBlock]:
    """Neighbouring triangles of one size (the branches of options) as one block."""
    merged: list[MaskBlock] = []
    for block in triangles:
        size = block.q_stop - block.q_start
        last = merged[-1] if merged else None
        if (
            last is not None
            and last.q_stop == block.q_start
            and (last.q_stop - last.q_start) == last.count * size
        ):
            merged[-1] = MaskBlock(
                last.q_start, block.q_stop, last.k_start, block.k_stop, True, False, last.count + 1
            )
        else:
            merged.append(block)
    return merged


def restrict_queries(mask: AttentionMask, rows: Tensor) -> AttentionMask:
    """`mask` when only `rows` (host int64, ascending, distinct) ask: rectangles shrink, triangles split where rows are missing."""
    asked = rows.tolist()
    place = {row: i for i, row in enumerate(asked)}
    blocks: list[MaskBlock] = []
    for segment in mask.segments:
        for start, stop in _runs(
            [row for row in range(segment.start, segment.stop) if row in place]
        ):
            at = place[start]
            blocks.append(MaskBlock(at, at + stop - start, start, stop, True, False))
            if start > segment.start:
                blocks.append(MaskBlock(at, at + stop - start, segment.start, start, False, False))
    for block in _rectangles(mask.segments):
        inside = [place[row] for row in range(block.q_start, block.q_stop) if row in place]
        if inside:
            blocks.append(
                MaskBlock(
                    inside[0], inside[-1] + 1, block.k_start, block.k_stop, False, block.gated
                )
            )
    return AttentionMask(
        mask.segments,
        (*(b for b in blocks if b.causal), *(b for b in blocks if not b.causal)),
        rows,
    )


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of consecutive numbers."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i
