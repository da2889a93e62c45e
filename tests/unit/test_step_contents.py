"""What a training step and a forward of an evaluation hold, to the token."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.letters import Letters, ask, clips, prompts_of, read
from vico.data.batching import TrainingSteps
from vico.data.epoch_order import EpochOrder
from vico.data.evaluation_batches import EvaluationChunks
from vico.data.micro_batches import DatasetInputs
from vico.data.mixture import parse_datasets
from vico.data.packing import Example, pack
from vico.data.prompts import crop_candidates
from vico.data.text_windows import KEPT_TOKENS, KeptTexts, Text, TextChunks, Texts, text_sequence
from vico.data.text_windows import windows as windows_of
from vico.data.types import Question
from vico.errors import UserError
from vico.model.batch import PackedBatch
from vico.model.config import KEPT_POSITIONS

SLOTS = 2


def inputs_of(
    questions: Sequence[Question], captions: dict[str, str] | None = None
) -> dict[str, DatasetInputs]:
    """Of the data sets of the questions."""
    features, prompts = clips(*questions), prompts_of(Letters(), SLOTS)
    names = {q.dataset for q in questions}
    return {name: DatasetInputs(features, prompts, captions or {}) for name in names}


def steps_of(
    questions: Sequence[Question], captions: dict[str, str] | None = None, **given: Any
) -> TrainingSteps:
    """In file order, of one rank and one question a micro-batch, if not told otherwise."""
    usual: dict[str, Any] = {"num_slots": SLOTS, "tasks": ("vqa", "cap"), "micro_batch_size": 1}
    usual |= {"accumulation": 1, "rank": 0, "world_size": 1, "seed": 5}
    usual |= {"shuffle": False, "crop": False}
    choices = parse_datasets(",".join(dict.fromkeys(q.dataset for q in questions)))
    return TrainingSteps(questions, inputs_of(questions, captions), choices, **usual | given)


def targets_of(batch: PackedBatch, task: int) -> str:
    """The targets of a task, as letters."""
    return read(batch.token_target_ids_N[batch.target_tasks == task].tolist())


# ---- steps --------------------------------------------------------------------------------------


def test_a_step_takes_the_next_questions() -> None:
    """Of 7, three micro-batches of two take six; the last step takes the rest."""
    questions = [ask(i) for i in range(7)]
    steps = steps_of(questions, micro_batch_size=2, accumulation=3)
    assert (steps.questions_per_step, steps.steps_per_epoch) == (6, 2)
    first, last = steps[0, 0], steps[0, 1]
    assert first.names == tuple(f"v{i}/q{i}" for i in range(6)) and last.names == ("v6/q6",)
    assert (len(first.micro_batches), len(last.micro_batches)) == (3, 1)
    assert first.dummy is last.dummy is None
    assert targets_of(last.micro_batches[0], 0) == " (B)$" and last.error is None
    assert last.target_counts.tolist() == [5, 0] and last.target_counts.dtype == torch.int64
    size = len(prompts_of(Letters(), SLOTS).vqa(questions[0], 1).tokens)
    assert first.num_real_tokens == 6 * size
    assert steps_of(questions[:6], micro_batch_size=2, accumulation=3).steps_per_epoch == 1


def test_questions_are_named() -> None:
    """By their data set too, where there are several."""
    questions = [ask(0), ask(1, dataset="b")]
    assert steps_of(questions, micro_batch_size=2)[0, 0].names == ("a/v0/q0", "b/v1/q1")


@pytest.mark.parametrize(
    ("crop", "second", "expected"),
    [(False, 70, ["03", "12"]), (True, 70, ["13", "02"]), (True, 50, ["03", "12"])],
)
def test_ranks_get_about_equal_lengths(crop: bool, second: int, expected: list[str]) -> None:
    """By letters, with the whole caption, or half of one that is cropped: 110 or 60 of the first.

    The longest question comes first, each to the rank that has less.
    """
    lengths = (10, second, 30, 20)
    questions = [ask(i, question="w" * (n - 2)) for i, n in enumerate(lengths)]
    shares = []
    for rank in range(2):
        steps = steps_of(
            questions, {"v0": "c" * 100}, crop=crop, micro_batch_size=2, rank=rank, world_size=2
        )
        assert steps.questions_per_step == 4
        shares.append("".join(name[-1] for name in steps[0, 0].names))
    assert shares == expected


def test_the_dummy_of_a_rank() -> None:
    """The first question of the step alone, and a text for the frozen model; targets of no task."""
    questions = [ask(0, "who is it"), ask(1)]
    steps = steps_of(questions, {"v0": "a caption"}, world_size=2, rank=1)
    dummy = steps[0, 0].dummy
    assert dummy is not None and dummy.texts is None
    assert dummy.num_real_tokens == len(prompts_of(Letters(), SLOTS).vqa(questions[0], 1).tokens)
    assert dummy.target_tasks.tolist() == [2] * 5 and dummy.features_VFC[:, 0, 0].tolist() == [1.0]

    tasks = ("vqa", "cap", "keep")
    kept = KeptTexts(Texts((Text(Path("t"), [7, 8, 9], 3),), bos=1, window=9))
    dummy = steps_of(questions, world_size=2, tasks=tasks, kept=kept)[0, 0].dummy
    assert dummy is not None and dummy.texts is not None
    assert dummy.target_tasks.tolist() == [3] * (5 + 3)
    assert dummy.texts.token_target_ids_N.tolist() == [7, 8, 9]
    assert dummy.texts.features_VFC.shape == (0, SLOTS, 2)


CAPTION = "First. Second. Third. Fourth. Fifth."


def test_captions_are_cropped_by_seed_epoch_and_question() -> None:
    """A run that goes on, or is repeated, gets the same ones, with a later version too."""
    questions = [ask(i) for i in range(6)]
    captions = {q.video: CAPTION for q in questions}
    steps = steps_of(questions, captions, crop=True, seed=11)
    starts = crop_candidates(CAPTION)
    assert starts == [0, 7, 15, 22]
    said = set()
    for epoch in (0, 1, 2):
        for i, _ in enumerate(questions):
            rng = np.random.default_rng([11, epoch, i])
            expected = CAPTION[starts[rng.integers(4)] :]
            (batch,) = steps[epoch, i].micro_batches
            # The blank before it and its first two letters are context.
            assert targets_of(batch, 1) == expected[2:] + "\n$"
            said.add(expected)
    assert len(said) == 4
    (whole,) = steps_of(questions, captions)[0, 0].micro_batches
    assert targets_of(whole, 1) == CAPTION[2:] + "\n$"


def test_a_video_without_a_caption_has_the_other_tasks() -> None:
    questions = [ask(0), ask(1)]
    steps = steps_of(questions, {"v1": "a dog"}, micro_batch_size=2)
    (batch,) = steps[0, 0].micro_batches
    assert steps[0, 0].target_counts.tolist() == [10, 5]
    assert targets_of(batch, 0) == " (B)$" * 2 and targets_of(batch, 1) == "dog\n$"


def test_kept_texts_follow_from_seed_epoch_and_question() -> None:
    text = Text(Path("t"), list(range(100, 100 + 3 * KEPT_TOKENS)), 1)
    kept = KeptTexts(Texts((text,), bos=1, window=9))
    steps = steps_of([ask(0), ask(1)], tasks=("vqa", "keep"), kept=kept, seed=4)
    for epoch in (0, 3):
        for place in (0, 1):
            (batch,) = steps[epoch, place].micro_batches
            drawn = kept.draw(np.random.default_rng([4, epoch, place, 2]))
            ids = batch.token_target_ids_N[batch.target_tasks == 1]
            assert ids.tolist() == list(drawn.tokens[1:]) and len(ids) == KEPT_TOKENS
    assert KEPT_TOKENS + 1 == KEPT_POSITIONS, "with BOS"
    steps = steps_of([ask(0), ask(1)], tasks=("keep",), kept=kept, micro_batch_size=2)
    (batch,) = steps[0, 0].micro_batches
    assert batch.texts is not None and batch.features_VFC.shape == (2, SLOTS, 2)
    assert batch.texts.features_VFC.shape == (0, SLOTS, 2), "the frozen model sees no clip"


@pytest.mark.parametrize("num_others", [31, 32])
def test_the_longest_is_found_among_32(num_others: int) -> None:
    """By letters, one with many empty options looks short; by tokens it is the longest."""
    odd = ask(99, question="w", options=("",) * 26)
    questions = [odd, *(ask(i, question="w" * 20) for i in range(num_others))]
    batch, number = steps_of(questions).longest()
    longest = odd if num_others == 31 else questions[1]
    tokens = prompts_of(Letters(), SLOTS).vqa(longest, 1).tokens
    assert (batch.num_real_tokens, number) == (len(tokens), 1)


def test_the_longest_has_whole_captions() -> None:
    """As many questions as a micro-batch, or under a budget as a step, if they fit."""
    questions = [ask(i) for i in range(9)]
    captions = {q.video: CAPTION for q in questions}
    prompts = prompts_of(Letters(), SLOTS)
    each = len(prompts.vqa(questions[0], 1).tokens) + len(prompts.caption(CAPTION).tokens)
    given: dict[str, Any] = {"micro_batch_size": 2, "accumulation": 3, "crop": True}
    for budget, number in ((None, 2), (7 * each, 6), (3 * each, 3)):
        batch, found = steps_of(questions, captions, max_tokens=budget, **given).longest()
        assert (found, batch.num_real_tokens) == (number, number * each)


def test_cropped_captions_may_fill_a_budget() -> None:
    """Those of the first two epochs are tried beside the whole one."""
    questions = [ask(0), ask(1)]
    captions = {q.video: CAPTION for q in questions}
    prompts, starts = prompts_of(Letters(), SLOTS), crop_candidates(CAPTION)
    vqa = len(prompts.vqa(questions[0], 1).tokens)
    whole, cropped = vqa + len(prompts.caption(CAPTION).tokens), set[int]()
    given: dict[str, Any] = {"accumulation": 2, "crop": True, "seed": 6}
    for epoch in (0, 1):
        for i in (0, 1):
            rng = np.random.default_rng([6, epoch, i])
            text = CAPTION[starts[rng.integers(4)] :]
            size = vqa + len(prompts.caption(text).tokens)
            batch, found = steps_of(questions, captions, max_tokens=whole + size, **given).longest()
            assert (found, batch.num_real_tokens) == (2, whole + size)
            cropped.add(size)
    assert len(cropped) == 4, "each epoch brings others"


def test_sequences_share_rows_if_they_may() -> None:
    """By default they do."""
    question = ask(0)
    rows = []
    for given in ({}, {"share": True}, {"share": False}):
        steps = steps_of([question, replace(question, index=1)], micro_batch_size=2, **given)
        (batch,) = steps[0, 0].micro_batches
        rows.append(batch.num_rows)
        assert len(batch.features_VFC) == 1, "they are about one clip"
    single = len(prompts_of(Letters(), SLOTS).vqa(question, 1).tokens) - 1
    assert rows == [single, single, 2 * single]


# ---- the order of an epoch ----------------------------------------------------------------------


def test_a_part_of_a_data_set_follows_from_the_seed() -> None:
    """Of 7 questions 3 in each epoch: the first, the next, and the last three of an order.

    It is drawn anew for each cycle of three epochs and each data set.
    """
    choices = parse_datasets("a:0.43,b:0.43")
    names = ["a"] * 7 + ["b"] * 7
    order = EpochOrder(names, choices, seed=8, shuffle=True)
    plain = EpochOrder(names, choices, seed=8, shuffle=False)
    assert len(order) == 6
    for epoch in range(7):
        cycle, part = divmod(epoch, 3)
        expected = []
        for number in (0, 1):
            places = np.random.default_rng([8, cycle, number, 1]).permutation(7) + 7 * number
            expected += places[(0, 3, 4)[part] :][:3].tolist()
        assert sorted(order.places(epoch).tolist()) == sorted(expected)
        first = (0, 3, 4)[part]
        in_file = [*range(first, first + 3), *range(7 + first, 10 + first)]
        assert plain.places(epoch).tolist() == in_file


# ---- evaluations --------------------------------------------------------------------------------


def test_a_chunk_holds_every_option() -> None:
    """Each question's options after one prompt, in their order; losses of one task."""
    questions = [ask(0), ask(1, options=("x", "y", "z"))]
    chunks = EvaluationChunks(
        questions, inputs_of(questions), num_slots=SLOTS, rank=0, world_size=1
    )
    assert len(chunks) == 1 and chunks[0].questions == (0, 1) and chunks[0].error is None
    batch = chunks[0].batch
    assert batch is not None
    assert targets_of(batch, 0) == " (A)$ (B)$ (A)$ (B)$ (C)$"
    assert batch.target_sequences.tolist() == [i for i in range(5) for _ in range(5)]


