"""What is scored under each condition of `vico ablate`, and of questions by their text alone."""

import contextlib
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest

from faults.emulated_ranks import ALONE
from support.errors import refusal
from vico.data.micro_batches import DatasetInputs
from vico.data.types import Question
from vico.train import ablation, cognition
from vico.train.ablation import CONDITIONS, ablate, swap_videos
from vico.train.build import Inputs
from vico.train.cognition import scores_without_video, without_video
from vico.train.config import RunConfig

CONFIG = RunConfig(split="test", max_feats=7)


class Prompts:
    def __init__(self, has_video: bool = True) -> None:
        self.has_video = has_video

    def without_video(self) -> "Prompts":
        return Prompts(has_video=False)


def ask(index: int, video: str, rows: tuple[int, int] | None = None, dataset: str = "") -> Question:
    options = ("a", "b")
    return Question(index, str(index), video, "CW", "why", options, 0, rows, dataset=dataset)


QUESTIONS = [ask(0, "v"), ask(1, "w")]


def inputs_of(questions: list[Question]) -> Inputs:
    """Of two data sets with features, prompts and captions."""
    datasets: dict[str, Any] = {}
    for name in ("my", "other"):
        parts: Any = (f"features of {name}", Prompts(), {"v": "a man"})
        datasets[name] = DatasetInputs(*parts)
    given: dict[str, Any] = {field.name: None for field in fields(Inputs) if field.init}
    return Inputs(**{**given, "datasets": datasets, "questions": {"test": questions}})


class Engine:
    are_closed = False

    @contextlib.contextmanager
    def closed_gates(self) -> Iterator[None]:
        self.are_closed = True
        yield
        self.are_closed = False


class Scored:
    """In the place of `score`: what it is given; its result is the number of the call."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(
        self,
        engine: Engine,
        inputs: Inputs,
        questions: Any,
        label: str,
        *others: Any,
        num_slots: int,
    ) -> Any:
        assert others == (CONFIG, ALONE)
        prompts: Any = inputs.datasets["other"].prompts
        videos = "".join(question.video for question in questions)
        self.calls.append((label, videos, prompts.has_video, num_slots, engine.are_closed))
        return f"scores {len(self.calls)}"


def test_inputs_without_video() -> None:
    """Prompts without slots and no captions; the features are there to be looked up."""
    inputs = inputs_of(QUESTIONS)
    bare = without_video(inputs)
    assert [*bare.datasets] == ["my", "other"]
    for name, own in bare.datasets.items():
        prompts: Any = own.prompts
        assert (prompts.has_video, own.captions) == (False, {})
        assert own.features is inputs.datasets[name].features


def test_questions_by_their_text_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The frozen model is the one with closed gates; without slots there is no video."""
    scored = Scored()
    engine: Any = Engine()
    monkeypatch.setattr(cognition, "score", scored)
    found: Any = scores_without_video(engine, inputs_of(QUESTIONS), CONFIG, ALONE)
    assert found == ("scores 2", "scores 1"), "frozen, adapted"
    label = "test (without video)"
    assert scored.calls == [(label, "vw", False, 0, False), (label, "vw", False, 0, True)]


def test_what_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thing at a time, then both; accuracies are over the questions as they are."""
    scored, engine, inputs = Scored(), Engine(), inputs_of(QUESTIONS)
    monkeypatch.setattr(ablation, "score", scored)
    monkeypatch.setattr(ablation, "evaluate", lambda *given: ("evaluated", *given))
    monkeypatch.setattr(ablation, "summarize_split", lambda *given: given)
    found: Any = ablate(engine, inputs, CONFIG, ALONE)  # type: ignore[arg-type]
    assert found == {
        "as_trained": ("evaluated", engine, inputs, "test", CONFIG, ALONE),
        **{
            name: (inputs, "test", CONFIG, f"scores {number}")
            for number, name in enumerate(list(CONDITIONS)[1:], start=1)
        },
    }
    assert scored.calls == [
        ("test (another video's frames)", "wv", True, 7, False),
        ("test (without the video)", "vw", False, 0, False),
        ("test (without adapter prompts)", "vw", True, 7, True),
        ("test (without both)", "vw", False, 0, True),
    ]


def test_clips_go_to_the_next_video() -> None:
    """Of the same data set, in the order of the questions; the last video's to the first."""
    asked = [("u", (0, 2)), ("v", None), ("u", (2, 4)), ("w", (1, 2)), ("u", (0, 2)), ("w", (5, 6))]
    questions = [ask(i, video, rows) for i, (video, rows) in enumerate(asked)]
    found = [(question.video, question.feature_rows) for question in swap_videos(questions)]
    assert found == [
        ("v", None),
        ("w", (1, 2)),
        ("v", None),
        ("u", (0, 2)),
        ("v", None),
        ("u", (2, 4)),
    ]
    other = [ask(7, "x", dataset="b"), ask(8, "y", dataset="b")]
    assert [question.video for question in swap_videos([*questions, *other])][6:] == ["y", "x"]
    single = [ask(0, "x", dataset="b"), ask(1, "u"), ask(2, "v"), ask(3, "x", dataset="b")]
    said = "all 4 questions are about video 'x', so there is no other to show; name a split with"
    assert refusal(swap_videos, single) == f"b: {said} several"
    assert refusal(swap_videos, [ask(0, "u")]).startswith("the split: all 1 questions are about")
