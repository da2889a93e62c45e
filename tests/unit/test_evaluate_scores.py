"""From batches to scores: which forwards a rank runs, and how losses become a table of options."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import EmulatedWorld
from support.errors import refusal
from vico.data.evaluation_batches import Chunk
from vico.data.packing import Example, pack
from vico.data.types import Question, TokenSequence
from vico.distributed import signals
from vico.errors import UserError
from vico.model.batch import PackedBatch
from vico.train import evaluate as module
from vico.train.config import RunConfig
from vico.train.evaluate import ScoredChunk, _gather, _score_chunks, chunk_loader

CPU = torch.device("cpu")
WORLD = EmulatedWorld(0, 1, CPU, None)


def question(index: int, num_options: int, **fields: Any) -> Question:
    options = tuple("abcdef"[:num_options])
    return Question(index, f"q{index}", "v", "CW", "why", options, 0, **fields)


def batch_of(*num_targets: int) -> PackedBatch:
    """A sequence without video for each number of targets."""
    examples = []
    for number in num_targets:
        tokens = (1, *range(3, 3 + number))
        sequence = TokenSequence("vqa", tokens, range(1, 1 + number), len(tokens))
        examples.append(Example(sequence, 0, 0))
    return pack(examples, torch.zeros(0, 1, 4))


class Engine:
    """Every target's loss is the number of the forward."""

    def __init__(self) -> None:
        self.batches: list[int] = []  # targets of each forward
        self.modes: list[bool] = []

    def train(self, mode: bool) -> None:
        self.modes.append(mode)

    def forward(self, batch: PackedBatch) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(len(batch.target_sequences))
        return torch.full((self.batches[-1],), float(len(self.batches)))


def score_chunks(engine: Any, *chunks: Chunk, world: Any = WORLD) -> list[ScoredChunk]:
    batches: Any = chunks
    return _score_chunks(engine, batches, 12, "val", world)


# ---- forwards -----------------------------------------------------------------------------------


def test_every_chunk_is_run_once_without_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses stay with its questions and the sequences of its targets."""
    engine, passed = Engine(), list[str]()
    monkeypatch.setattr(module, "reached", passed.append)
    first, last = Chunk((0, 2), batch_of(2, 1, 3)), Chunk((1,), batch_of(1, 1))
    scored = score_chunks(engine, first, last)
    assert engine.modes == [False] and engine.batches == [6, 2]
    assert passed == ["evaluation"] * 2, "the place where tests of kills end a rank"
    assert [chunk.questions for chunk in scored] == [(0, 2), (1,)]
    assert [chunk.target_sequences_N.tolist() for chunk in scored] == [[0, 0, 1, 2, 2, 2], [0, 1]]
    assert [chunk.losses_N.tolist() for chunk in scored] == [[1.0] * 6, [2.0] * 2]
    said = capsys.readouterr().out
    assert said.splitlines()[0] == "evaluating 12 val questions: 2 batch(s) to do"
    assert "evaluating 12 val questions: batch 1/2  " in said
    score_chunks(Engine(), first, world=replace(WORLD, rank=1))
    assert capsys.readouterr().out == "", "rank 0 alone shows it"


def test_a_rank_with_an_error_goes_on_and_then_says_it() -> None:
    """The others need its forwards. Of several errors it says the first."""
    engine = Engine()
    errors = [Chunk((), None, UserError(said)) for said in ("v1 is damaged", "v2 is damaged")]
    good = Chunk((0,), batch_of(1, 1))
    assert refusal(score_chunks, engine, good, *errors, Chunk((1,), batch_of(2))) == "v1 is damaged"
    assert engine.batches == [2, 2, 2, 2]
    engine = Engine()
    assert refusal(score_chunks, engine, errors[1], good) == "v2 is damaged"
    assert engine.batches == [], "there was no batch to repeat"


@pytest.mark.parametrize(("stop_at", "num_run"), [(1, 8), (8, 8), (9, 16)])
def test_a_stop_is_looked_for_every_eight_batches(
    stop_at: int, num_run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    asked: Any = lambda: 15 if len(engine.batches) >= stop_at else 0  # noqa: E731
    monkeypatch.setattr(signals, "stop_requested", asked)
    with pytest.raises(signals.Stopped) as stopped:
        score_chunks(engine, *[Chunk((0,), batch_of(1))] * 20)
    assert len(engine.batches) == num_run
    assert str(stopped.value) == "stopped in the evaluation of 12 val questions; start it again"


# ---- the table ----------------------------------------------------------------------------------


def scored_chunk(questions: tuple[int, ...], *losses: list[float]) -> ScoredChunk:
    """`losses`: of the targets of each option."""
    sequences = [i for i, of_option in enumerate(losses) for _ in of_option]
    flat = torch.tensor([loss for of_option in losses for loss in of_option])
    return ScoredChunk(questions, np.array(sequences), flat)


def test_a_score_is_the_mean_over_the_targets_of_an_option() -> None:
    """In the place of its question, whatever the order and division of the chunks."""
    questions = [question(0, 2), question(1, 3), question(2, 2)]
    of_2_and_0 = scored_chunk((2, 0), [1.0, 2.0, 6.0], [0.5], [4.0, 5.0], [7.0])
    of_1 = scored_chunk((1,), [0.25, 0.75], [8.0], [1.0, 1.0, 1.0, 2.0])
    expected = [[4.5, 7.0], [0.5, 8.0, 1.25], [3.0, 0.5]]
    assert _gather([of_2_and_0, of_1], questions, WORLD) == expected
    assert _gather([of_1, of_2_and_0], questions, WORLD) == expected


def test_scores_have_the_digits_of_double_precision() -> None:
    """The mean of fp32 losses is not rounded to fp32."""
    third = [0.1, 0.1, 0.2]
    ((score, _),) = _gather([scored_chunk((0,), third, [1.0])], [question(0, 2)], WORLD)
    assert score == sum(np.float32(third).astype(float)) / 3
    assert score != float(np.float32(score))


def test_every_question_is_scored_exactly_once() -> None:
    chunk = scored_chunk((0,), [1.0], [2.0])
    for chunks in ([chunk, chunk], []):
        with pytest.raises(AssertionError, match="every question is scored exactly once"):
            _gather(chunks, [question(0, 2)], WORLD)


# ---- a rank's batches ---------------------------------------------------------------------------


class Slots:
    """In the place of EvaluationChunks: what it is told."""

    def __init__(self, questions: list[Question], datasets: Any, **given: Any) -> None:
        self.given = {"datasets": datasets, "num_questions": len(questions), **given}

    def __len__(self) -> int:
        return 3


@pytest.mark.parametrize(("num_slots", "slots"), [(None, 7), (0, 0), (4, 4)])
def test_a_loader_has_the_share_of_its_rank(
    num_slots: int | None, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the video slots of the run, unless others are asked for: 0 is none."""
    monkeypatch.setattr(module, "EvaluationChunks", Slots)
    inputs: Any = SimpleNamespace(datasets={"nextqa": "its inputs"})
    config, world = RunConfig(max_feats=7, num_workers=0), replace(WORLD, rank=1, size=3)
    made: Any = chunk_loader(inputs, [question(0, 2)] * 5, config, world, num_slots)
    assert made.dataset.given == {
        "datasets": {"nextqa": "its inputs"},
        "num_questions": 5,
        "num_slots": slots,
        "rank": 1,
        "world_size": 3,
    }
    assert list(made.sampler) == [0, 1, 2]
    assert (made.pin_memory, made.num_workers, made.persistent_workers) == (False, 0, False)