def test_a_rank_without_a_chunk_runs_the_first_question() -> None:
    """The result is nobody's. An error of its data is given as a value."""
    questions = [ask(0)]
    inputs = inputs_of(questions)
    chunks = EvaluationChunks(questions, inputs, num_slots=SLOTS, rank=1, world_size=2)
    dummy = chunks[0]
    assert len(chunks) == 1 and dummy.questions == () and dummy.batch is not None
    assert targets_of(dummy.batch, 0) == " (A)$ (B)$"
    missing = [ask(0, video="nowhere")]
    chunk = EvaluationChunks(missing, inputs, num_slots=SLOTS, rank=0, world_size=1)[0]
    assert chunk.questions == () and chunk.batch is None and isinstance(chunk.error, UserError)


def test_chunks_of_texts() -> None:
    """Those of the other ranks too; one that has none runs the first window for nobody."""
    texts = [Text(Path("t"), list(range(10, 1500)), 1)]
    made = windows_of(texts, 1, 1001)
    assert [len(window.sequence.tokens) for window in made] == [1001, 491]
    features_0FC = torch.zeros(0, SLOTS, 2)
    chunk = TextChunks(made, features_0FC, 0, 2)[0]
    assert chunk.windows == tuple(made)
    assert chunk.batch.token_target_ids_N.tolist() == texts[0].token_ids
    assert set(chunk.batch.target_tasks.tolist()) == {0}
    assert chunk.batch.num_rows == 1000 + 490, "windows share no row"
    other = TextChunks(made, features_0FC, 1, 2)
    assert len(other) == 1 and other[0].windows == ()
    assert other[0].batch.token_target_ids_N.tolist() == texts[0].token_ids[:1000]
    alike = windows_of([Text(Path("t"), [7, 8, 9], 1)] * 2, 1, 9)
    rows = [
        TextChunks(alike, features_0FC, 0, 1, share)[0].batch.num_rows for share in (False, True)
    ]
    assert rows == [3 + 3, 3]


