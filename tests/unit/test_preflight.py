"""The checks before a run, one by one: what is read, by whom, and what is remembered of it."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from support.errors import refusal
from support.feature_files import numbered, questions_about, save
from support.toy_dataset import ToyData
from support.training_steps import config_of
from vico.data.features import Features, FeaturesInMemory
from vico.data.length_stats import QuestionLengths
from vico.data.prompts import Prompts
from vico.data.types import Question
from vico.io import file_cache
from vico.io.file_cache import FileCache
from vico.io.log import ProgressLog
from vico.train import preflight
from vico.train.config import RunConfig
from vico.train.preflight import BackboneFiles

SILENT = ProgressLog(lambda phase: None, is_main=False)


@pytest.fixture
def own(toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A copy of the toy data set, and an empty cache that takes results of new files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1.0)
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    return config_of(toy, "--data_path", str(tmp_path / "data"))


# ---- the backbone --------------------------------------------------------------------------------


def test_how_many_layers_are_adapted(toy: ToyData) -> None:
    """All of three, or as many of the last ones as the flag says."""
    for flag, number in ((None, 3), (1, 1), (3, 3)):
        config = replace(config_of(toy), adapter_layer=flag)
        assert preflight.open_backbone(config).num_adapted == number
    assert refusal(preflight.open_backbone, replace(config_of(toy), adapter_layer=4)) == (
        "--adapter_layer 4: the model has 3 layers; leave it out to adapt all"
    )


def test_a_model_that_there_is_not(toy: ToyData, tmp_path: Path) -> None:
    """The folders beside it that hold weights are named."""
    for name in ("one", "two"):
        shutil.copytree(toy.llama / "tiny", tmp_path / name)
    (tmp_path / "empty").mkdir()
    config = replace(config_of(toy), llama_model_path=tmp_path, model="x")
    message = refusal(preflight.open_backbone, config)
    start = f"{tmp_path}/x: no such folder of weights; "
    names = ("one, two", "two, one")
    assert message in [f"{start}--model can be {both}, or the path of a folder" for both in names]
    nothing = replace(config, llama_model_path=tmp_path / "none")
    assert refusal(preflight.open_backbone, nothing) == (
        f"{tmp_path}/none/x: no such folder of weights; "
        "it must hold LLaMA weights of Meta or Hugging Face"
    )


def test_the_limits_of_prompts(toy: ToyData) -> None:
    config = replace(config_of(toy), max_feats=6, max_seq_len=120, max_cap_len=130)
    backbone = preflight.open_backbone(config)
    prompts, expected = (
        backbone.prompts(config, "nextqa"),
        Prompts(backbone.tokenizer, 6, 120, 130, dialogue=False),
    )
    question = replace(questions_about(("v", None))[0], options=("a " * 90, "b"))
    assert prompts.fit(question, "vqa") == expected.fit(question, "vqa") != question
    assert prompts.vqa(replace(question, options=("a", "b")), 0) == expected.vqa(
        replace(question, options=("a", "b")), 0
    )
    caption = "the man and the dog. " * 40
    assert prompts.caption(caption) == expected.caption(caption)


def test_the_files_of_a_run(toy: ToyData, tmp_path: Path) -> None:
    """Of an evaluation neither the captions nor the texts; of no split the backbone alone."""
    text = tmp_path / "a.txt"
    text.write_text("words")
    config = replace(config_of(toy), text=(text,))

    def names(*splits: str) -> set[str]:
        return {path.name for path in preflight.input_files(config, splits)._stamps}

    backbone = {"tokenizer.model", "params.json", "consolidated.00.pth"}
    evaluated = backbone | {"val.csv", "clipvitl14.pth"}
    captions = "llava_v15_13b_n6.json"
    assert names() == backbone and names("val") == evaluated
    assert names("train", "val") == evaluated | {"train.csv", captions, "a.txt"}
    config = replace(config, cap=0)
    assert names("train") == evaluated - {"val.csv"} | {"train.csv", "a.txt"}


# ---- questions and features ----------------------------------------------------------------------


def test_places_name_their_data_set_where_there_are_several(own: RunConfig) -> None:
    """Two of them may have a train.csv."""
    first = preflight.read_split(own, "nextqa", "train")[0]
    several = replace(own, dataset="nextqa,star")
    assert preflight.read_split(several, "nextqa", "train")[0] == replace(
        first, place=f"nextqa/{first.place}"
    )


def test_a_split_that_there_is_not(own: RunConfig) -> None:
    """Training can do without its evaluation; an evaluation can take the split that is there."""
    folder = own.folder_of("nextqa")
    val, test = folder / "val.csv", folder / "test.csv"
    gone = "no such file, and each epoch is evaluated on"
    anew = "put it there, or train without evaluation (--no_eval)"
    assert refusal(preflight.read_split, own, "nextqa", "test") == (
        f"{test}: no such file; put it there, or evaluate on val (--split val)"
    )
    assert refusal(preflight.read_split, own, "nextqa", "test", True) == (
        f"{test}: {gone} test; {anew}"
    )
    val.rename(test)
    assert refusal(preflight.read_split, own, "nextqa", "val", True) == (
        f"{val}: {gone} val; {anew} or on test (--split test)"
    )
    assert refusal(preflight.read_split, own, "nextqa", "val") == (
        f"{val}: no such file; put it there, or evaluate on test (--split test)"
    )
    test.unlink()
    assert f"{val}: " in refusal(preflight.read_split, own, "nextqa", "val")
    (folder / "train.csv").unlink()
    assert f"{folder}/train.csv: " in refusal(preflight.read_split, own, "nextqa", "train")


def test_a_test_split_without_answers_evaluates_no_epoch(own: RunConfig) -> None:
    """It can be evaluated by itself, for a submission."""
    folder = own.folder_of("nextqa")
    header, *rows = (folder / "val.csv").read_text().splitlines()
    column = header.split(",").index("answer")
    lines = [header]
    for row in rows:
        cells = row.split(",")
        lines.append(",".join([*cells[:column], "", *cells[column + 1 :]]))
    (folder / "test.csv").write_text("\n".join(lines) + "\n")
    (folder / "val.csv").rename(folder / "kept.csv")
    config = replace(own, split="test")
    assert preflight.read_split(config, "nextqa", "test")[0].answer is None
    assert refusal(preflight.read_split, config, "nextqa", "test", True) == (
        "test.csv:2: the test questions have no answers, so no epoch can be evaluated on them; "
        "train with --no_eval"
    )
    without = replace(config, no_eval=True)
    assert len(preflight.read_split(without, "nextqa", "test", True)) == 10


def test_questions_without_features(own: RunConfig) -> None:
    """They stay, to be refused, or are dropped; with none left the file is the wrong one."""
    features: Any = FeaturesInMemory({"a": torch.ones(2, 768)}, "f.pth")
    questions = questions_about(("a", None), ("b", None), ("a", None))
    drop = replace(own, missing_features="drop")
    assert preflight.with_features(own, "val", questions, features) == (questions, [])
    used, dropped = preflight.with_features(drop, "val", questions, features)
    assert (used, dropped) == ([questions[0], questions[2]], [questions[1]])
    assert refusal(preflight.with_features, drop, "val", questions[1:2], features) == (
        "f.pth: holds features of no video of the 1 val questions, e.g. 'b' (the file's ids are "
        "like 'a'); fetch the file that belongs to them"
    )
    used, dropped, opened = preflight.read_used(own, "nextqa", "val")
    assert (len(used), dropped, opened.width) == (10, [], 768)


def test_splits_are_joined_over_data_sets() -> None:
    """In the order of the data sets; a split without questions is empty."""
    first, second, third = (questions_about((video, None)) for video in "abc")
    parts = {("x", "train"): first, ("x", "val"): second, ("y", "train"): third}
    assert preflight.joined(parts, ("train", "test")) == {"train": first + third, "test": []}


def test_captions_of_training(own: RunConfig) -> None:
    """One for each video, or at least for one; the longest must leave room for the prompt."""
    questions = preflight.read_split(own, "nextqa", "train")
    prompts = preflight.open_backbone(own).prompts(own, "nextqa")
    splits = {"train": questions}

    def read(config: RunConfig, of: list[Question], prompts: Prompts | None = prompts) -> Any:
        return preflight.read_captions(config, "nextqa", splits, of, prompts)

    assert {q.video for q in questions} <= {*read(own, questions)}
    unknown = [replace(questions[0], video="unknown")]
    drop = replace(own, missing_captions="drop")
    assert "1 of 21 questions (1 videos) have no caption, e.g. 'unknown'" in refusal(
        read, own, questions + unknown
    )
    assert read(drop, unknown + questions) == read(own, questions)
    assert "1 of 1 questions" in refusal(read, drop, unknown)
    tight = replace(own, max_cap_len=12)
    short = preflight.open_backbone(tight).prompts(tight, "nextqa")
    assert "--max_cap_len 12" in refusal(read, drop, unknown + questions, short)
    assert read(tight, questions, None) == read(own, questions)


# ---- slow checks, whose results are remembered ---------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path, own: RunConfig) -> Features:
    """Features of four videos, of which those of c are not finite."""
    videos = {video: numbered(3) for video in "abcd"}
    videos["c"][1, 5] = torch.inf
    return Features(save(tmp_path / "clips.pth", videos))


def check(features: Features, questions: list[Question], rank: int = 0, ranks: int = 1) -> int:
    """With the results of earlier checks on disk; this one's reach it."""
    cache = FileCache()
    config = RunConfig(max_feats=10)
    arguments = (config, questions, features, cache, rank, ranks, SILENT)
    past_end = preflight.check_features(*arguments)
    cache.flush()
    return past_end


