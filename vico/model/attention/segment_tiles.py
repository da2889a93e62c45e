"""The tables by which the kernels of ops/segment_kernels.py walk a packed stream.

A query tile is up to TILE consecutive rows that have the same ancestors and all come after the
video, or none does: of one segment, or of siblings that lie side by side, as the options of a
question do. It sees the rows of its ancestors, by a list, and of its own and its siblings' rows
those of the row's own segment up to the row itself.

A key tile is up to TILE rows of one segment. The rows that see it are cut into visits, of up to
TILE rows each: the rest of its segment, then each run of its descendants. More than MAX_VISITS
visits are cut into pieces, whose sums are added in their order: a shared tile.

Made on the host, once per micro-batch, and sent as one array of whole numbers. The array can be
padded (`HostTables.padded_sizes`); empty tiles, pieces and visits are zeros.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vico.model.attention.masks import attention_mask
from vico.model.attention.segment_layout import send_to_device
from vico.model.batch import Segment
from vico.model.config import padded_rows

MAX_VISITS = 16  # of one piece
Table = list[tuple[int, ...]]


class TableSizes(NamedTuple):
    """All that a launch depends on: numbers of rows of the tables."""

    num_rows: int
    num_query_tiles: int
    num_list_rows: int
    num_key_pieces: int
    num_visits: int
    num_shared_tiles: int
    num_partial_rows: int  # rows of the pieces of all shared tiles

    @property
    def array_lengths(self) -> tuple[int, ...]:
        """Of the tables as they are sent, in the order of DeviceTables."""
        of_queries = (6 * self.num_query_tiles, self.num_list_rows, 2 * self.num_rows)
        of_keys = (5 * self.num_key_pieces, 3 * self.num_visits, 4 * self.num_shared_tiles)
        return (*of_queries, *of_keys)


@dataclass(frozen=True, slots=True)
class DeviceTables:
    """The tables on the device, int64."""

    query_tiles: (
        Tensor  # [:, 6]: start, stop, first own key, start and stop in the list, after video
    )
    list_rows: Tensor  # for each parent in turn, its ancestors' rows and its own
    by_row: Tensor  # [T, 2]: start of the row's segment, whether it is a video's
    key_pieces: Tensor  # [:, 5]: start, stop, first and last visit, first partial row or -1
    visits: Tensor  # [:, 3]: start, stop, whether the pairs are gated
    shared_tiles: Tensor  # [:, 4]: start, stop, first partial row, number of pieces
    sizes: TableSizes
    tile_rows: int
    for_backward: bool


class SegmentTables:
    """The tables of a stream, on the host."""

    def __init__(self, segments: tuple[Segment, ...], tile_rows: int) -> None:
        self.segments, self.tile_rows = segments, tile_rows
        self.list_rows: list[int] = []
        self.key_pieces: Table = []
        self.visits: Table = []
        self.shared_tiles: Table = []
        self.num_partial_rows = 0
        self.query_tiles = self._make_query_tiles()
        self._make_key_tables()

    @property
    def num_rows(self) -> int:
        return self.segments[-1].stop

    @property
    def sizes(self) -> TableSizes:
        return TableSizes(
            num_rows=self.num_rows,
            num_query_tiles=len(self.query_tiles),
            num_list_rows=len(self.list_rows),
            num_key_pieces=len(self.key_pieces),
            num_visits=len(self.visits),
            num_shared_tiles=len(self.shared_tiles),
            num_partial_rows=self.num_partial_rows,
        )

    def joined(self, sizes: TableSizes) -> np.ndarray:
        """int64: the tables one after the other, for their own sizes or larger ones."""
        lengths = [segment.num_rows for segment in self.segments]
        by_segment = [(segment.start, int(segment.is_video)) for segment in self.segments]
        arrays: tuple[Sequence[object] | np.ndarray, ...] = (
            self.query_tiles,
            self.list_rows,
            np.repeat(by_segment, lengths, axis=0),
            self.key_pieces,
            self.visits,
            self.shared_tiles,
        )
        joined = np.zeros(sum(sizes.array_lengths), dtype=np.int64)
        start = 0
        for array, length in zip(arrays, sizes.array_lengths, strict=True):
            numbers = np.asarray(array, dtype=np.int64).ravel()
            joined[start : start + len(numbers)] = numbers
            start += length
        return joined

    def _make_query_tiles(self) -> Table:
        tiles: Table = []
        lists: dict[int, tuple[int, int]] = {}  # by parent: where its list is
        for family in _families(self.segments):
            parent, after_video = family[0].parent, family[0].after_video
            listed = (0, 0) if parent is None else self._list(parent, lists)
            starts = [segment.start for segment in family]
            for start in range(family[0].start, family[-1].stop, self.tile_rows):
                stop = min(start + self.tile_rows, family[-1].stop)
                first_key = starts[bisect_right(starts, start) - 1]
                tiles.append((start, stop, first_key, *listed, int(after_video)))
        return tiles

    def _list(self, parent: int, lists: dict[int, tuple[int, int]]) -> tuple[int, int]:
        """Where the rows of `parent` and its ancestors are listed, in the order of the stream."""
        if parent not in lists:
            chain: list[Segment] = []
            index: int | None = parent
            while index is not None:
                chain.append(self.segments[index])
                index = self.segments[index].parent
            first = len(self.list_rows)
            for segment in reversed(chain):
                self.list_rows += range(segment.start, segment.stop)
            lists[parent] = first, len(self.list_rows)
        return lists[parent]

    def _make_key_tables(self) -> None:
        runs: dict[int, Table] = {segment.start: [] for segment in self.segments}
        for block in attention_mask(self.segments).blocks:
            if not block.causal:
                runs[block.k_start].append((block.q_start, block.q_stop, int(block.gated)))
        for segment in self.segments:
            for start in range(segment.start, segment.stop, self.tile_rows):
                stop = min(start + self.tile_rows, segment.stop)
                # Own rows before the tile do not see it.
                self._add_key_tile(start, stop, [(start, segment.stop, 0), *runs[segment.start]])

    def _add_key_tile(self, key_start: int, key_stop: int, runs: Table) -> None:
        first = len(self.visits)
        for run_start, run_stop, gated in runs:
            for start in range(run_start, run_stop, self.tile_rows):
                self.visits.append((start, min(start + self.tile_rows, run_stop), gated))
        last, partial_row = len(self.visits), -1
        pieces = range(first, last, MAX_VISITS)
        if len(pieces) > 1:
            partial_row = self.num_partial_rows
            self.shared_tiles.append((key_start, key_stop, partial_row, len(pieces)))
            self.num_partial_rows += len(pieces) * (key_stop - key_start)
        for piece in pieces:
            piece_last = min(piece + MAX_VISITS, last)
            self.key_pieces.append((key_start, key_stop, piece, piece_last, partial_row))
            if partial_row >= 0:
                partial_row += key_stop - key_start


def _families(segments: tuple[Segment, ...]) -> list[list[Segment]]:
    """Neighbouring segments with the same parent, all after their video or none."""
    families: list[list[Segment]] = []
    for segment in segments:
        kind = segment.parent, segment.after_video
        if families and (families[-1][-1].parent, families[-1][-1].after_video) == kind:
            families[-1].append(segment)
        else:
            families.append([segment])
    return families


class HostTables:
    """The tables of a stream with and without padding, on the host; made when they are wanted."""

    def __init__(self, segments: tuple[Segment, ...], tile_rows: int) -> None:
        self._segments, self._tile_rows = segments, tile_rows
        self._num_rows = segments[-1].stop

    @cached_property
    def own(self) -> SegmentTables:
        return SegmentTables(self._segments, self._tile_rows)

    @cached_property
    def _padded(self) -> SegmentTables:
        """With the rows of the padding as one more segment, which only its own rows see."""
        num_rows = padded_rows(self._num_rows)
        padding = Segment(self._num_rows, num_rows, None, is_video=False, after_video=False)
        return SegmentTables((*self._segments, padding), self._tile_rows)

    @property
    def padded_sizes(self) -> TableSizes:
        """Sizes that many streams have in common, with at least one row of padding.

        Powers of two: an empty tile costs next to nothing.
        """
        num_rows, *others = self._padded.sizes
        return TableSizes(num_rows, *(max(8, 1 << (n - 1).bit_length()) for n in others))

    def joined(self, sizes: TableSizes) -> np.ndarray:
        """As `SegmentTables.joined`, for this stream's own sizes or its padded ones."""
        tables = self.own if sizes.num_rows == self._num_rows else self._padded
        return tables.joined(sizes)


