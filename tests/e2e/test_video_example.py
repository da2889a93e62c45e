"""launch/examples/videos.sh: videos of moving shapes, from the mp4s to a report."""

import json
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("transformers")

from support.processes import ROOT, base_environment, run_command
from vico.data.readers import schema
from vico.video.encoder import load_encoder
from vico.video.features import video_features
from vico.video.frames import decode_frames

sys.path.insert(0, str(ROOT / "launch" / "examples"))
import videos

SCRIPT = ROOT / "launch" / "examples" / "videos.sh"
SPLITS = {"train": 4, "val": 3}
pytestmark = pytest.mark.xdist_group("videos")  # the commands go on in one folder


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, videos.Video]]:
    return {split: videos.videos_of(split, num) for split, num in SPLITS.items()}


def test_videos_show_what_is_asked(
    made: dict[str, dict[str, videos.Video]], tmp_path: Path
) -> None:
    """The middle of a frame has the colour of the shape where the video says that it is."""
    videos.write_videos(tmp_path, made)
    assert len(list(tmp_path.iterdir())) == sum(SPLITS.values())
    for name, video in made["train"].items():
        blocks = list(decode_frames(tmp_path / f"{name}.mp4", Fraction(1), videos.HEIGHT))
        frames = torch.cat([torch.from_numpy(block) for block in blocks])
        assert len(frames) == video.num_seconds
        for i in (0, len(frames) - 1):
            x, y = video.place(i * 5 / (5 * video.num_seconds - 1))
            # Left of the middle: a ring is hollow there.
            column = (x - 0.8 * video.radius + 1) * videos.HEIGHT / 2
            colour = frames[i, int((y + 1) * videos.HEIGHT / 2), int(column)].float()
            expected = torch.tensor(videos.COLOURS[video.colour]).float()
            background = torch.tensor(video.background).float()
            assert (colour - expected).norm() < (colour - background).norm(), (name, video)


def test_rows_are_legal(made: dict[str, dict[str, videos.Video]], tmp_path: Path) -> None:
    """No video is in both splits. Swapped rows ask the same about other videos of val."""
    own, swapped = tmp_path / "own", tmp_path / "swapped"
    for folder in (own, swapped):
        folder.mkdir()
        videos.write_rows(folder, made, is_swapped=folder == swapped)
    rows = {split: schema.read_file(own / f"{split}.jsonl") for split in SPLITS}
    assert not made["train"].keys() & made["val"].keys()
    for split, questions in rows.items():
        assert {question.video for question in questions} == set(made[split])
        for question in questions:
            video = made[split][question.video]
            assert question.answer is not None and question.caption == video.caption()
            assert question.options[question.answer] == video.answer(question.type)
    assert (own / "train.jsonl").read_bytes() == (swapped / "train.jsonl").read_bytes()
    others = schema.read_file(swapped / "val.jsonl")
    for question, other in zip(rows["val"], others, strict=True):
        assert question.question == other.question and question.caption == other.caption
        assert question.video != other.video and other.video in made["val"]


def test_the_encoder_is_read(
    made: dict[str, dict[str, videos.Video]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(videos, "ENCODER_STEPS", 3)
    videos.write_encoder(tmp_path / "clip")
    encoder = load_encoder(tmp_path / "clip")
    name, video = next(iter(made["val"].items()))
    videos.write_video(tmp_path / f"{name}.mp4", video)
    features = video_features(tmp_path / f"{name}.mp4", encoder, Fraction(1))
    assert features.shape == (video.num_seconds, 64)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--smollm"], "usage: bash "),
        (["--smollm2"], "--smollm2 names no folder; usage: bash "),
        (["a", "b"], "usage: bash "),
    ],
)
@pytest.mark.parametrize("name", ["videos", "cognition"])
def test_wrong_words(name: str, words: list[str], line: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT.with_stem(name)), *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2 and run.stderr.startswith(f"vico: error: {line}")
    assert len(run.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


# The whole example, in three parts: no test may take more than five minutes (.pytest.ini).


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The current one of the commands."""
    return tmp_path_factory.mktemp("example")


def example(folder: Path, *command: str) -> str:
    """The last line of stdout."""
    start = time.monotonic()
    run = run_command([*command, "out"], folder, base_environment(), seconds=290)
    assert run.codes == [0], run.output
    print(f"{command[-1]}: {time.monotonic() - start:.0f} s")
    return run.stdouts[0].splitlines()[-1]


@pytest.mark.slow
def test_the_inputs(folder: Path) -> None:
    """A tiny LLaMA and an encoder, which both know what they were taught."""
    example(folder, sys.executable, str(SCRIPT.with_suffix(".py")))
    made = {path.name for path in (folder / "out").iterdir()}
    assert made == {"videos", "data", "data_swapped", "clip", "pretrained"}


@pytest.mark.slow
def test_the_whole_example(folder: Path) -> None:
    """The bounds hold; the page is written."""
    result = json.loads(example(folder, "bash", str(SCRIPT)))
    print(result)
    assert result["val_acc"] >= 0.7 and result["val_acc_swapped_video"] <= 0.35
    assert result["cider"] >= 5 * result["cider_swapped"]
    assert result["report"] == str(folder / "out" / "report.html")
    assert Path(result["report"]).stat().st_size > 1e6


@pytest.mark.slow
def test_a_second_call(folder: Path) -> None:
    """It makes and trains nothing, and says the same."""
    first, second = (json.loads(example(folder, "bash", str(SCRIPT))) for _ in range(2))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    steps = (folder / "out" / "run" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == len({json.loads(line)["step"] for line in steps})
