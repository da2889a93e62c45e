"""The visible pairs of a packed stream, as attention's blocks and its kernels' lengths say them."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from support.segment_trees import Segments, random_segments, visible_pairs
from vico.model.attention.masks import AttentionMask, attention_mask, restrict_queries
from vico.model.attention.segment_layout import LayoutSizes, segment_layout
from vico.model.attention.varlen import gate_unit, widen_heads
from vico.model.batch import Segment

every_tree = pytest.mark.parametrize("seed", range(12))


def pairs_of_blocks(mask: AttentionMask, num_queries: int, num_rows: int) -> tuple[Tensor, Tensor]:
    """How often each query meets each row, and how often gated."""
    seen, gated = torch.zeros(2, num_queries, num_rows, dtype=torch.int64).unbind()
    has_triangle = torch.zeros(num_queries, dtype=torch.bool)
    for block in mask.blocks:
        queries = torch.arange(block.q_start, block.q_stop).chunk(block.count)
        keys = torch.arange(block.k_start, block.k_stop).chunk(block.count)
        for q, k in zip(queries, keys, strict=True):
            is_seen = torch.ones(len(q), len(k), dtype=torch.int64)
            if block.causal:
                assert len(q) == len(k) and not has_triangle[q].any() and not block.gated
                has_triangle[q] = True
                is_seen = is_seen.tril()
            assert has_triangle[q].all(), "its triangle is a row's first block"
            seen[q[0] : q[-1] + 1, k[0] : k[-1] + 1] += is_seen
            gated[q[0] : q[-1] + 1, k[0] : k[-1] + 1] += is_seen * block.gated
    return seen, gated


@every_tree
def test_blocks_meet_every_visible_pair_once(seed: int) -> None:
    """Of all rows, and of some of them."""
    segments = random_segments(seed, (1, 2, 3, 5))
    num_rows, visible = segments[-1].stop, visible_pairs(segments)
    mask = attention_mask(segments)
    for found, wanted in zip(pairs_of_blocks(mask, num_rows, num_rows), visible, strict=True):
        assert torch.equal(found, wanted.long())
    for share in (0.3, 0.8):
        numbers = random.Random(seed)
        rows = [row for row in range(num_rows) if numbers.random() < share] or [0]
        part = restrict_queries(mask, torch.tensor(rows))
        assert part.query_rows is not None and part.query_rows.tolist() == rows
        for found, wanted in zip(pairs_of_blocks(part, len(rows), num_rows), visible, strict=True):
            assert torch.equal(found, wanted[rows].long())


def question(num_options: int, first_option_rows: int = 2) -> Segments:
    """A video of 4 rows, a question of 10 after it, and options of 2."""
    stops = [14, 14 + first_option_rows]
    stops += [stops[-1] + 2 * i for i in range(1, num_options)]
    segments = [Segment(0, 4, None, True, False), Segment(4, 14, 0, False, True)]
    for start, stop in itertools.pairwise(stops):
        segments.append(Segment(start, stop, 1, False, True))
    return tuple(segments)


def test_options_are_one_block() -> None:
    """Neighbours of one size share a triangle; all rows after the video share a rectangle."""
    blocks = attention_mask(question(5)).blocks
    assert [block.count for block in blocks if block.causal] == [1, 1, 5]
    rectangles = {
        (b.q_start, b.q_stop, b.k_start, b.k_stop, b.gated) for b in blocks if not b.causal
    }
    assert len(blocks) == 5 and rectangles == {(4, 24, 0, 4, True), (14, 24, 4, 14, False)}
    blocks = attention_mask(question(5, first_option_rows=3)).blocks
    assert [block.count for block in blocks if block.causal] == [1, 1, 1, 4]


@every_tree
def test_keys_of_every_segment(seed: int) -> None:
    """Without padding, and with a segment of it that only its own rows see."""
    segments = random_segments(seed)
    visible, gated = visible_pairs(segments)
    layout = segment_layout(segments)
    for sizes in (layout.sizes, layout.padded_sizes):
        arrays = layout.arrays(sizes)
        assert tuple(map(len, arrays)) == sizes.array_lengths
        ends = zip(arrays.cu_seqlens_q, arrays.cu_seqlens_q[1:], strict=False)
        key_ends = zip(arrays.cu_seqlens_k, arrays.cu_seqlens_k[1:], strict=False)
        for segment, q, k in zip(segments, ends, key_ends, strict=False):
            assert q == (segment.start, segment.stop)
            keys = arrays.key_rows[slice(*k)]
            assert sorted(keys) == visible[segment.stop - 1].nonzero()[:, 0].tolist()
            assert list(keys[-segment.num_rows :]) == list(range(segment.start, segment.stop))
            is_gated = arrays.after_video[segment.start] * arrays.is_video[keys]
            assert np.array_equal(is_gated, gated[segment.stop - 1, keys].numpy())
        assert arrays.cu_seqlens_q[-1] == sizes.num_rows == len(arrays.own_keys)
        assert arrays.cu_seqlens_k[-1] == sizes.num_keys
        assert list(arrays.key_rows[arrays.own_keys]) == list(range(sizes.num_rows))
        rows, counts = np.unique(arrays.key_rows, return_counts=True)
        shared = set(rows[(counts > 1) & (rows < layout.num_rows)])
        assert set(arrays.shared_rows) - {layout.num_rows} == shared


def test_sizes_of_a_layout() -> None:
    """By hand; padding is a segment of its own, with one row at least."""
    layout = segment_layout(question(5))
    keys = 4 + 14 + 5 * 16
    assert layout.sizes == LayoutSizes(24, keys, 14, 7, max_seqlen_q=64, max_seqlen_k=64)
    rounded = LayoutSizes(128, 128 + 256, 128, 32, max_seqlen_q=256, max_seqlen_k=512)
    assert layout.padded_sizes == rounded
    two = (Segment(0, 60, None, False, False), Segment(60, 128, 0, False, False))
    longest = segment_layout(two)
    assert longest.sizes == LayoutSizes(128, 188, 60, 2, max_seqlen_q=128, max_seqlen_k=128)
    assert longest.padded_sizes.num_rows == 256


@pytest.mark.parametrize("width", [14, 16, 32, 64, 80, 96, 128, 256])
def test_what_a_video_key_carries(width: int) -> None:
    """A power of two near sqrt(d): times it, no number is rounded."""
    unit = gate_unit(width)
    assert math.frexp(unit)[0] == 0.5 and abs(math.log2(unit**2 / width)) <= 1 + 1e-9


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-15)])
def test_widened_heads_add_the_gate(dtype: torch.dtype, rtol: float) -> None:
    """sqrt(d) gate2 to the product of a row after the video and a video's key, and to no other."""
    width, num_extra, gate2_H = 14, 10, torch.tensor([0.7, -3.1])
    q, k, v = torch.zeros(3, 4, 2, width, dtype=dtype)
    v = v + 1
    after, is_video = torch.tensor([0, 0, 1, 1]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    rows_K = torch.tensor([0, 1, 2, 3, 0])
    wide = widen_heads(q, k, v, gate2_H, after, is_video, rows_K, gate_unit(width), num_extra)
    assert [x.shape for x in wide] == [(4, 2, 24), (5, 2, 24), (5, 2, 24)]
    scores = torch.einsum("qhd,khd->hqk", *(x.double() for x in wide[:2]))
    is_gated = after[:, None] & is_video[rows_K]
    expected = math.sqrt(width) * gate2_H.double()[:, None, None] * is_gated
    assert torch.allclose(scores, expected, rtol=rtol, atol=0)
    assert (wide[2][..., :width] == 1).all() and not wide[2][..., width:].any()
