"""`vico caption` and vico.api: captions of a split with their metrics, of a video, and refusals."""

import json
from pathlib import Path

import pytest

from support.asked_world import FRAMES, AskedWorld
from support.errors import refusal
from support.processes import succeeds
from support.toy_dataset import ToyData, records
from vico import api
from vico.cli import caption
from vico.cli.main import main
from vico.data.prompts import usual_opening
from vico.distributed.world import World
from vico.errors import UserError
from vico.generation.caption_metrics import caption_metrics
from vico.train.asking import Answer

pytest.importorskip("pycocoevalcap", exc_type=ImportError)
SHORT = ["--max_new_tokens", "8"]


@pytest.fixture(scope="module")
def asked(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> AskedWorld:
    return AskedWorld(tmp_path_factory.mktemp("asked"), toy)


def output(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """The lines that `vico caption WORDS` prints."""
    capsys.readouterr()
    code = main(["caption", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return captured.out.splitlines()


def test_captions_of_a_split(
    asked: AskedWorld,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each video once, beside the run, with the training's opening; metrics are of what is written.

    One of them alone gets the same caption.
    """
    monkeypatch.setenv("PATH", "/nowhere")  # without Java, whose METEOR takes seconds
    *lines, last = output(capsys, "--resume", asked.run, "--split", "val", "--metrics", *SHORT)
    written = records(asked.run / "captions_val.jsonl")
    videos = list(dict.fromkeys(row["video"] for row in asked.rows))
    assert [row["video"] for row in written] == videos and set(videos) == set(FRAMES)
    for row in written:
        assert row["dataset"] == "my" and row["caption"].startswith("the red ball")
        assert row["references"] == [f"the red ball and a dog. the {row['video']} smiles."]
    assert any(line.startswith("captions begin with 'the red ball', as ") for line in lines)
    result = json.loads(last)
    assert result["n"] == result["n_compared"] == result["n_references"] == len(videos)
    texts = {row["video"]: row["caption"] for row in written}
    metrics = caption_metrics(texts, {row["video"]: row["references"] for row in written})
    assert metrics.pop("n") == len(videos) and result.items() >= metrics.items()
    assert result["tokenizer"] == "plain" and result["cider"] is not None

    flags = ["--features", asked.features, "--video_id", videos[1], *SHORT]
    *_, last = output(capsys, "--resume", asked.run, *flags)
    alone = {name: written[1][name] for name in ("video", "caption", "is_cut")}
    assert json.loads(last) == alone


def test_openings(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of other words, of none, and where the training captions are not at hand."""
    flags = ["--resume", asked.run, "--features", asked.features, "--video_id", "w2", *SHORT]
    *_, last = output(capsys, *flags, "--opening", "the red table")
    assert json.loads(last)["caption"].startswith("the red table")
    *lines, last = output(capsys, *flags, "--opening", "")
    assert any("which training does not teach" in line for line in lines)
    *lines, other = output(capsys, *flags, "--data_path", tmp_path)
    assert any("the training captions are not at hand" in line for line in lines)
    assert json.loads(other) == json.loads(last)


def test_the_usual_opening() -> None:
    """Token by token: of openings that differ, the usual beginning and not the first one."""
    assert usual_opening([(7, 8, 9), (1, 2, 3), (1, 2, 4), (1, 5, 6)]) == ((1, 2, 3), 1)
    assert usual_opening([(), (1, 2, 3), (1, 2, 3), (4, 5, 6)]) == ((1, 2, 3), 2)
    assert usual_opening([()]) == ((), 0)


def test_references_are_needed(
    asked: AskedWorld, in_this_process: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """For metrics alone; a video without a caption is not compared, and counted."""
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"w0": "a man", "w1": "a dog"}))
    target = tmp_path / "x.jsonl"
    flags = ["--resume", asked.run, "--captions", file, "--output", target, *SHORT]
    *_, last = output(capsys, *flags)
    assert json.loads(last) == {"split": "val", "n": 4, "output": str(target)}
    references = {row["video"]: row["references"] for row in records(target)}
    assert references == {"w0": ["a man"], "w1": ["a dog"], "w2": [], "w3": []}
    file.write_text(json.dumps({"x": "a man"}))
    assert main(["caption", *map(str, flags), "--metrics"]) == 2
    assert "no video of the split has a caption to compare" in capsys.readouterr().err


REFUSALS = {
    "--video_id w0 --split val": "--split: is for the videos of a split",
    "--video_id w0 --metrics": "--metrics: is for the videos of a split",
    "--video_id w0 --output x": "--output: is for the videos of a split",
    "--output /dev/null/x": "is not a folder",
    "--num_beams 0": "--num_beams 0: must be",
    "--top_p 0.5": "add --temperature",
    "--temperature 1 --num_beams 2": "leave one of them out",
    "--max_new_tokens 0": "--max_new_tokens 0: must be",
    "why": "unexpected word 'why'",
    "--metric": "unknown flag --metric; did you mean '--metrics'?",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals(words: str) -> None:
    assert REFUSALS[words] in refusal(caption.main, ["--resume", "run", *words.split()])


def test_from_python(asked: AskedWorld, alone: World) -> None:
    """The three lines of its docstring, and what it refuses."""
    model = api.load(asked.run, world=alone)
    row = asked.rows[0]
    features = asked.videos[row["video"]]
    answer = model.ask(features.numpy(), row["question"], row["options"])
    assert isinstance(answer, Answer) and answer.answer in row["options"] and answer.in_evaluation
    assert isinstance(model.ask(features, "why"), str)
    assert model.caption(features, max_new_tokens=4).startswith("the red ball")
    with pytest.raises(UserError, match="1 options, not 2 to 26"):
        model.ask(features, "why", ["a"])
    with pytest.raises(UserError, match="a video needs an encoder"):
        model.ask("a.mp4", "why", ["a", "b"])
    with pytest.raises(UserError, match="512 wide"):
        model.caption(features[:, :512])
    with pytest.raises(UserError, match="unknown key 'precison'; did you mean 'precision'"):
        api.load(asked.run, world=alone, precison="fp32")


@pytest.mark.slow
def test_two_ranks(asked: AskedWorld, tmp_path: Path) -> None:
    """The same captions and answers as one, to the byte."""
    commands = {
        "caption": ["caption", "--resume", str(asked.run), *SHORT],
        "ask": ["ask", "--resume", str(asked.run), "--questions", str(asked.data / "val.jsonl")],
    }
    for name, command in commands.items():
        written = []
        for ranks in (1, 2):
            target = tmp_path / f"{name}{ranks}.jsonl"
            succeeds(*command, "--output", str(target), ranks=ranks)
            written.append(target.read_bytes())
        assert written[0] == written[1] and written[0]
