"""Which captions a video is compared with, how captions begin, and which videos get one."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from faults.emulated_ranks import ALONE
from support.errors import refusal
from vico.data.types import Question
from vico.errors import UserError
from vico.generation.caption_metrics import caption_record, metrics_of
from vico.generation.generate import Generated, Prompt
from vico.train import captioning, eval_captions, preflight
from vico.train.captioning import SplitVideo, opening_of, references_of, videos_of_split
from vico.train.config import RunConfig
from vico.train.eval_captions import CaptionedVideos, captioned, reference

pytest.importorskip("pycocoevalcap", exc_type=ImportError)


class Words:
    """A tokenizer: a token for each letter. A caption begins with its first three."""

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        return [ord(letter) for letter in text], list(range(1, len(text) + 1))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def caption_opening(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text[:3])) if len(text) > 3 else ()


def model_of(folder: Path, trained_with: dict[str, Any] | None = None, **flags: Any) -> Any:
    """Of the data sets in `folder`; `trained_with`: the settings of the checkpoint's run."""
    flags = {"dataset": "my", "data_path": folder, **flags}
    return SimpleNamespace(
        config=RunConfig(**flags),
        checkpoint=SimpleNamespace(settings=trained_with or {}),
        world=ALONE,
        tokenizer=Words(),
        prompts=Words,
    )


def ask(video: str, **fields: Any) -> Question:
    return Question(0, "q", video, "CW", "why", ("a", "b"), 0, **fields)


def put_captions(path: Path, **texts: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(texts), encoding="utf-8")
    return path


# ---- references ---------------------------------------------------------------------------------


def test_where_references_are_looked_for(tmp_path: Path) -> None:
    """In --captions, in the rows, in what the run trained with, in the folder; or nowhere."""
    in_rows = [ask("v", caption="of the row"), ask("w", caption=" "), ask("x")]
    bare = [ask("v")]
    assert references_of(model_of(tmp_path), "my", bare) == {}
    put_captions(tmp_path / "my" / "captions.json", v="of the folder")
    assert references_of(model_of(tmp_path), "my", bare) == {"v": "of the folder"}
    of_run = {"dataset": "my", "captions": str(put_captions(tmp_path / "run.json", v="of the run"))}
    trained = {"dataset": "my", "captions": Path(of_run["captions"])}
    assert references_of(model_of(tmp_path, trained), "my", bare) == {"v": "of the run"}
    assert references_of(model_of(tmp_path, trained), "my", in_rows) == {"v": "of the row"}
    flag = put_captions(tmp_path / "flag.json", v="of the flag")
    model = model_of(tmp_path, trained, captions=flag)
    assert references_of(model, "my", in_rows) == {"v": "of the flag"}


def test_captions_of_the_run_are_those_of_its_data_set(tmp_path: Path) -> None:
    """If they are still there."""
    path = put_captions(tmp_path / "run.json", v="of the run")
    several = {"dataset": "my,other", "captions": Path(f"other={path}"), "lr": 0.5}
    model = model_of(tmp_path, several, dataset="my,other,third")
    found = [captioning._captions_of_run(model, name) for name in ("my", "other", "third")]
    assert found == [None, path, None]
    path.unlink()
    assert captioning._captions_of_run(model, "other") is None
    assert captioning._captions_of_run(model_of(tmp_path, {"lr": 0.5}), "my") is None


# ---- openings -----------------------------------------------------------------------------------


def letters(ids: tuple[int, ...]) -> str:
    return "".join(map(chr, ids))


def test_openings_of_words(tmp_path: Path) -> None:
    """Of --opening, with single blanks; its tokens are those behind the label."""
    model = model_of(tmp_path)
    ids, note = opening_of(model, " the \n red  ball ")
    assert letters(ids) == " the red ball"
    assert note == "captions begin with 'the red ball' (--opening)"
    for blank in ("", " \n"):
        assert opening_of(model, blank) == (
            (),
            "note: captions begin behind 'Description:', which training does not teach",
        )


