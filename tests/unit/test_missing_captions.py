"""--missing_captions drop: a question without caption trains on its other tasks, and is counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from support.toy_dataset import ToyData, records
from support.training_steps import config_of, training_steps
from vico.checkpoint.fingerprint import of_captions
from vico.cli.main import main
from vico.data.readers.captions import Captions
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.train.build import read_inputs

CAPTIONS, MISSING = "llava_v15_13b_n6.json", "v0003"  # of 3 of 20 questions


@pytest.fixture
def data(toy: ToyData, tmp_path: Path) -> Path:
    """A copy of the toy data set's folder that a test may change."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    return tmp_path / "data" / "nextqa"


@pytest.fixture
def flags(toy: ToyData, data: Path, tmp_path: Path) -> list[str]:
    flags = [*toy.flags, "--data_path", str(data.parent), "--output_dir", str(tmp_path / "out")]
    return [*flags, "--missing_captions", "drop"]


@pytest.fixture(autouse=True)
def in_this_process(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)


def change_captions(data: Path, **texts: str | None) -> None:
    """`None` removes a caption."""
    content = json.loads((data / CAPTIONS).read_text()) | texts
    kept = {video: text for video, text in content.items() if text is not None}
    (data / CAPTIONS).write_text(json.dumps(kept))


def test_only_the_caption_task_is_left_out(toy: ToyData, alone: World) -> None:
    inputs = read_inputs(config_of(toy), ("train",), alone)
    whole = training_steps(inputs, micro_batch_size=1)
    counts = [whole[0, place].target_counts.tolist() for place in range(20)]
    order = [inputs.questions["train"][i].video for i in whole.order(0)]
    own = inputs.datasets["nextqa"]
    kept = Captions({video: text for video, text in own.captions.items() if video != MISSING})
    inputs = replace(inputs, datasets={"nextqa": replace(own, captions=kept)})
    steps = training_steps(inputs, micro_batch_size=1)
    assert inputs.num_without_caption == order.count(MISSING) == 3
    for place, video in enumerate(order):
        num_vqa, num_cap = counts[place]
        expected = [num_vqa, 0 if video == MISSING else num_cap]
        assert steps[0, place].target_counts.tolist() == expected
    assert steps.longest()[1] == 1


def test_the_loss_is_the_mean_over_the_captions_there_are(
    data: Path, flags: list[str], tmp_path: Path
) -> None:
    """It is that of the same step without those questions."""
    flags += "--batch_size 20 --max_steps 1 --caption_crop none".split()
    change_captions(data, **{MISSING: None})
    steps = []
    for name in ("with", "without"):
        assert main(["train", *flags, "--output_dir", str(tmp_path / name)]) == 0
        steps.append(records(tmp_path / name / "steps.jsonl")[0])
        lines = (data / "train.csv").read_text().splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(MISSING)]
        assert len(lines) - len(kept) == (3 if name == "with" else 0)
        (data / "train.csv").write_text("".join(kept))
    assert steps[0]["vqa_targets"] > steps[1]["vqa_targets"]
    assert steps[0]["cap_targets"] == steps[1]["cap_targets"]
    assert steps[0]["cap_loss"] == pytest.approx(steps[1]["cap_loss"], rel=1e-6)


def test_they_are_counted_and_may_not_change(
    data: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """At the start, beside every result, and when the run goes on."""
    whole = (data / CAPTIONS).read_text()
    change_captions(data, **{MISSING: " ", "w0001": "", "unused": ""})
    flags += "--batch_size 4 --epochs 2".split()
    assert main(["train", *flags, "--missing_captions", "error"]) == 2
    missing = f"3 of 20 questions (1 videos) have no caption, e.g. '{MISSING}' (it is empty); "
    assert missing in capfd.readouterr().err
    for num_steps in ("3", "5"):
        assert main(["train", *flags, "--max_steps", num_steps]) == 0
        printed = capfd.readouterr().out
        assert "train: 3 of 20 questions (1 videos) have no caption, and no capt" in printed
        assert "train: 2 captions are empty, and training does not use them" in printed
        assert records(tmp_path / "out" / "log.txt")[-1]["train_n_without_caption"] == 3
    assert main(["check", *flags, "--max_steps", "9"]) == 0
    assert "3 of 20 questions (1 videos) have no caption" in capfd.readouterr().out
    assert main(["eval", "--resume", str(tmp_path / "out" / "checkpoint-5")]) == 0

    (data / CAPTIONS).write_text(whole)
    capfd.readouterr()
    assert main(["train", *flags]) == 2
    assert "data captions" in capfd.readouterr().err
    change_captions(data, **dict.fromkeys(json.loads(whole)))
    assert main(["train", *flags]) == 2
    assert "20 of 20 questions (" in capfd.readouterr().err


def test_videos_with_equal_captions_are_told_apart() -> None:
    """The digest of captions is of their texts alone, as recorded, where none is missing."""
    assert of_captions({"a": "x"}) == of_captions({"b": "x"})
    assert of_captions({"a": "x"}, ["b"]) != of_captions({"b": "x"}, ["a"])
