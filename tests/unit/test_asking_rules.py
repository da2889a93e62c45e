"""How asked questions are prepared, found again in an evaluation, and answered; by hashed scores.

No model is built: in the engine's place is one whose losses follow from the tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from faults.emulated_ranks import ALONE, EmulatedWorld, Scorer
from support.asked_world import AskedWorld
from support.errors import refusal
from support.feature_files import numbered
from support.toy_dataset import ToyData
from vico.data import evaluation_batches
from vico.data.evaluation_batches import divide
from vico.data.features import Features, FeaturesInMemory
from vico.data.types import Question
from vico.generation.settings import GenerationSettings
from vico.train import asking
from vico.train.asking import PLAIN, WITH_DIALOGUE, Answer, AskedModel
from vico.train.saved_run import read_for_evaluation


class Ranks(EmulatedWorld):
    """This rank and another, which has found other questions of the evaluation than this one."""

    def gather_objects(self, value: Any) -> list[Any]:
        return [value, ({},)] if isinstance(value, tuple) else [value]


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("asked"), toy)


@pytest.fixture
def ask(asked: AskedWorld) -> Callable[..., AskedModel]:
    """A model of the run, with hashed scores."""

    def make(world: EmulatedWorld = ALONE, **settings: Any) -> AskedModel:
        checkpoint = read_for_evaluation(asked.run)
        model = AskedModel(replace(asked.config, **settings), checkpoint, world)
        model.__dict__["engine"] = Scorer()
        return model

    return make


def question(asked: AskedWorld, place: int, **changes: Any) -> Question:
    row = asked.rows[place]
    texts = row["question"], tuple(row["options"])
    return replace(Question(0, row["id"], row["video"], "", *texts, None, place="here"), **changes)


# ---- answers -------------------------------------------------------------------------------------


def test_an_answer_as_a_record_and_as_lines() -> None:
    """The lowest score is the answer's; probabilities are of the sums."""
    texts = Question(3, "q", "v", "", "why", ("run", "jump"), None)
    answer = Answer(texts, (0.75, 0.5), (1.5, 1.5), in_evaluation=True)
    assert answer.record() == {
        "video": "v",
        "question": "why",
        "options": ["run", "jump"],
        "answer": "jump",
        "prediction": 1,
        "probabilities": [0.5, 0.5],
        "scores": [0.75, 0.5],
    }
    assert answer.lines() == ["  (A)  50.00%  0.7500  run", "> (B)  50.00%  0.5000  jump"]


# ---- what is checked -----------------------------------------------------------------------------


def test_the_settings_of_an_asked_model(ask: Callable[..., AskedModel], asked: AskedWorld) -> None:
    """No workers; the width of the features is the checkpoint's, its notes come first."""
    model = ask(num_workers=4)
    assert model.config.num_workers == 0 and model.feature_width == 768
    assert model.notes[0] == f"--resume {asked.run}: its best checkpoint, {asked.run}/" + (
        "checkpoint_best"
    )
    assert model.notes == (*model.checkpoint.notes, *model.inputs.notes)
    features = FeaturesInMemory({"v": torch.ones(2, 512)}, "clip.mp4")
    assert refusal(model.require_width, features) == (
        f"clip.mp4: the features are 512 wide, and {asked.run}/checkpoint_best was trained on "
        "features 768 wide; use those of the same encoder"
    )
    weights = {**model.checkpoint.weights, "visual_proj.weight": torch.ones(32, 512)}
    checkpoint = replace(model.checkpoint, weights=weights, moments=None)
    narrow = AskedModel(asked.config, checkpoint, ALONE)
    narrow.require_width(features)
    assert narrow.feature_width == 512
    del weights["visual_proj.weight"]
    assert "visual_proj.weight" in refusal(AskedModel, asked.config, checkpoint, ALONE)