def test_the_opening_of_most_training_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each video of training counts once; captions of other videos and short ones do not."""
    asked = [ask(video) for video in "aabcdef"]
    seen: list[str] = []

    def read_split(config: RunConfig, name: str, split: str) -> list[Question]:
        seen.append(split)
        return asked

    monkeypatch.setattr(preflight, "read_split", read_split)
    texts = {"a": "an old cat", "b": "the man", "c": "the dog", "d": "thin ice", "e": "th"}
    put_captions(tmp_path / "my" / "captions.json", **texts, x="an owl", y="an ox")
    ids, note = opening_of(model_of(tmp_path), None)
    assert letters(ids) == "the" and seen == ["train"]
    said = "captions begin with 'the', as 2 of 4 training captions begin (--opening)"
    assert note == said


def test_training_captions_that_are_not_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one of two data sets is as good as none."""
    put_captions(tmp_path / "my" / "captions.json", a="the man")

    def read_split(config: RunConfig, name: str, split: str) -> list[Question]:
        if name == "gone":
            raise UserError("no such file")
        return [ask("a")]

    monkeypatch.setattr(preflight, "read_split", read_split)
    assert letters(opening_of(model_of(tmp_path), None)[0]) == "the"
    assert opening_of(model_of(tmp_path, dataset="my,gone"), None) == (
        (),
        "note: the training captions are not at hand, and captions begin behind 'Description:', "
        "which training does not teach; name their first words by --opening",
    )


# ---- the videos of a split ----------------------------------------------------------------------


def test_each_video_of_a_split_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = [ask("b"), ask("a"), ask("b")]
    dropped = [ask("c")]

    def read_used(config: RunConfig, name: str, split: str) -> tuple[Any, Any, str]:
        assert split == "test"
        return used, dropped if name == "my" else [], f"features of {name}"

    monkeypatch.setattr(preflight, "read_used", read_used)
    put_captions(tmp_path / "my" / "captions.json", a="a man runs", c="a cat")
    (tmp_path / "other").mkdir()
    model = model_of(tmp_path, dataset="my,other", split="test")
    found: list[Any] = videos_of_split(model)
    assert found == [
        SplitVideo("my", "b", "features of my", ()),  # type: ignore[arg-type]
        SplitVideo("my", "a", "features of my", ("a man runs",)),  # type: ignore[arg-type]
        SplitVideo("other", "b", "features of other", ()),  # type: ignore[arg-type]
        SplitVideo("other", "a", "features of other", ()),  # type: ignore[arg-type]
    ]
    assert capsys.readouterr().out == (
        "note: my test: the videos of 1 of 4 questions have no features and get no caption "
        "(--missing_features drop)\n"
    )
    assert found[1].record(Generated("a dog", (5,), (0.0,), True)) == {
        "dataset": "my",
        "video": "a",
        "caption": "a dog",
        "references": ["a man runs"],
        "is_cut": True,
    }


# ---- captions with each evaluation --------------------------------------------------------------

CAPTIONS = {"my": {"a": " a man ", "b": "the dog", "e": " "}, "other": {"a": "an owl"}}


def test_what_a_caption_is_compared_with() -> None:
    """The row's own, else the file's, without blanks at the ends."""
    rows = [("a", " own\n"), ("a", ""), ("z", ""), ("e", " ")]
    asked = [ask(video, caption=caption, dataset="my") for video, caption in rows]
    found = [reference(question, CAPTIONS) for question in asked]
    assert found == ["own", "a man", "", ""]


def test_the_first_videos_with_a_caption() -> None:
    """Each once, of each data set its own."""
    asked = [("my", "z"), ("my", "b"), ("my", "a"), ("my", "b"), ("other", "a"), ("my", "e")]
    questions = [ask(video, dataset=name) for name, video in asked]
    for num in (1, 2, 3, 9):
        found = captioned(questions, CAPTIONS, "val", num)
        assert found == [questions[1], questions[2], questions[4]][:num]
    assert refusal(captioned, [questions[0], questions[5]], CAPTIONS, "val", 7) == (
        "--eval_captions 7: no video of val has a caption to compare with; add them to the caption "
        "file, or leave the flag out"
    )


