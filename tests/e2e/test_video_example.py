"""launch/examples/videos.sh: videos of moving shapes, from the mp4s to a report."""

import json
import subprocess
import sys
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
def test_wrong_words(words: list[str], line: str, tmp_path: Path) -> None:
    command = ["bash", str(SCRIPT), *words]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 2 and run.stderr.startswith(f"vico: error: {line}")
    assert len(run.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_whole_example(tmp_path: Path) -> None:
    """From another folder, twice: the second call makes and trains nothing, and says the same."""
    results = []
    for _ in range(2):
        command = ["bash", str(SCRIPT), "out"]
        run = run_command(command, tmp_path, base_environment(), seconds=1500)
        assert run.codes == [0], run.output
        results.append(json.loads(run.stdouts[0].splitlines()[-1]))
        print(results[-1])
    first, second = results
    assert first["val_acc"] >= 0.7 and first["val_acc_swapped_video"] <= 0.35
    assert first["cider"] >= 5 * first["cider_swapped"]
    assert first["report"] == str(tmp_path / "out" / "report.html")
    assert Path(first["report"]).stat().st_size > 1e6
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    steps = (tmp_path / "out" / "run" / "steps.jsonl").read_text().splitlines()
    assert len(steps) == len({json.loads(line)["step"] for line in steps})