def test_batches_are_pinned_for_a_gpu_and_made_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(module, "EvaluationChunks", Slots)
    monkeypatch.setattr(module, "loader", lambda _, *arguments: seen.append(arguments))
    inputs: Any = SimpleNamespace(datasets={})
    config = RunConfig(num_workers=5)
    for device, keeps in (("cpu", False), ("cuda", True)):
        world = replace(WORLD, device=torch.device(device))
        chunk_loader(inputs, [question(0, 2)], config, world, keep_workers=keeps)
    chunk_loader(inputs, [question(0, 2)], config, WORLD)
    assert seen == [
        (range(3), 5, False, False),
        (range(3), 5, True, True),
        (range(3), 5, False, False),
    ]


# ---- what is asked for --------------------------------------------------------------------------


class Checked:
    """A file that is looked at."""

    def __init__(self) -> None:
        self.num_checks = 0

    def check_unchanged(self) -> None:
        self.num_checks += 1


def inputs_of(split: str, *questions: Question) -> Any:
    features = Checked()
    datasets = {"nextqa": SimpleNamespace(features=features)}
    return SimpleNamespace(
        questions={split: list(questions)}, dropped={split: []}, datasets=datasets, files=Checked()
    )


def test_an_evaluation_of_a_split(capsys: pytest.CaptureFixture[str]) -> None:
    """Its files are looked at before and after; batches that are given are used."""
    inputs = inputs_of("test", question(0, 2, dataset="nextqa"), question(1, 2, dataset="nextqa"))
    batches: Any = [Chunk((0,), batch_of(1, 2)), Chunk((1,), batch_of(1, 1))]
    engine: Any = Engine()
    config = RunConfig(dataset="nextqa")
    found = module.evaluate(engine, inputs, "test", config, WORLD, batches)
    assert found.scores == [[1.0, 1.0], [2.0, 2.0]] and found.accuracies["acc"] == 1.0
    assert (inputs.files.num_checks, inputs.datasets["nextqa"].features.num_checks) == (2, 1)
    assert "evaluating 2 test questions: 2 batch(s)" in capsys.readouterr().out


def test_splits_without_questions_or_answers() -> None:
    empty, engine = inputs_of("val"), Engine()
    assert refusal(module.evaluate, engine, empty, "val", RunConfig(), WORLD) == (
        "val: there are no questions to evaluate; name a split that has some"
    )
    answered, unanswered = question(0, 2), replace(question(1, 2), answer=None)
    module.require_answers([answered, replace(answered, answer=1)], "val")
    for questions in ([], [unanswered], [answered, unanswered]):
        assert refusal(module.require_answers, questions, "test") == (
            "--split test: has no questions with answers, so no accuracy; name another"
        )
