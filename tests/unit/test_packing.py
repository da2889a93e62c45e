"""The packed stream keeps every sequence whole: seen from a row, its past is its sequence's past."""

from collections.abc import Iterable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.attention.masks import MaskBlock, attention_mask, restrict_queries
from vico.model.batch import PackedBatch

SLOTS = 3


def sequences() -> st.SearchStrategy[Example]:
    """Sequences over few tokens, so that they share beginnings of every length."""

    def build(head: list[int], tail: list[int], clip: int, qav: bool) -> Example:
        if qav:
            tokens, start = [1, *head, *[VIDEO_SLOT] * SLOTS, 2], 1 + len(head)
            return Example(
                TokenSequence("qav", tuple(tokens), range(start, start + SLOTS), start), clip, 1
            )
        tokens, start = [1, *head, *[VIDEO_SLOT] * SLOTS, *tail, 2], 1 + len(head)
        return Example(
            TokenSequence(
                "vqa", tuple(tokens), range(start + SLOTS + len(tail) // 2, len(tokens)), start
            ),
            clip,
            0,
        )

    tokens = st.lists(st.integers(3, 4), max_size=12)
    return st.builds(build, tokens, tokens, st.integers(0, 1), st.booleans())


def pasts(batch: PackedBatch) -> list[list[int]]:
    """Of each row, the rows it sees, in order."""
    chains = {}
    for i, segment in enumerate(batch.segments):
        before = [] if segment.parent is None else chains[segment.parent]
        chains[i] = before + list(range(segment.start, segment.stop))
    return [
        chains[i][: len(chains[i]) - (s.stop - s.start) + r + 1]
        for i, s in enumerate(batch.segments)
        for r in range(s.stop - s.start)
    ]


@given(st.lists(sequences(), min_size=1, max_size=8), st.booleans())
@settings(max_examples=200)
def test_every_target_sees_exactly_its_sequence(examples: list[Example], share: bool) -> None:
    batch = pack(examples, torch.zeros(2, SLOTS, 768), share)
    past = pasts(batch)
    frames = torch.full((batch.num_rows,), -1)
    frames[batch.slot_rows_S] = batch.slot_frames_S
    rows = batch.wanted_rows_R[torch.cat([batch.token_targets_N, batch.frame_targets_M])].tolist()
    wanted = torch.cat([batch.token_target_ids_N, batch.frame_target_ids_M]).tolist()
    segment_of = [s for s in batch.segments for _ in range(s.start, s.stop)]
    seen: dict[int, list[int]] = {}
    for row, target, place, task in zip(
        rows, wanted, batch.target_sequences.tolist(), batch.target_tasks.tolist(), strict=True
    ):
        sequence, clip = examples[place].sequence, examples[place].clip
        position = len(past[row])
        seen.setdefault(place, []).append(position)
        slots = range(sequence.video_start, sequence.video_start + SLOTS)
        assert task == examples[place].task
        assert target == (
            position - sequence.video_start if sequence.task == "qav" else sequence.tokens[position]
        )
        for p, r in enumerate(past[row]):
            assert batch.positions_T[r] == p
            assert segment_of[r].is_video == (p in slots) and segment_of[r].after_video == (
                p >= slots.stop
            )
            assert (
                frames[r] == clip * SLOTS + p - slots.start
                if p in slots
                else batch.token_ids_T[r] == sequence.tokens[p]
            )
    assert seen == {
        i: list(e.sequence.targets) for i, e in enumerate(examples) if len(e.sequence.targets)
    }
    assert batch.num_real_tokens == sum(len(e.sequence.tokens) for e in examples)
    if not share:
        assert batch.num_rows == sum(e.sequence.num_inputs for e in examples)


def seen_rows(blocks: Iterable[MaskBlock], num_queries: int) -> list[list[int]]:
    """Of each asking row, the rows that the blocks show it."""
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
    assert [sorted(rows) for rows in seen_rows(whole.blocks, batch.num_rows)] == [
        sorted(rows) for rows in past
    ]
    asking = sorted(data.draw(st.sets(st.integers(0, batch.num_rows - 1), min_size=1)))
    some = restrict_queries(whole, torch.tensor(asking))
    assert [sorted(rows) for rows in seen_rows(some.blocks, len(asking))] == [
        sorted(past[row]) for row in asking
    ]
    segment_of = [s for s in batch.segments for _ in range(s.start, s.stop)]
    for block in whole.blocks:
        q, k = segment_of[block.q_start], segment_of[block.k_start]
        assert block.gated == (q.after_video and k.is_video)


def options(prompt: list[int]) -> list[Example]:
    """Five options behind `prompt`, whose slots begin at 4."""
    return [
        Example(
            TokenSequence("vqa", (*prompt, 20 + a, 10, 2), range(len(prompt), len(prompt) + 3), 4),
            0,
            0,
        )
        for a in range(5)
    ]


def test_options_hang_off_one_prompt() -> None:
    head = [1, 5, 6, 7, *[VIDEO_SLOT] * SLOTS, 6, 7, 8, 9]
    batch = pack(options(head), torch.zeros(1, SLOTS, 768))
    assert [s.stop - s.start for s in batch.segments] == [4, SLOTS, 4, 2, 2, 2, 2, 2]
    blocks = attention_mask(batch.segments).blocks
    assert [(b.q_stop - b.q_start, b.count) for b in blocks if b.causal] == [
        (4, 1),
        (3, 1),
        (4, 1),
        (10, 5),
    ]
    assert [
        (b.q_stop - b.q_start, b.k_stop - b.k_start, b.gated) for b in blocks if not b.causal
    ] == [
        (17, 4, False),
        (14, 3, True),
        (10, 4, False),
    ]


def test_questions_of_a_video_share_it_and_their_options_share_the_question() -> None:
    """Also where two questions begin alike by fewer tokens than are worth a segment."""
    head = [1, 5, 6, 7, *[VIDEO_SLOT] * SLOTS, 8]
    examples = [e for q in range(3) for e in options([*head, 30 + q, *range(40, 80)])]
    batch = pack(examples, torch.zeros(1, SLOTS, 768))
    assert [s.stop - s.start for s in batch.segments] == [4, SLOTS, 42, 42, 42, *[2] * 15]
    assert [s.parent for s in batch.segments] == [None, 0, 1, 1, 1, *[2] * 5, *[3] * 5, *[4] * 5]