@lru_cache(maxsize=16)  # of a step's micro-batches: asked for before the step, and in it
def host_tables(segments: tuple[Segment, ...], tile_rows: int) -> HostTables:
    """The tables of a stream, on the host."""
    return HostTables(segments, tile_rows)


def tables_from_numbers(
    numbers: Tensor, sizes: TableSizes, tile_rows: int, for_backward: bool
) -> DeviceTables:
    """The tables whose `SegmentTables.joined` is `numbers`, without a wait for the device."""
    query_tiles, list_rows, by_row, *of_keys = numbers.split(list(sizes.array_lengths))
    key_pieces, visits, shared_tiles = of_keys
    return DeviceTables(
        query_tiles=query_tiles,
        list_rows=list_rows,
        by_row=by_row,
        key_pieces=key_pieces,
        visits=visits,
        shared_tiles=shared_tiles,
        sizes=sizes,
        tile_rows=tile_rows,
        for_backward=for_backward,
    )


def segment_tables(
    segments: tuple[Segment, ...], tile_rows: int, device: torch.device, for_backward: bool
) -> DeviceTables:
    """The tables of a stream without padding."""
    tables = host_tables(segments, tile_rows).own
    numbers = send_to_device(tables.joined(tables.sizes), device)
    return tables_from_numbers(numbers, tables.sizes, tile_rows, for_backward)
