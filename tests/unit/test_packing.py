"""The packed stream keeps every sequence whole: a row sees its own sequence's past."""

from collections.abc import Iterable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vico.data.packing import COST_OF_SHARING, Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.attention.masks import MaskBlock, attention_mask, restrict_queries
from vico.model.batch import PackedBatch, Segment

SLOTS = 3


def sequences() -> st.SearchStrategy[Example]:
    """Sequences over few tokens, so that they share beginnings of every length."""

    def build(head: list[int], tail: list[int], clip: int, qav: bool) -> Example:
        start = 1 + len(head)
        before = (1, *head, *[VIDEO_SLOT] * SLOTS)
        if qav:
            targets = range(start, start + SLOTS)
            return Example(TokenSequence("qav", (*before, 2), targets, start), clip, 1)
        tokens = (*before, *tail, 2)
        targets = range(start + SLOTS + len(tail) // 2, len(tokens))
        return Example(TokenSequence("vqa", tokens, targets, start), clip, 0)

    tokens = st.lists(st.integers(3, 4), max_size=12)
    return st.builds(build, tokens, tokens, st.integers(0, 1), st.booleans())


def pasts(batch: PackedBatch) -> list[list[int]]:
    """Of each row, the rows it sees, in order."""
    rows_through: list[list[int]] = []  # of each segment: the rows of its ancestors, and its own
    visible = []
    for segment in batch.segments:
        before = [] if segment.parent is None else rows_through[segment.parent]
        rows_through.append(before + list(range(segment.start, segment.stop)))
        for row in range(segment.start, segment.stop):
            visible.append(before + list(range(segment.start, row + 1)))
    return visible


def segment_of_rows(batch: PackedBatch) -> list[Segment]:
    """Of each row, its segment."""
    return [segment for segment in batch.segments for _ in range(segment.start, segment.stop)]


@given(st.lists(sequences(), min_size=1, max_size=8), st.booleans())
@settings(max_examples=200)
def test_every_target_sees_exactly_its_sequence(examples: list[Example], share: bool) -> None:
    batch = pack(examples, torch.zeros(2, SLOTS, 768), share)
    past = pasts(batch)
    frames = torch.full((batch.num_rows,), -1)
    frames[batch.slot_rows_S] = batch.slot_frames_S
    rows = batch.wanted_rows_R[torch.cat([batch.token_rows_N, batch.frame_rows_M])].tolist()
    target_ids = torch.cat([batch.token_target_ids_N, batch.frame_target_ids_M]).tolist()
    places, tasks = batch.target_sequences.tolist(), batch.target_tasks.tolist()
    segment_of = segment_of_rows(batch)
    seen: dict[int, list[int]] = {}
    for row, target, place, task in zip(rows, target_ids, places, tasks, strict=True):
        sequence, clip = examples[place].sequence, examples[place].clip
        position = len(past[row])
        seen.setdefault(place, []).append(position)
        slots = range(sequence.video_start, sequence.video_start + SLOTS)
        assert task == examples[place].task
        if sequence.task == "qav":
            assert target == position - sequence.video_start
        else:
            assert target == sequence.tokens[position]
        for p, r in enumerate(past[row]):
            assert batch.positions_T[r] == p
            assert segment_of[r].is_video == (p in slots)
            assert segment_of[r].after_video == (p >= slots.stop)
            if p in slots:
                assert frames[r] == clip * SLOTS + p - slots.start
            else:
                assert batch.token_ids_T[r] == sequence.tokens[p]
    expected = {i: list(e.sequence.targets) for i, e in enumerate(examples)}
    assert seen == {i: targets for i, targets in expected.items() if targets}
    assert batch.num_real_tokens == sum(len(e.sequence.tokens) for e in examples)
    if not share:
        assert batch.num_rows == sum(e.sequence.num_inputs for e in examples)


def seen_rows(blocks: Iterable[MaskBlock], num_queries: int) -> list[list[int]]:
    """Of each query row, the rows that the blocks show it."""
    shown: list[list[int]] = [[] for _ in range(num_queries)]
    for block in blocks:
        assert shown[block.q_start] == [] or not block.causal, "a row's triangle comes first"
        size = (block.q_stop - block.q_start) // block.count
        for q in range(block.q_start, block.q_stop):
            i = q - block.q_start
            own = range(block.k_start + i - i % size, block.k_start + i + 1)
            shown[q] += own if block.causal else range(block.k_start, block.k_stop)
    return shown


@given(st.lists(sequences(), min_size=1, max_size=8), st.booleans(), st.data())
def test_blocks_show_each_row_its_past_once(
    examples: list[Example], share: bool, data: st.DataObject
) -> None:
    batch = pack(examples, torch.zeros(2, SLOTS, 768), share)
    past, whole = pasts(batch), attention_mask(batch.segments)
    shown = seen_rows(whole.blocks, batch.num_rows)
    assert list(map(sorted, shown)) == list(map(sorted, past))
    queries = sorted(data.draw(st.sets(st.integers(0, batch.num_rows - 1), min_size=1)))
    restricted = restrict_queries(whole, torch.tensor(queries))
    shown = seen_rows(restricted.blocks, len(queries))
    assert list(map(sorted, shown)) == [sorted(past[row]) for row in queries]
    segment_of = segment_of_rows(batch)
    for block in whole.blocks:
        q, k = segment_of[block.q_start], segment_of[block.k_start]
        assert block.gated == (q.after_video and k.is_video)


def options(prompt: list[int]) -> list[Example]:
    """Five options after `prompt`, whose slots begin at 4."""
    targets = range(len(prompt), len(prompt) + 3)
    sequences = [TokenSequence("vqa", (*prompt, 20 + a, 10, 2), targets, 4) for a in range(5)]
    return [Example(sequence, 0, 0) for sequence in sequences]


def test_options_share_the_prompt() -> None:
    head = [1, 5, 6, 7, *[VIDEO_SLOT] * SLOTS, 6, 0, 8, 9]  # 0 is a token too
    batch = pack(options(head), torch.zeros(1, SLOTS, 768))
    assert [s.stop - s.start for s in batch.segments] == [4, SLOTS, 4, 2, 2, 2, 2, 2]
    blocks = attention_mask(batch.segments).blocks
    causal = [(b.q_stop - b.q_start, b.count) for b in blocks if b.causal]
    assert causal == [(4, 1), (3, 1), (4, 1), (10, 5)]
    full = [b for b in blocks if not b.causal]
    sizes = [(b.q_stop - b.q_start, b.k_stop - b.k_start, b.gated) for b in full]
    assert sizes == [(17, 4, False), (14, 3, True), (10, 4, False)]


def test_questions_share_the_video() -> None:
    """Options share the question, also where questions share too few tokens for a segment."""
    head = [1, 5, 6, 7, *[VIDEO_SLOT] * SLOTS, 8]
    examples: list[Example] = []
    for q in range(3):
        examples += options([*head, 30 + q, *range(40, 80)])
    batch = pack(examples, torch.zeros(1, SLOTS, 768))
    assert [s.stop - s.start for s in batch.segments] == [4, SLOTS, 42, 42, 42, *[2] * 15]
    assert [s.parent for s in batch.segments] == [None, 0, 1, 1, 1, *[2] * 5, *[3] * 5, *[4] * 5]


def test_what_ends_where_another_goes_on_is_shared() -> None:
    """Each of two sequences that end there saves its rows, so more rows below are worth it.

    The last token of the head is a node of its own.
    """
    head = [1, 5, 6, 7, *[VIDEO_SLOT] * SLOTS, 8]
    num_below = COST_OF_SHARING + 1
    examples: list[Example] = []
    for rest in ((), (), range(40, 40 + num_below)):
        tokens = (*head, *rest, 2)
        examples.append(Example(TokenSequence("vqa", tokens, range(8, len(tokens)), 4), 0, 0))
    assert pack(examples[1:], torch.zeros(1, SLOTS, 768)).num_rows > len(head) + num_below
    assert pack(examples, torch.zeros(1, SLOTS, 768)).num_rows == len(head) + num_below
