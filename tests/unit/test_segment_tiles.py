"""The tables of segment attention, and that its kernels compile; without Triton's interpreter."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.baseline.variants import training_batch
from benchmarks.measure import attention_bytes
from benchmarks.measure.workload import SyntheticWorkload
from support.segment_trees import Segments, random_segments, visible_pairs
from vico.errors import UserError
from vico.model.attention import segment_tiles
from vico.model.attention.backends import choose_attention
from vico.model.attention.segment import HALF_TILE_ROWS
from vico.model.attention.segment_tiles import (
    DeviceTables,
    HostTables,
    SegmentTables,
    tables_from_numbers,
)
from vico.model.batch import Segment
from vico.model.config import LLAMA_CONFIGS

TILE = 16


def on_device(segments: Segments, is_padded: bool) -> DeviceTables:
    tables = HostTables(segments, TILE)
    sizes = tables.padded_sizes if is_padded else tables.own.sizes
    return tables_from_numbers(torch.from_numpy(tables.joined(sizes)), sizes, TILE, True)


def pairs_of_queries(tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """How often each row meets each key, and how often gated, by the query tiles."""
    num_rows = tables.sizes.num_rows
    own_starts_T, is_video_T = tables.by_row.view(-1, 2).unbind(1)
    seen, gated = torch.zeros(2, num_rows, num_rows, dtype=torch.int64).unbind()
    for start, stop, own_first, first, last, after in tables.query_tiles.view(-1, 6).tolist():
        assert stop - start <= TILE
        for row in range(start, stop):
            listed = tables.list_rows[first:last]
            seen[row, listed] += 1
            gated[row, listed] += after * is_video_T[listed]
            own = torch.arange(own_first, stop)
            own = own[(own <= row) & (own >= own_starts_T[row])]
            seen[row, own] += 1
    return seen, gated


def pairs_of_keys(tables: DeviceTables) -> tuple[Tensor, Tensor]:
    """The same by the key pieces and their visits."""
    num_rows = tables.sizes.num_rows
    seen, gated = torch.zeros(2, num_rows, num_rows, dtype=torch.int64).unbind()
    visits = tables.visits.view(-1, 3).tolist()
    for key_start, key_stop, first, last, _ in tables.key_pieces.view(-1, 5).tolist():
        assert key_stop - key_start <= TILE and last - first <= segment_tiles.MAX_VISITS
        for start, stop, is_gated in visits[first:last]:
            assert stop - start <= TILE
            for row in range(start, stop):
                keys = torch.arange(key_start, key_stop)
                keys = keys[keys <= row]
                seen[row, keys] += 1
                gated[row, keys] += is_gated
    return seen, gated


def require_every_pair_once(segments: Segments, is_padded: bool) -> None:
    tables = on_device(segments, is_padded)
    num_rows, num_padded = segments[-1].stop, tables.sizes.num_rows
    visible, gated = torch.zeros(2, num_padded, num_padded, dtype=torch.int64).unbind()
    visible[num_rows:, num_rows:] = 1
    visible = visible.tril()
    visible[:num_rows, :num_rows], gated[:num_rows, :num_rows] = visible_pairs(segments)
    for pairs in (pairs_of_queries(tables), pairs_of_keys(tables)):
        assert torch.equal(pairs[0], visible) and torch.equal(pairs[1], gated)


@pytest.mark.parametrize("is_padded", [False, True])
def test_every_visible_pair_is_met_once(is_padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(12):
        monkeypatch.setattr(segment_tiles, "MAX_VISITS", 1 + seed % 3)
        require_every_pair_once(random_segments(seed), is_padded)


def test_pieces_of_shared_tiles_have_places_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_tiles, "MAX_VISITS", 2)
    first = Segment(0, 20, None, False, False)
    children = [Segment(20 + 30 * i, 50 + 30 * i, 0, False, False) for i in range(3)]
    tables = on_device((first, *children), is_padded=True)
    pieces = tables.key_pieces.view(-1, 5)
    shared = tables.shared_tiles.view(-1, 4)
    taken: list[int] = []
    for start, stop, first_row, count in shared[shared[:, 1] > 0].tolist():
        own = pieces[(pieces[:, 0] == start) & (pieces[:, 1] == stop)]
        assert own[:, 4].tolist() == [first_row + i * (stop - start) for i in range(count)]
        taken += range(first_row, first_row + count * (stop - start))
    assert taken == list(range(len(taken))) and len(taken) <= tables.sizes.num_partial_rows
    assert {tuple(row) for row in shared[:2, :2].tolist()} == {(0, 16), (16, 20)}


def test_options_share_a_tile() -> None:
    """Five options of two rows are one tile of queries, not five."""
    question = Segment(0, 40, None, False, True)
    options = [Segment(40 + 2 * i, 42 + 2 * i, 0, False, True) for i in range(5)]
    tables = SegmentTables((question, *options), TILE)
    assert [tile[:3] for tile in tables.query_tiles[-2:]] == [(32, 40, 0), (40, 50, 40)]


def test_few_sizes_serve_many_micro_batches() -> None:
    work = SyntheticWorkload(300)
    batches = [training_batch(work.training(place, 8)) for place in range(40)]
    sizes = {HostTables(batch.segments, 32).padded_sizes for batch in batches}
    assert len(sizes) <= 12, sizes
    for batch in batches[:3]:
        tables = HostTables(batch.segments, 32)
        padded, own = tables.padded_sizes, tables.own.sizes
        assert padded.num_rows > own.num_rows and padded.num_rows % 128 == 0
        assert len(tables.joined(padded)) == sum(padded.array_lengths)
        assert (np.array(padded) >= np.array(own)).all()
        assert all(number >= 8 and number & (number - 1) == 0 for number in padded[1:])


@pytest.mark.parametrize("num_questions", [8, 28])
def test_bytes_are_a_quarter_of_those_of_varlen(num_questions: int) -> None:
    """By formula, for LLaMA-7B."""
    segments = training_batch(SyntheticWorkload(300).training(0, num_questions)).segments
    config = LLAMA_CONFIGS["7B"]
    by_varlen = attention_bytes.varlen_bytes(segments, config)
    by_segment = attention_bytes.segment_bytes(segments, config, HALF_TILE_ROWS)
    assert sum(by_segment.values()) <= 0.25 * sum(by_varlen.values())
    # 16 times a tensor of the stream is read or written; the rest is angles, tables, partial sums.
    one_tensor = segments[-1].stop * config.heads_dim * 2
    assert 16 <= sum(by_segment.values()) / one_tensor <= 17


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run it")
def test_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match="--attention segment: needs Triton and a GPU"):
        choose_attention("segment", torch.device("cpu"), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_without_a_gpu(capability: int, tmp_path: Path) -> None:
    """As LLaMA-7B's attention needs them, with what a GPU of this kind has of shared memory."""
    pytest.importorskip("triton")
    program = Path(__file__).parents[1] / "support" / "compile_segment_kernels.py"
    root = Path(__file__).resolve().parents[2]
    environment = {"PYTHONPATH": str(root), "TRITON_CACHE_DIR": str(tmp_path), "PATH": "/usr/bin"}
    ended = subprocess.run(
        [sys.executable, str(program), str(capability)],
        env=environment,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert ended.stdout.count("shared") == 12, ended.stdout