class Inputs:
    """Of two data sets, whose training has four captions."""

    def __init__(self) -> None:
        captions = {"a": "the man", "b": "the dog", "c": "an owl", "d": "an ox", "x": "an oak"}
        prompts = SimpleNamespace(
            caption_opening=Words().caption_opening, caption_prompt=lambda opening: ("cap", opening)
        )
        features = SimpleNamespace(finite_sample=lambda *asked: asked)
        of_set = SimpleNamespace(captions=captions, prompts=prompts, features=features)
        self.tokenizer_path = Path("t")
        self.datasets = {"my": of_set, "other": of_set}
        train = [("my", "a"), ("my", "b"), ("my", "a"), ("other", "c"), ("my", "z")]
        self.questions = {
            "train": [ask(video, dataset=name) for name, video in train],
            "val": [ask(video, dataset="my") for video in "dzab"],
        }


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(eval_captions, "Tokenizer", lambda path: Words())
    monkeypatch.setenv("PATH", "/nowhere")  # without Java
    return Inputs()


@pytest.mark.parametrize(
    ("num", "said"), [(2, "2 val videos"), (3, "3 val videos"), (8, "3 val videos")]
)
def test_captions_that_a_run_writes(num: int, said: str, inputs: Any) -> None:
    """How many, where fewer have a caption to compare with, and how they begin."""
    videos = CaptionedVideos(inputs, "val", num, num_slots=6)
    fewer = " (--eval_captions 8: no more have one)" if num == 8 else ""
    assert videos.note == (
        f"captions of {said} with each evaluation{fewer}; they begin with 'the', as most of "
        "training's do"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_captions_of_an_evaluation(rank: int, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whole videos, after the opening, greedily; rank 0 alone measures them."""
    given: list[Any] = []

    def generate(model: Any, prompts: list[Prompt], *others: Any) -> list[Generated]:
        given.extend((model, prompts, *others))
        return [Generated("the man", (1,), (0.0,), False) for _ in prompts]

    monkeypatch.setattr(eval_captions, "generate", generate)
    monkeypatch.setattr(eval_captions, "ViCo", object)
    world: Any = SimpleNamespace(
        is_main=rank == 0, raise_together=ALONE.raise_together, set_phase=lambda phase: None
    )
    engine: Any = SimpleNamespace(module="the model")
    written = CaptionedVideos(inputs, "val", 2, num_slots=6).write(engine, world)
    opening = tuple(map(ord, "the"))
    sequence: Any = ("cap", opening)
    frames: Any = [(video, None, 6) for video in "da"]
    assert given[:2] == ["the model", [Prompt(sequence, f, opening) for f in frames]]
    assert given[3:] == [eval_captions.GenerationSettings(), world]
    texts = {"caption": "the man", "is_cut": False, "dataset": "my"}
    assert written.records == [
        {**texts, "video": "d", "references": ["an ox"]},
        {**texts, "video": "a", "references": ["the man"]},
    ]
    names = {f"bleu_{i}" for i in range(1, 5)} | {"rouge_l", "cider"}
    assert written.metrics.keys() == (names if rank == 0 else set())


def test_captions_that_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They do not end the run. Of one video there is no CIDEr."""
    text = Generated("the man runs", (1,), (0.0,), False)
    record = caption_record("my", "a", text, ["the man runs far"])
    monkeypatch.setenv("PATH", "/nowhere")  # without Java
    alone = eval_captions._metrics([record])
    assert "cider" not in alone and alone["bleu_1"] == pytest.approx(math.exp(1 - 4 / 3)), (
        "for its length"
    )
    assert {*alone} == {*(f"bleu_{i}" for i in range(1, 5)), "rouge_l"}
    whole = metrics_of([record, {**record, "dataset": "other"}])
    assert (whole["n"], whole["n_references"]) == (2, 2), "an id of each data set"

    def fail(*_: Any, **__: Any) -> None:
        raise UserError("Java failed")

    monkeypatch.setattr(eval_captions, "metrics_of", fail)
    assert eval_captions._metrics([record]) == {}
    assert capsys.readouterr().out == (
        "note: --eval_captions: Java failed; captions are written without metrics\n"
    )


def test_openings_that_are_as_frequent(inputs: Any) -> None:
    """The first video's by its name: all ranks and starts must choose alike."""
    texts = {video: f"{letter}ny cat" for video, letter in zip("tpmkgfba", "zyxwvuts", strict=True)}
    inputs.datasets["my"].captions = texts
    inputs.questions["train"] = [ask(video, dataset="my") for video in texts]
    inputs.questions["val"] = inputs.questions["train"]
    assert "they begin with 'sny', as" in CaptionedVideos(inputs, "val", 1, num_slots=6).note
