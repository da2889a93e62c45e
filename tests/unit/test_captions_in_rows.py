"""Captions in the rows of a table of the general schema: one for each video."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.errors import refusal
from support.toy_dataset import ToyData, records
from vico.cli.main import main
from vico.data.datasets import read_questions
from vico.data.readers import captions, schema
from vico.distributed import world as dist
from vico.distributed.world import World

ROW: dict[str, Any] = {"video": "v", "question": "why", "options": ["a", "b"], "answer": 1}
TOP = "video,question,a0,a1,answer,caption\n"


def captions_of(folder: Path, named: Path | None = None) -> captions.Captions:
    splits = {}
    for split in ("train", "val"):
        if (folder / f"{split}.jsonl").exists() or (folder / f"{split}.csv").exists():
            splits[split] = read_questions("my", folder, split)
    return captions.chosen(splits, schema.annotation_file(folder, "train"), folder, named)


@pytest.fixture
def my(tmp_path: Path) -> Path:
    return tmp_path / "my"


def rows(*captions: object, **changes: Any) -> list[dict[str, Any]]:
    return [{**ROW, "caption": text, **changes} for text in captions]


@pytest.mark.parametrize(
    "name, content",
    [
        ("train.jsonl", rows("", " A man. ", None, " A man. ")),
        ("train.jsonl", rows(["A man.", "He runs."])),
        ("train.csv", TOP + 'v,why,a,b,1,\nv,why,a,b,1," A man. "\n'),
        ("train.csv", TOP.title().replace(",", ";") + "v;why;a;b;1;A man.\n"),
    ],
)
def test_a_video_has_one(my: Path, name: str, content: Any) -> None:
    """In some of its rows, or in all. No caption file is needed."""
    put(my / name, content)
    read = captions_of(my)
    assert read["v"].split(".")[0].strip() == "A man" and len(read) == 1
    assert read.path == my / name and not read.empty
    assert captions.notes("train", read, read_questions("my", my, "train")) == [
        f"captions: of 1 videos, in the rows of {my / name}"
    ]


def test_a_video_of_two_captions(my: Path) -> None:
    """In one file, or in two: both rows are named. Blanks around them are no difference."""
    put(my / "train.jsonl", rows("A man.", "A man. \n"))
    put(my / "val.jsonl", rows("A man.", "", None, "A dog.", "A cat."))
    message = refusal(captions_of, my)
    assert message.startswith(
        "train.jsonl:1 and val.jsonl:4: two captions of video 'v' (so have 1 v"
    )
    put(my / "train.jsonl", rows("A man.", "A dog."))
    assert refusal(captions_of, my).startswith("train.jsonl:1 and train.jsonl:2: two captions of ")


def test_captions_of_val_are_not_used(my: Path) -> None:
    put(my / "train.jsonl", rows(" "))
    put(my / "val.jsonl", rows("A man."))
    assert "holds no caption file" in refusal(captions_of, my)


def test_a_caption_file_beside_them(my: Path) -> None:
    """The rows go before one that is there, and --captions before the rows; a note says so."""
    put(my / "train.jsonl", rows("of the row"))
    file = put(my / "captions.json", {"v": "of the file"})
    read = captions_of(my)
    assert read["v"] == "of the row"
    assert read.notes[1] == f"{file}: not used: rows have captions; --captions names a file"
    read = captions_of(my, Path("captions.json"))
    assert read["v"] == "of the file"
    assert read.notes == (
        f"captions: of {file} (--captions); those in the rows of {my / 'train.jsonl'} are not used",
    )


def test_a_caption_that_is_no_text(my: Path) -> None:
    put(my / "train.jsonl", rows("x", 7))
    message = refusal(read_questions, "my", my, "train")
    assert message.startswith("train.jsonl:2: caption of video 'v' is 7, not a text")


def test_convert_keeps_them(my: Path, tmp_path: Path) -> None:
    put(my / "train.jsonl", rows("", " A man. "))
    command = ["data", "convert", "my", "--data_path", str(tmp_path), "--output"]
    assert main([*command, str(tmp_path / "copy")]) == 0
    assert [row.get("caption") for row in records(tmp_path / "copy" / "train.jsonl")] == [
        None,
        " A man. ",
    ]


def test_they_train(
    toy: ToyData,
    alone: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As captions of a file do, bit for bit."""
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)
    for name in ("rows", "file"):
        folder = tmp_path / name / "my"
        folder.mkdir(parents=True)
        shutil.copy(toy.data / "clipvitl14.pth", folder)
        for split, of_split in toy.rows.items():
            lines = [dict(row) for row in of_split]
            for line in lines if name == "rows" else []:
                line["caption"] = toy.captions[line["video"]]
            put(folder / f"{split}.jsonl", lines)
    put(tmp_path / "file" / "my" / "captions.json", json.dumps(toy.captions))
    flags = [*toy.flags, *"--dataset my --batch_size 10 --max_steps 1".split()]
    steps = []
    for name in ("file", "rows"):
        paths = ["--data_path", str(tmp_path / name), "--output_dir", str(tmp_path / f"out_{name}")]
        assert main(["train", *flags, *paths]) == 0
        steps.append(records(tmp_path / f"out_{name}" / "steps.jsonl")[0])
    assert steps[0]["cap_loss"] == steps[1]["cap_loss"] and steps[0]["cap_targets"] > 0
    assert "captions: of 7 videos, in the rows of " in capfd.readouterr().out
    assert main(["check", *flags, *paths]) == 0