def test_each_rank_reads_its_share_of_features(clips: Features) -> None:
    """Rank 1 of 3 has the second of every three questions."""
    questions = questions_about(*[(video, None) for video in "abdcabd"])
    assert check(clips, questions, 1, 3) == 0
    message = refusal(check, clips, questions[::-1], 0, 3)
    assert "NaN or infinite" in message and "'c'" in message
    past = questions_about(("a", (2, 3)), ("a", (3, 4)), ("b", (7, 9)), ("b", None))
    assert check(clips, past) == 2


def test_finite_features_are_looked_at_once(clips: Features, tmp_path: Path) -> None:
    """Of these questions, this file and this --max_feats; or never, after a scan of the file."""
    questions = questions_about(("a", None), ("b", None))
    check(clips, questions)
    looked: list[int] = []
    read = clips.check_finite

    def noted(some: Any, *more: Any) -> None:
        looked.append(len(some))
        read(some, *more)

    clips.check_finite = noted  # type: ignore[method-assign]
    check(clips, questions)
    assert looked == [], "known"
    check(clips, questions[:1])
    assert looked == [1], "other questions"
    cache = FileCache()
    preflight.check_features(RunConfig(max_feats=4), questions, clips, cache, 0, 1, SILENT)
    assert looked == [1, 2], "other rows of them"
    scanned = preflight.scan_key(clips)
    assert scanned is not None and scanned != preflight.scan_key(
        Features(save(tmp_path / "other.pth", {"a": numbered(4)}))
    )
    cache.put(scanned, True)
    cache.flush()
    check(clips, questions_about(("d", None), ("a", None)))
    assert looked == [1, 2], "the file is known whole"


