"""A data set of one's own beside a published one: one stream, and what is compared of both."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from support.annotation_files import put
from support.toy_dataset import ToyData, records
from support.training_steps import config_of
from vico.cli.main import main
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.train import start as starting
from vico.train.build import read_inputs


@pytest.fixture
def data(toy: ToyData, tmp_path: Path) -> Path:
    """The toy NExT-QA and, with captions in its rows and other options, a set `my`."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    my = tmp_path / "data" / "my"
    torch.save({f"m{i}": torch.randn(5, 768) for i in range(3)}, put(my / "clipvitl14.pth", ""))
    for split, count in (("train", 6), ("val", 4)):
        rows = []
        for i in range(count):
            options = ["the man", "a dog", "blue"][: 2 + i % 2]
            row = {"video": f"x/m{i % 3}.mp4", "question": f"what {i}", "options": options}
            caption = f"A dog runs {i % 3}. It sits."
            rows.append({**row, "answer": "AB"[i % 2], "caption": caption, "type": f"t{i % 2}"})
        put(my / f"{split}.jsonl", rows)
    return tmp_path / "data"


@pytest.fixture
def in_this_process(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)


@pytest.fixture
def flags(toy: ToyData, data: Path, tmp_path: Path) -> list[str]:
    paths = ["--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    return [*toy.flags, *paths, "--dataset", "nextqa:0.5,my:1.5", "--batch_size", "7"]


@pytest.mark.usefixtures("in_this_process")
def test_they_train_as_one_stream(
    data: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With weights and both captions; each has its accuracies, its submission and its card."""
    assert main(["check", *flags]) == 0
    assert main(["train", *flags, "--epochs", "1"]) == 0
    printed = capfd.readouterr().out
    assert "train: an epoch holds 10 of 20 nextqa, 9 of 6 my questions" in printed
    assert f"captions: of 3 videos, in the rows of {data}/my/train.jsonl" in printed
    (record,) = records(tmp_path / "out" / "log.txt")
    assert record["val_n"] == 14 and record["val_my_n"] == 4 and record["train_cap_loss"] > 0
    assert {"val_acc", "val_my_acc", "val_my_t0", "val_nextqa_acc"} < record.keys()
    predictions = tmp_path / "out" / "predictions_val.jsonl"
    command = ["submission", str(predictions), "--format", "nextqa"]
    command += ["--data_path", str(data), "--split", "val", "--output"]
    assert main([*command, str(tmp_path / "nextqa.json")]) == 0
    assert "predictions_val.jsonl: 10 of 14 are of nextqa\n" in capfd.readouterr().out
    assert len(json.loads((tmp_path / "nextqa.json").read_text())) == 10
    assert main([*command, str(tmp_path / "my.json"), "--dataset", "my"]) == 0
    assert len(json.loads((tmp_path / "my.json").read_text())) == 4
    assert main([*command, str(tmp_path / "x.json"), "--dataset", "star"]) == 2
    assert "holds predictions on 'nextqa', 'my'; name one by --dataset" in capfd.readouterr().err

    assert main(["export", str(tmp_path / "out"), str(tmp_path / "card")]) == 0
    card = (tmp_path / "card" / "README.md").read_text()
    names = re.findall("^ +name: (.* val)$", card, re.MULTILINE)
    assert names == ["nextqa, my val", "nextqa val", "my val"]
    assert f"| my: all | {record['val_my_acc']:.2%} |" in card
    assert f"| nextqa, my: all | {record['val_acc']:.2%} |" in card


@pytest.mark.usefixtures("in_this_process")
def test_features_of_two_widths(
    data: Path, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    torch.save({f"m{i}": torch.randn(5, 512) for i in range(3)}, data / "my" / "clipvitl14.pth")
    says = (
        f"the data sets' features differ: nextqa: {data}/nextqa/clipvitl14.pth, 768 wide and "
        f"my: {data}/my/clipvitl14.pth, 512 wide; one model reads features of one width: "
    )
    for command in ("train", "check"):
        assert main([command, *flags]) == 2
        assert says in capfd.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_check_warns_of_what_sets_of_ones_own_share(
    data: Path, flags: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(data / "my", data / "again")
    put(data / "broken" / "train.jsonl", "{}\n")
    assert main(["check", *flags, "--dataset", "my"]) == 0
    printed = capfd.readouterr().out
    shared = "warning: again/val.jsonl: of 4 questions, shares 3 videos and 4 questions with"
    assert shared in printed
    assert "broken, train, is not compared with my: train.jsonl:1: no 'video'" in printed


def test_each_set_is_watched(toy: ToyData, data: Path, alone: World) -> None:
    """Numbers that change under the same size and time are found in whichever set."""
    config = config_of(toy, "--data_path", str(data), "--dataset", "nextqa,my")
    for name in ("nextqa", "my"):
        inputs = read_inputs(config, ("train", "val"), alone)
        recorded: dict[str, str] = {}
        starting._fingerprints(config, inputs, ("train", "val"), recorded, alone)
        path = data / name / "clipvitl14.pth"
        path.chmod(0o600)
        inputs.files.check_unchanged()
        status, content = path.stat(), bytearray(path.read_bytes())
        place = len(content) // 2
        content[place] ^= 1
        with path.open("r+b") as file:
            file.seek(place)
            file.write(content[place : place + 1])
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        with pytest.raises(TrainingError, match=f"{name}/clipvitl14.pth: changed during the run"):
            inputs.files.check_unchanged()
        content[place] ^= 1
        path.write_bytes(content)
