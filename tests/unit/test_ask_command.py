"""`vico ask`: what it prints, files of questions, and flags that contradict each other."""

import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from support.asked_world import AskedWorld
from support.errors import refusal
from support.toy_dataset import ToyData, records
from vico.cli import ask
from vico.cli.main import main


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("asked"), toy)


OPTIONS = ["--options", "a", "b"]
ONE = ["--video_id", "w0"]


def question_flags(row: dict[str, Any]) -> list[str]:
    return ["--video_id", row["video"], row["question"], "--options", *row["options"]]


def output(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that `vico ask WORDS` prints."""
    capsys.readouterr()
    code = main(["ask", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def test_answers_are_those_of_eval(
    asked: AskedWorld,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """One question, with lines for people and JSON last; and a file of them, to a file."""
    assert main(["eval", "--resume", str(asked.run), "--output_dir", str(tmp_path)]) == 0
    evaluated = records(tmp_path / "predictions_val.jsonl")
    row, expected = asked.rows[4], evaluated[4]
    source = ["--resume", asked.run, "--features", asked.features]
    *lines, last = output(capsys, *source, *question_flags(row))
    result = json.loads(last)
    assert result["scores"] == expected["scores"]
    assert result["prediction"] == expected["prediction"]
    assert result["answer"] == row["options"][expected["prediction"]]
    assert math.isclose(sum(result["probabilities"]), 1) and len(result["probabilities"]) == 6
    assert sum(line.startswith("> (") for line in lines) == 1
    assert any("very scores of `vico eval`" in line for line in lines)

    *_, last = output(capsys, "--resume", asked.run, *question_flags(row))
    assert json.loads(last) == result, "the features of the run's own data set"

    target, file = tmp_path / "answers.jsonl", asked.data / "val.jsonl"
    *_, last = output(capsys, *source, "--questions", file, "--output", target)
    right = sum(e["answer"] == e["prediction"] for e in evaluated)
    assert json.loads(last) == {"n": len(evaluated), "acc": right / len(evaluated)}
    answers = records(target)
    assert [a["scores"] for a in answers] == [e["scores"] for e in evaluated]
    assert [a["right"] for a in answers] == [e["answer"] == e["prediction"] for e in evaluated]
    assert answers[4].items() >= result.items() and answers[4]["qid"] == row["id"]


def test_a_video_file(
    asked: AskedWorld,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """By an encoder, as its features by a file; what of it is not recorded, or differs, is said."""
    pytest.importorskip("av")
    pytest.importorskip("transformers")
    from support.encoders import make_clip
    from support.videos import make_video
    from vico.video import provenance
    from vico.video.encoder import load_encoder
    from vico.video.features import video_features
    from vico.video.provenance import Provenance

    clip, video = make_clip(tmp_path / "clip", width=768), make_video(tmp_path / "a.mp4")
    features = video_features(video, load_encoder(clip), Fraction(1))
    torch.save({"a": features}, tmp_path / "f.pth")
    question = ["what is it", "--options", "a man", "a dog"]
    source = ["--features", tmp_path / "f.pth", "--video_id", "a"]
    *_, last = output(capsys, "--resume", asked.run, *source, *question)
    by_video = ["--video", video, "--encoder", clip]
    *lines, other = output(capsys, "--resume", asked.run, *by_video, *question)
    assert json.loads(other) == json.loads(last) | {"video": str(video)}
    said = f"{video}: {len(features)} frames at 1 per second by {clip}; whether the training's"
    assert any(line.startswith(said) for line in lines)
    record = provenance.path_of(asked.features)
    try:
        made = Provenance("clip", load_encoder(clip).digest, Fraction(2))
        provenance.write(asked.features, made)
        *lines, _ = output(capsys, "--resume", asked.run, *by_video, *question)
        assert any(f"at 2 per second by {clip}, as the training's" in line for line in lines)
        *lines, _ = output(capsys, "--resume", asked.run, *by_video, "--fps", "1", *question)
        (warning,) = (line for line in lines if line.startswith("warning: "))
        assert f"{asked.features} is at 2 per second by clip (sha256 " in warning
        record.write_text(record.read_text().replace('"fps": "2"', '"fps": "often"'))
        words = [str(word) for word in ("--resume", asked.run, *by_video, *question)]
        assert main(["ask", *words]) == 2
        assert f"{record}: " in capsys.readouterr().err
    finally:
        record.unlink()
    narrow = make_clip(tmp_path / "narrow")
    flags = ["--resume", str(asked.run), "--video", str(video), "--encoder", str(narrow), *question]
    assert main(["ask", *flags]) == 2
    assert "are 24 wide, and " in capsys.readouterr().err


def test_a_generated_answer(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said to be outside the method."""
    flags = ["--resume", asked.run, *ONE, "--max_new_tokens", "4"]
    *lines, last = output(capsys, *flags, "why does the man run")
    result = json.loads(last)
    assert result["generated"] is True and result["probabilities"] is None
    assert result["is_cut"] in (True, False) and isinstance(result["answer"], str)
    assert any("this is outside the method" in line for line in lines)


def test_questions_without_answers(
    asked: AskedWorld,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """No accuracy; the answers are printed, a line for each, and the data set need not be there."""
    away = tmp_path / "run"
    shutil.copytree(asked.run, away)
    rows = [dict(row) for row in asked.rows[:2]]
    for row in rows:
        del row["answer"]
    rows[1]["options"] = ["a dog", "a dog", "a cat"]
    file = tmp_path / "my.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data_path", tmp_path, "--features", asked.features, "--questions", file]
    *lines, last = output(capsys, "--resume", away, *flags)
    assert json.loads(last) == {"n": 2}
    assert f"note: {tmp_path}: does not hold my, on which the checkpoint was trained" in lines[0]
    assert "my.jsonl: 1 of 2 questions offer one text twice" in lines
    answers = [json.loads(line) for line in lines if line.startswith("{")]
    assert [a["question"] for a in answers] == [row["question"] for row in rows]
    assert "right" not in answers[0]


REFUSALS: dict[str, tuple[list[str], str]] = {
    "no question": ([*ONE, *OPTIONS], "the question is missing: it stands before --options"),
    "an empty question": (["", *ONE, *OPTIONS], "'question' is empty"),
    "a NUL": (["why\0", *ONE, *OPTIONS], "'question' holds a NUL"),
    "two questions": (["what", "is", *ONE, *OPTIONS], "unexpected word 'is': put the question"),
    "one option": (["why", *ONE, "--options", "a"], "--options: 1 options, not 2 to 26"),
    "27 options": (["why", *ONE, "--options", *map(str, range(27))], "27 options, not 2 to 26"),
    "an empty option": (["why", *ONE, "--options", "a", " "], "'option 2' is empty"),
    "equal options": (["why", *ONE, "--options", "a", "b", "a"], "'a' is there twice"),
    "no file of a video": (["why", "--video", "/x.mp4", "--encoder", "e"], "/x.mp4: no such file"),
    "no encoder": (["why", "--video", "/x.mp4"], "--encoder is missing"),
    "a video twice": (["why", "--video", "/x.mp4", "--features", "f"], "--features and --video"),
    "a video and an id": (["why", "--video", "/x.mp4", *ONE], "--video_id and --video"),
    "an encoder for nothing": (["why", *ONE, "--encoder", "e"], "--encoder: is for a video file"),
    "a rate for nothing": (["why", *ONE, "--fps", "2"], "--fps: is for a video file"),
    "a rate in words": (["why", *ONE, "--fps", "fast"], "--fps: 'fast' is no rate as 1, 0.5 or"),
    "a rate of 0": (["why", *ONE, "--fps", "0"], "--fps: 0 must be"),
    "beams for options": (["why", *ONE, *OPTIONS, "--num_beams", "2"], "--num_beams: is for a"),
    "a temperature of 0": (["why", *ONE, "--temperature", "0"], "--temperature 0"),
    "no video": (["why", *OPTIONS], "--video_id is missing"),
    "an empty id": (["why", "--video_id", " ", *OPTIONS], "--video_id is missing"),
    "a file for one": (["why", *ONE, *OPTIONS, "--output", "x"], "--output: is for the answers to"),
    "a question beside a file": (["why", "--questions", "x.jsonl"], "'why': a question beside"),
    "options beside a file": (["--questions", "x.jsonl", *OPTIONS], "--options: is said by each"),
    "an id beside a file": (["--questions", "x.jsonl", *ONE], "--video_id: is said by each row"),
    "no folder": (["--questions", "x.jsonl", "--output", "/dev/null/x"], "is not a folder"),
    "an unknown flag": (["why", *ONE, "--option", "a", "b"], "unknown flag --option; did you"),
    "no checkpoint": (["why", *ONE, *OPTIONS], "--resume is missing"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    """Before torch is imported and any file is opened."""
    words, expected = REFUSALS[name]
    assert expected in refusal(ask.main, words)