def test_notes_on_questions(
    ask: Callable[..., AskedModel], asked: AskedWorld, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a clip past the end, and of texts that are shortened."""
    model, features = ask(), Features(asked.features)
    past = question(asked, 0, video="w0", feature_rows=(3, 9))
    model._check([past, question(asked, 1)], features)
    assert capsys.readouterr().out == (
        "note: 1 of 2 questions are about a clip past the end of its video, and get zero features\n"
    )
    model._check([question(asked, 1)], features)
    long = question(asked, 0, options=("a " * 200, "b"))
    model.ask([long, question(asked, 1), long], features)
    assert capsys.readouterr().out.splitlines()[0] == (
        "note: 2 of 3 questions are shortened to --max_seq_len 256 (dialogue first, then options)"
    )
    (answer,) = model.ask([long], features)
    assert answer.question is long, "as it was asked"


def test_which_prompts_a_question_gets(ask: Callable[..., AskedModel], asked: AskedWorld) -> None:
    """Those of training: with a dialogue, without, or as the question has one."""
    plain, speaks = question(asked, 0), question(asked, 0, dialogue=" hi")
    for has_dialogue, expected in (
        ({True}, (WITH_DIALOGUE, WITH_DIALOGUE)),
        ({True, False}, (PLAIN, WITH_DIALOGUE)),
    ):
        model = ask()
        model.__dict__["_dialogue"] = has_dialogue
        names = tuple(model._prepared(q).dataset for q in (plain, speaks))
        assert names == expected
    model = ask()
    assert model._dialogue == {False} and model._prepared(plain).dataset == PLAIN
    assert refusal(model._prepared, speaks) == (
        "here: has a dialogue, which no prompt of this checkpoint's training mentions "
        "(--dataset my); leave it out"
    )


def test_prompts_with_a_dialogue_say_so(ask: Callable[..., AskedModel], asked: AskedWorld) -> None:
    """A question is scored with the prompts of its kind, whatever else is asked with it."""
    model, features = ask(), Features(asked.features)
    model.__dict__["_dialogue"] = {True, False}
    plain = question(asked, 0, question="why?")
    speaks = replace(plain, dialogue=" hello")
    one, other = model.ask([plain, speaks], features)
    assert one.scores != other.scores
    only_dialogue = ask()
    only_dialogue.__dict__["_dialogue"] = {True}
    (mentioned,) = only_dialogue.ask([plain], features)
    assert mentioned.scores not in (one.scores, other.scores)
    for q, answer in ((plain, one), (speaks, other)):
        prompts = model.prompts(dialogue=bool(q.dialogue))
        counts = [len(prompts.vqa(q, i).targets) for i in range(len(q.options))]
        assert answer.losses == tuple(s * n for s, n in zip(answer.scores, counts, strict=True))


# ---- the evaluation's questions ------------------------------------------------------------------


def test_the_question_of_an_evaluation(ask: Callable[..., AskedModel], asked: AskedWorld) -> None:
    """By its words, options and frames; of equal ones that of its id, else the first."""
    features = Features(asked.features)
    evaluation = ask()._evaluation
    twice = [*evaluation.questions[:3], replace(evaluation.questions[1], qid="again")]
    evaluation = replace(evaluation, questions=twice)

    def found(**changes: Any) -> int | None:
        return evaluation.find(question(asked, 1, **changes), features, 10)

    assert (found(), found(qid="again"), found(qid="unknown")) == (1, 3, 1)
    assert found(dialogue="hi") is None and found(question="why") is None
    other_video = next(v for v in asked.videos if v != asked.rows[1]["video"])
    assert found(video=other_video) is None
    assert found(options=tuple(asked.rows[1]["options"][::-1])) is None
    same_frames = {"copy": asked.videos[asked.rows[1]["video"]]}
    copied = FeaturesInMemory(same_frames, "x")
    assert evaluation.find(question(asked, 1, video="copy"), copied, 10) == 1


def test_whole_chunks_are_scored_again(
    ask: Callable[..., AskedModel], asked: AskedWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of an evaluation that hold a question that is asked, in its order, and no others."""
    monkeypatch.setattr(evaluation_batches, "EVALUATION_TOKENS", 500)
    evaluation = ask()._evaluation
    chunks = divide(evaluation.questions)
    assert len(chunks) > 3
    first, last = chunks[1][0], chunks[-1][-1]
    places, companions = evaluation.chunks_of({7: last, 4: first, 9: first})
    kept = [*chunks[1], *chunks[-1]]
    assert companions.questions == [evaluation.questions[place] for place in kept]
    assert places == {7: len(kept) - 1, 4: 0, 9: 0}
    assert companions.datasets is evaluation.datasets
    none, nobody = evaluation.chunks_of({})
    assert (none, nobody.questions) == ({}, [])


def test_an_evaluation_that_cannot_be_made(
    ask: Callable[..., AskedModel], asked: AskedWorld
) -> None:
    """Without its files, or with questions that no longer fit, all are asked by themselves."""
    features, mine = Features(asked.features), question(asked, 2)
    whole = ask()
    assert [answer.in_evaluation for answer in whole.ask([mine], features)] == [True]
    for model in (ask(split="test"), ask(max_seq_len=60)):
        assert model._of_evaluation([mine], features)[0] == {}
    (answer,) = ask(split="test").ask([mine], features)
    assert not answer.in_evaluation and len(answer.scores) == len(mine.options)


def test_ranks_that_see_other_files_ask_alike(
    ask: Callable[..., AskedModel], asked: AskedWorld
) -> None:
    """Where one does not find the evaluation's questions, no rank scores its chunks."""
    features, mine = Features(asked.features), question(asked, 2)
    model = ask(Ranks(0, 1, torch.device("cpu"), None))
    (answer,) = model.ask([mine], features)
    assert not answer.in_evaluation and len(answer.scores) == len(mine.options)


# ---- generated texts -----------------------------------------------------------------------------


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is generated after, each time."""
    seen: list[Any] = []

    def generate(model: Any, prompts: Any, tokenizer: Any, settings: Any, world: Any) -> Any:
        assert (model, settings, world) == ("model", SETTINGS, ALONE)
        seen.append(prompts)
        return ["text"] * len(prompts)

    monkeypatch.setattr(asking, "generate", generate)
    return seen


SETTINGS = GenerationSettings()


class Module(Scorer):
    """Of which the mode is noted."""

    module, mode = "model", True

    def train(self, mode: bool) -> None:
        self.mode = mode


def test_what_a_free_answer_follows(
    ask: Callable[..., AskedModel], asked: AskedWorld, generated: list[Any]
) -> None:
    """The question's prompt without options, of its kind, and the frames of its clip."""
    model, features = ask(), Features(asked.features)
    model.__dict__["_dialogue"] = {True, False}
    model.__dict__["engine"] = engine = Module()
    plain = question(asked, 0, video="w2", feature_rows=(2, 20))
    speaks = replace(plain, dialogue=" hi", feature_rows=None)
    assert model.answer_freely([plain, speaks], features, SETTINGS) == ["text"] * 2
    ((one, other),) = generated
    assert not engine.mode
    assert one.sequence == model.prompts().free_question(plain)
    assert other.sequence == model.prompts(dialogue=True).free_question(speaks)
    assert torch.equal(one.features_FC, features.sample("w2", (2, 20), 10))
    assert torch.equal(other.features_FC, features.sample("w2", None, 10))
    assert one.opening == other.opening == ()
    wrong = FeaturesInMemory({"w2": torch.ones(30, 512)}, "x")
    assert "512 wide" in refusal(model.answer_freely, [plain], wrong, SETTINGS)


def test_what_a_caption_follows(ask: Callable[..., AskedModel], generated: list[Any]) -> None:
    """The opening, and the frames of the whole video, of whichever file."""
    model = ask()
    model.__dict__["engine"] = Module()
    first = FeaturesInMemory({"a": numbered(12), "b": numbered(3) * 2}, "first")
    second = FeaturesInMemory({"c": numbered(4) * 3}, "second")
    videos = [(first, "b"), (second, "c")]
    assert model.caption(videos, SETTINGS, [5, 6]) == ["text"] * 2
    ((one, other),) = generated
    assert one.sequence == other.sequence == model.prompts().caption_prompt([5, 6])
    assert one.opening == other.opening == (5, 6)
    assert torch.equal(one.features_FC, first.sample("b", None, 10))
    assert torch.equal(other.features_FC, second.sample("c", None, 10))
    narrow = FeaturesInMemory({"c": torch.ones(4, 512)}, "narrow")
    assert "512 wide" in refusal(model.caption, [(narrow, "c")], SETTINGS, [5])
    assert "ids are like 'c'" in refusal(model.caption, [(second, "x")], SETTINGS, [5])
    bad = FeaturesInMemory({"c": numbered(4) / 0}, "bad")
    assert "NaN or infinite" in refusal(model.caption, [(bad, "c")], SETTINGS, [5])
