"""The packed stream keeps every sequence whole: seen from a row, its past is its sequence's past."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vico.data.packing import Example, pack
from vico.model.attention import visibility
from vico.records import VIDEO_SLOT, PackedBatch, Sequence

SLOTS = 3


def sequences() -> st.SearchStrategy[Example]:
    """Sequences over few tokens, so that they share beginnings of every length."""

    def build(head: list[int], tail: list[int], clip: int, qav: bool) -> Example:
        if qav:
            tokens, start = [1, *head, *[VIDEO_SLOT] * SLOTS, 2], 1 + len(head)
            return Example(Sequence("qav", tuple(tokens), range(start, start + SLOTS), start), clip, 1)
        tokens, start = [1, *head, *[VIDEO_SLOT] * SLOTS, *tail, 2], 1 + len(head)
        return Example(Sequence("vqa", tuple(tokens), range(start + SLOTS + len(tail) // 2, len(tokens)), start), clip, 0)

    tokens = st.lists(st.integers(3, 4), max_size=12)
    return st.builds(build, tokens, tokens, st.integers(0, 1), st.booleans())


def pasts(batch: PackedBatch) -> list[list[int]]:
    """Of each row, the rows it sees, in order."""
    chains = {}
    for i, segment in enumerate(batch.segments):
        before = [] if segment.parent is None else chains[segment.parent]
        chains[i] = before + list(range(segment.start, segment.stop))
    return [chains[i][: len(chains[i]) - (s.stop - s.start) + r + 1] for i, s in enumerate(batch.segments) for r in range(s.stop - s.start)]


@given(st.lists(sequences(), min_size=1, max_size=8), st.booleans())
@settings(max_examples=200)
def test_every_target_sees_exactly_its_sequence(examples: list[Example], share: bool) -> None:
    batch = pack(examples, torch.zeros(2, SLOTS, 768), share)
    past = pasts(batch)
    frames = torch.full((batch.num_rows,), -1)
    frames[batch.slot_rows_S] = batch.slot_frames_S
    rows = torch.cat([batch.head_rows_R[batch.token_target_heads_N], batch.frame_rows_M]).tolist()
    wanted = torch.cat([batch.token_target_ids_N, batch.frame_targets_M]).tolist()
    seen: dict[int, list[int]] = {}
    for row, target, place, task in zip(rows, wanted, batch.target_sequences.tolist(), batch.target_tasks.tolist(), strict=True):
        sequence, clip = examples[place].sequence, examples[place].clip
        position = len(past[row])
        seen.setdefault(place, []).append(position)
        slots = range(sequence.video_start, sequence.video_start + SLOTS)
        assert task == examples[place].task
        assert target == (position - sequence.video_start if sequence.task == "qav" else sequence.tokens[position])
        for p, r in enumerate(past[row]):
            assert batch.positions_T[r] == p
            assert batch.is_video_T[r] == (p in slots) and batch.after_video_T[r] == (p >= slots.stop)
            assert frames[r] == clip * SLOTS + p - slots.start if p in slots else batch.token_ids_T[r] == sequence.tokens[p]
    assert seen == {i: list(e.sequence.targets) for i, e in enumerate(examples) if len(e.sequence.targets)}
    assert batch.num_real_tokens == sum(len(e.sequence.tokens) for e in examples)
    if not share:
        assert batch.num_rows == sum(e.sequence.num_inputs for e in examples)


@given(st.lists(sequences(), min_size=1, max_size=8))
def test_kernel_calls_cover_each_row_once_and_show_its_past(examples: list[Example]) -> None:
    batch = pack(examples, torch.zeros(2, SLOTS, 768))
    past, covered = pasts(batch), []
    for call in visibility(batch).calls:
        own = [r for i in call.own for r in range(batch.segments[i].start, batch.segments[i].stop)]
        keys = [r for i in call.ancestors for r in range(batch.segments[i].start, batch.segments[i].stop)] + own
        mask = torch.ones(len(own), len(keys)).tril_().bool() if call.mask is None else call.mask
        assert mask.shape == (len(own), len(keys))
        for q, row in enumerate(own):
            assert [k for k, visible in zip(keys, mask[q].tolist(), strict=True) if visible] == past[row]
        covered += own
    assert covered == list(range(batch.num_rows))


def test_options_hang_off_one_prompt() -> None:
    head = [1, 5, *[VIDEO_SLOT] * SLOTS, 6, 7, 8, 9]
    options = [Example(Sequence("vqa", (*head, 20 + a, 10, 2), range(len(head), len(head) + 3), 2), 0, 0) for a in range(5)]
    batch = pack(options, torch.zeros(1, SLOTS, 768))
    assert [s.stop - s.start for s in batch.segments] == [len(head), 2, 2, 2, 2, 2]
    assert len(visibility(batch).calls) == 2, "the prompt, then all branches in one call"
