"""Asked questions: the scores of an evaluation bit for bit, probabilities, and what is refused."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from support.asked_world import FRAMES, AskedWorld
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.data.features import Features, FeaturesInMemory
from vico.data.readers import schema
from vico.data.types import Question
from vico.distributed.world import World
from vico.train.asking import Answer, AskedModel
from vico.train.build import build_engine
from vico.train.evaluate import evaluate
from vico.train.saved_run import read_for_evaluation
from vico.train.start import open_evaluation


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("asked"), toy)


@pytest.fixture(scope="module")
def model(asked: AskedWorld, alone: World) -> AskedModel:
    return AskedModel(asked.config, read_for_evaluation(asked.run), alone)


@pytest.fixture(scope="module")
def evaluated(asked: AskedWorld, alone: World) -> list[list[float]]:
    """The scores of `vico eval`."""
    checkpoint = read_for_evaluation(asked.run)
    inputs, checkpoint = open_evaluation(asked.config, checkpoint, alone)
    engine = build_engine(asked.config, inputs, checkpoint.weights, alone)
    return evaluate(engine, inputs, "val", asked.config, alone).scores


def scores(answers: list[Answer]) -> list[list[float]]:
    return [list(answer.scores) for answer in answers]


def one(row: dict[str, Any], **changes: Any) -> Question:
    texts = row["question"], tuple(row["options"])
    return replace(Question(0, "0", row["video"], "", *texts, None, place="here"), **changes)


def test_scores_are_those_of_an_evaluation(
    asked: AskedWorld, model: AskedModel, evaluated: list[list[float]]
) -> None:
    """Bit for bit: all questions of the split by a file, and some of them alone, from any file."""
    features = Features(asked.features)
    answers = model.ask(schema.read_file(asked.data / "val.jsonl"), features)
    assert scores(answers) == evaluated and all(answer.in_evaluation for answer in answers)
    copied = FeaturesInMemory({"copy": asked.videos["w1"], "w0": asked.videos["w0"]}, "copied")
    places = [i for i, row in enumerate(asked.rows) if row["video"] in ("w0", "w1")]
    assert {len(asked.rows[i]["options"]) for i in places[:12]} == {2, 3, 4, 5, 6}
    for i in places[:12]:
        video = {"w1": "copy"}.get(asked.rows[i]["video"], "w0")
        (answer,) = model.ask([one(asked.rows[i], video=video)], copied)
        assert scores([answer]) == [evaluated[i]] and answer.in_evaluation


def test_other_questions_are_an_evaluation_of_their_own(
    asked: AskedWorld, model: AskedModel, alone: World, tmp_path: Path
) -> None:
    """Beside questions of the split too; not those of other words, options or frames."""
    row = asked.rows[0]
    questions = [
        one(row, question="why?"),
        one(asked.rows[3]),
        one(row, options=tuple(row["options"][::-1])),
        one(row, video=next(video for video in FRAMES if video != row["video"])),
    ]
    answers = model.ask(questions, Features(asked.features))
    assert [answer.in_evaluation for answer in answers] == [False, True, False, False]
    config = replace(asked.config, split="test")
    by_itself = AskedModel(config, read_for_evaluation(asked.run), alone)
    by_itself.engine = model.engine
    others = by_itself.ask([questions[i] for i in (0, 2, 3)], Features(asked.features))
    assert scores(others) == [list(answers[i].scores) for i in (0, 2, 3)]
    reversed_scores = list(answers[2].scores)
    assert reversed_scores != list(answers[0].scores)


def test_probabilities() -> None:
    """The softmax of the negative sums; the answer has the lowest mean, as in `vico eval`."""
    question = Question(0, "0", "v", "", "why", ("a", "b", "c"), None)
    answer = Answer(question, (0.5, 0.25, 4.0), (1.0, 1.5, 8.0), in_evaluation=False)
    weights = np.exp([-1.0, -1.5, -8.0])
    assert np.allclose(answer.probabilities, weights / weights.sum(), rtol=1e-14)
    assert answer.index == 1 and answer.answer == "b"
    assert max(answer.probabilities) == answer.probabilities[0], "b has more target tokens"
    far = Answer(question, (900.0, 800.0, 1000.0), (3600.0, 3200.0, 4000.0), False)
    assert far.probabilities[1:] == [1.0, 0.0] and far.probabilities[0] < 1e-170
    assert [line[0] for line in far.lines()] == [" ", ">", " "]


def test_losses_are_sums(asked: AskedWorld, model: AskedModel) -> None:
    """Of as many target tokens as the sequence of the option has."""
    question = one(asked.rows[4])
    (answer,) = model.ask([question], Features(asked.features))
    prompts = model.prompts()
    counts = [len(prompts.vqa(question, i).targets) for i in range(len(question.options))]
    assert answer.losses == tuple(s * n for s, n in zip(answer.scores, counts, strict=True))


REFUSALS: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any], str]] = {
    "another width": ({"w0": torch.ones(2, 512)}, {}, "are 512 wide, and .*trained on.*768 wide"),
    "another video": ({"x": torch.ones(2, 768)}, {"video": "w0"}, "'w0'.*ids are like 'x'"),
    "NaN": ({"w0": torch.full((2, 768), torch.nan)}, {}, "NaN or infinite"),
    "no frames": ({"w0": torch.ones(0, 768)}, {}, "no floating-point tensor"),
    "too long": ({"w0": torch.ones(2, 768)}, {"question": "why " * 300}, "--max_seq_len 256"),
    "a dialogue": ({"w0": torch.ones(2, 768)}, {"dialogue": " hi"}, "has a dialogue, which no"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str, asked: AskedWorld, model: AskedModel) -> None:
    videos, changes, expected = REFUSALS[name]
    question = one(asked.rows[0], **{"video": "w0", **changes})
    features = FeaturesInMemory(videos, "clip.mp4")

    assert re.search(expected, refusal(model.ask, [question], features))


def test_shortened_questions_are_counted(
    asked: AskedWorld, model: AskedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    long = one(asked.rows[0], options=("a " * 200, "b"))
    model.ask([long, one(asked.rows[1])], Features(asked.features))
    assert "1 of 2 questions are shortened to --max_seq_len 256" in capsys.readouterr().out