@pytest.mark.parametrize("depth", [0, 9])
@pytest.mark.parametrize(("num_below", "is_shared"), [(20, True), (21, False)])
def test_a_shared_row_costs_20(num_below: int, is_shared: bool, depth: int) -> None:
    """Two texts share a token, if no more than 20 rows in all follow it.

    They may share it with nobody else, below rows that all share.
    """
    head = (1,) * depth
    lengths = (7, num_below - 7)
    tokens = [(*head, 3, *range(10 * n, 10 * n + k), 2) for n, k in enumerate(lengths, start=1)]
    if depth:
        tokens.append((*head, 4, 2))
    examples = [Example(text_sequence(ids), 0, 0) for ids in tokens]
    batch = pack(examples, torch.zeros(0, SLOTS, 2))
    assert batch.num_rows == depth + num_below + (1 if is_shared else 2) + bool(depth)


def test_token_0_is_text() -> None:
    """At the beginning, too, of a sequence or of a part of it."""
    texts = [text_sequence((0, 5, 0, *rest)) for rest in ((6, 2), (0, 2))]
    batch = pack([Example(text, 0, 0) for text in texts], torch.zeros(0, SLOTS, 2))
    assert [(s.stop - s.start, s.is_video) for s in batch.segments] == [(3, False)] + [
        (1, False)
    ] * 2
    assert batch.token_ids_T.tolist() == [0, 5, 0, 6, 0] and len(batch.slot_rows_S) == 0