def measure(
    config: RunConfig, split: str, questions: list[Question], backbone: BackboneFiles
) -> tuple[QuestionLengths, bool]:
    """What is measured, and whether it was known before."""
    cache = FileCache()
    known = len(cache._entries)
    prompts = backbone.prompts(config, "nextqa")
    found = preflight.measure_questions(
        config, "nextqa", split, questions, backbone, prompts, cache, SILENT
    )
    cache.flush()
    return found, len(FileCache()._entries) == known


def test_questions_are_measured_once(own: RunConfig) -> None:
    """For these tasks and limits; an evaluation has the one task of its scores."""
    backbone = preflight.open_backbone(own)
    questions = preflight.read_split(own, "nextqa", "val")
    tasks = replace(own, vaq=True, keep=1, text=(Path("x"),))
    first, known = measure(tasks, "val", questions, backbone)
    assert not known and (first.num_measured, first.lengths.num_sequences) == (10, 10)
    prompts = backbone.prompts(own, "nextqa")
    lengths = [prompts.length(q, "vqa") for q in questions]
    assert first.lengths.num_tokens == sum(lengths)
    assert measure(own, "val", questions, backbone) == (first, True), "its tasks do not matter"
    in_training, known = measure(tasks, "train", questions, backbone)
    both = [max(prompts.length(q, "vaq"), n) for q, n in zip(questions, lengths, strict=True)]
    assert not known and in_training.lengths.num_tokens == sum(both)
    assert measure(tasks, "train", questions, backbone) == (in_training, True)
    for other in (replace(own, max_seq_len=255), replace(own, max_feats=9)):
        assert not measure(other, "val", questions, backbone)[1]
    assert not measure(own, "val", questions[:9], backbone)[1]


def test_an_interrupted_measurement_goes_on(
    own: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part that is said to be done is on disk; the rest is measured by the next start."""
    monkeypatch.setattr(preflight.length_stats, "ROWS_PER_REPORT", 4)
    backbone = preflight.open_backbone(own)
    questions, prompts = preflight.read_split(own, "nextqa", "val"), backbone.prompts(own, "nextqa")
    said: list[str] = []

    def report(done: str) -> bool:
        said.append(done)
        if len(said) == 2:
            raise KeyboardInterrupt
        return True

    def begin(progress: Any) -> QuestionLengths:
        cache = FileCache()
        arguments = (own, "nextqa", "val", questions, backbone, prompts, cache, progress)
        return preflight.measure_questions(*arguments)

    with pytest.raises(KeyboardInterrupt):
        begin(report)
    assert said == ["val: measured 4 of 10 questions", "val: measured 8 of 10 questions"]
    whole = begin(report)
    assert said[2:] == ["val: measured 8 of 10 questions", "val: measured 10 of 10 questions"]
    assert whole == preflight.length_stats.of_questions(questions, prompts, ["vqa"], 256)


def test_captions_are_measured_once_per_video(own: RunConfig) -> None:
    """Of videos that questions are about, where they have one."""
    backbone = preflight.open_backbone(own)
    prompts = backbone.prompts(own, "nextqa")
    captions = {"a": "the man", "b": "a dog. a ball.", "unused": "x " * 50}
    questions = questions_about(("b", None), ("a", None), ("b", None), ("without", None))

    def measured(config: RunConfig) -> tuple[Any, int]:
        cache = FileCache()
        arguments = (config, captions, questions, backbone, prompts, cache, SILENT)
        lengths = preflight.measure_captions(*arguments)
        new = len(cache._new)
        cache.flush()
        return lengths, new

    lengths, new = measured(own)
    expected = [prompts.caption_length(captions[video]) for video in "ab"]
    assert lengths == preflight.Lengths.of(expected) and new == 1
    assert measured(own) == (lengths, 0)
    assert measured(replace(own, max_feats=9)) == (lengths, 1)
    captions["a"] += " smiles"
    assert measured(own)[1] == 1
