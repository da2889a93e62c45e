"""Which rows of a packed stream see which, as a list of blocks of the score matrix."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from vico.model.batch import Segment


@dataclass(frozen=True, slots=True)
class MaskBlock:
    """Queries [q_start, q_stop) see keys [k_start, k_stop).

    They see all of them, or (causal) each those up to itself. `count` > 1: a causal block of that
    many equal triangles side by side, each seeing itself alone.
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
    """The attention mask of a stream.

    `blocks` count query rows by their index in `query_rows`; the causal block of a row comes before
    its others. `query_rows` (host int64, ascending): the rows whose output is wanted; None: all
    rows.
    """

    segments: tuple[Segment, ...]
    blocks: tuple[MaskBlock, ...]
    query_rows: Tensor | None = None


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, AttentionMask], Tensor]


def attention_mask(segments: tuple[Segment, ...]) -> AttentionMask:
    """The mask with all rows as queries. Host work, once per micro-batch."""
    triangles = [MaskBlock(s.start, s.stop, s.start, s.stop, True, False) for s in segments]
    return AttentionMask(segments, (*_merged(triangles), *_rectangles(segments)))


@dataclass(slots=True)
class _RowRun:
    """Neighbouring rows that see the same ancestor, all of them through gate2 or none."""

    start: int
    stop: int
    gated: bool


def _rectangles(segments: Sequence[Segment]) -> Iterator[MaskBlock]:
    """For each segment, the rows of its descendants against its keys.

    Neighbouring rows that are gated alike are one block.
    """
    runs_by_ancestor: dict[int, list[_RowRun]] = {}
    for segment in segments:
        ancestor = segment.parent
        while ancestor is not None:
            runs = runs_by_ancestor.setdefault(ancestor, [])
            gated = segment.after_video and segments[ancestor].is_video
            if runs and runs[-1].stop == segment.start and runs[-1].gated == gated:
                runs[-1].stop = segment.stop
            else:
                runs.append(_RowRun(segment.start, segment.stop, gated))
            ancestor = segments[ancestor].parent
    for ancestor, runs in runs_by_ancestor.items():
        keys = segments[ancestor]
        for run in runs:
            yield MaskBlock(run.start, run.stop, keys.start, keys.stop, False, run.gated)


def _merged(triangles: Sequence[MaskBlock]) -> list[MaskBlock]:
    """Neighbouring triangles of one size (the branches of options) as one block."""
    merged: list[MaskBlock] = []
    for block in triangles:
        if merged and _continues(merged[-1], block):
            last = merged.pop()
            queries, keys = (last.q_start, block.q_stop), (last.k_start, block.k_stop)
            block = MaskBlock(*queries, *keys, causal=True, gated=False, count=last.count + 1)
        merged.append(block)
    return merged


def _continues(last: MaskBlock, block: MaskBlock) -> bool:
    """Whether the triangle `block` follows the triangles of `last` and has their size."""
    size = block.q_stop - block.q_start
    return last.q_stop == block.q_start and last.q_stop - last.q_start == last.count * size


def restrict_queries(mask: AttentionMask, rows: Tensor) -> AttentionMask:
    """`mask` with `rows` (host int64, ascending, distinct) as its only queries.

    Rectangles shrink; a triangle splits where rows are missing.
    """
    query_rows = rows.tolist()
    index_of = {row: index for index, row in enumerate(query_rows)}
    triangles: list[MaskBlock] = []
    rectangles: list[MaskBlock] = []
    for segment in mask.segments:
        kept = [row for row in range(segment.start, segment.stop) if row in index_of]
        for start, stop in _runs(kept):
            queries = index_of[start], index_of[start] + stop - start
            triangles.append(MaskBlock(*queries, start, stop, True, False))
            if start > segment.start:
                rectangles.append(MaskBlock(*queries, segment.start, start, False, False))
    for block in _rectangles(mask.segments):
        indices = [index_of[row] for row in range(block.q_start, block.q_stop) if row in index_of]
        if indices:
            queries = indices[0], indices[-1] + 1
            rectangles.append(MaskBlock(*queries, block.k_start, block.k_stop, False, block.gated))
    return AttentionMask(mask.segments, (*triangles, *rectangles), rows)


def _runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of consecutive numbers."""
    first = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] != rows[i - 1] + 1:
            yield rows[first], rows[i - 1] + 1
            first = i
