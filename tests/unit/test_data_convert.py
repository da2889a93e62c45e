"""`vico data convert`: each published set gives the same samples as its conversion."""

from dataclasses import replace
from pathlib import Path

import pytest

from support.annotation_files import csv_row, csv_text, put, star_item, tvqa_row
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.cli.data import main
from vico.data.datasets import accuracy_groups, find_dataset, read_questions
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer

SRT = "1\n00:00:01,000 --> 00:00:02,000\n(Ted:) into\n"
ROWS = [csv_row(), csv_row(qid="2", a3="", a4="", question=" two  blanks ", kind="")]
FILES = {
    "nextqa": {"val.csv": csv_text(ROWS)},
    "intentqa": {"val.csv": csv_text(ROWS, end="\r\n")},
    "star": {"STAR_val.json": [star_item(), star_item(question_id="Odd", start=0, end=0)]},
    "tvqa": {
        "tvqa_val.jsonl": [tvqa_row(ts="0.5-9.5"), tvqa_row(ts="NaN-NaN", qid=9)],
        "tvqa_subtitles/s01_clip.srt": SRT,
    },
}


@pytest.mark.parametrize("name", FILES)
def test_same_samples(toy: ToyData, tmp_path: Path, name: str) -> None:
    """Token ids, clips, types, ids and groups."""
    for file, content in FILES[name].items():
        put(tmp_path / name / file, content)
    sub = name == "tvqa"
    command = ["convert", name, "--data_path", str(tmp_path), "--output", str(tmp_path / "my")]
    assert main([*command, *(["--sub"] if sub else [])]) == 0
    before = read_questions(name, tmp_path / name, "val", sub)
    after = read_questions("my", tmp_path / "my", "val")
    assert [replace(q, place="", dataset="") for q in before] == [
        replace(q, place="", dataset="") for q in after
    ]
    old, new = (find_dataset(n, tmp_path / n) for n in (name, "my"))
    tokenizer = Tokenizer(toy.llama / "tokenizer.model")
    for q, again in zip(before, after, strict=True):
        for task in ("vqa", "vaq", "qav"):
            sequences = [
                Prompts(tokenizer, 10, 512, 384, dialogue=d.has_dialogue).question_sequence(
                    task, question, question.answer or 0
                )
                for d, question in ((old, q), (new, again))
            ]
            assert sequences[0] == sequences[1]
    types = ["CW", "Interaction", "Castle"]
    groups = [accuracy_groups(dataset, types[:2] if sub else types[:1]) for dataset in (old, new)]
    assert groups[0] == groups[1] and old.mean_of == new.mean_of
    assert "already exists" in refusal(main, command)


def test_splits(tmp_path: Path) -> None:
    put(tmp_path / "nextqa" / "val.csv", csv_text(ROWS))
    command = ["convert", "nextqa", "--data_path", str(tmp_path), "--output", str(tmp_path / "my")]
    assert "'dev' is none of train, val, test" in refusal(main, [*command, "--splits", "val,dev"])
    assert "test.csv: no such file" in refusal(main, [*command, "--splits", "val,test"])
    assert not (tmp_path / "my").exists()


def test_a_mistyped_flag_is_one_line() -> None:
    for flag in ("--split", "--dat"):
        message = refusal(main, ["convert", "nextqa", "--output", "x", flag, "y"])
        assert message.startswith(f"unrecognized arguments: {flag} y")
    assert "ACTION" in refusal(main, [])
