"""NExT-QA's and IntentQA's CSV: what is legal arrives verbatim, what is not ends with one line."""

from dataclasses import replace
from pathlib import Path

import pytest

from support.annotation_files import HEADER, OPTIONS, csv_row, csv_text, put
from support.errors import refusal
from vico.data.datasets import count_equal_options, read_questions
from vico.data.readers.nextqa import GROUPS
from vico.data.types import Question
from vico.errors import show
from vico.train.config import RunConfig


def test_csv_row(tmp_path: Path) -> None:
    put(tmp_path / "val.csv", csv_text([csv_row(), csv_row(qid="2", answer="4")]))
    first, second = read_questions("nextqa", tmp_path, "val")
    expected = Question(0, "1", "007", "CW", "why", tuple(OPTIONS), 0, place="val.csv:2")
    assert first == replace(expected, dataset="nextqa")
    assert (second.index, second.qid, second.answer, second.place) == (1, "2", 4, "val.csv:3")


def test_equal_options_are_counted(tmp_path: Path) -> None:
    put(tmp_path / "val.csv", csv_text([csv_row(), csv_row(qid="2", a4="clap")]))
    assert count_equal_options(read_questions("nextqa", tmp_path, "val")) == 1


def test_groups() -> None:
    members: dict[str, list[str]] = {}
    for name, group in GROUPS.items():
        members.setdefault(group, []).append(name)
    assert members == {
        "C": ["CW", "CH"],
        "T": ["TN", "TC", "TP"],
        "D": ["DL", "DC", "DO", "DB"],
    }


ROWS = [csv_row(), csv_row(qid="2", question="a\nb", kind="")]
ROWS_CRLF = [csv_row(), csv_row(qid="2", question="a\r\nb", kind="")]
ROWS_BLANKS = [csv_row(" 007\t", " 1 "), csv_row(qid=" 2", question="a\nb", kind=" ")]
ROWS_LONGER = [[*row, "x\ny", ""] for row in ROWS]
ROWS_NOTE = [[*row, ""] for row in ROWS]
ROWS_REVERSED = [row[::-1] for row in ROWS]
TWINS = {
    "BOM": "\ufeff" + csv_text(ROWS),
    "CRLF": csv_text(ROWS_CRLF, end="\r\n"),
    "blanks around names and ids": csv_text(ROWS_BLANKS, [f" {name} " for name in HEADER]),
    "extra columns": csv_text(ROWS_LONGER, [*HEADER, "action", "lemma"]),
    "columns in another order": csv_text(ROWS_REVERSED, HEADER[::-1]),
    "video_id": csv_text(ROWS, ["video_id", *HEADER[1:]]),
    "empty lines": csv_text(ROWS) + "\n,,,,,,,,,,,,\n\n",
    "no newline at the end": csv_text(ROWS).rstrip("\n"),
    "nor a value in the last extra column": csv_text(ROWS_NOTE, [*HEADER, "note"]).rstrip("\n"),
    "all quoted": csv_text(ROWS).replace("clap", '"clap"'),
}


@pytest.mark.parametrize("dataset", ["nextqa", "intentqa"])
@pytest.mark.parametrize("kind", TWINS)
def test_legal_twins(tmp_path: Path, kind: str, dataset: str) -> None:
    """Odd but legal files give the same questions as the plain one."""
    put(tmp_path / "train.csv", csv_text(ROWS))
    put(tmp_path / "val.csv", TWINS[kind])

    def content(split: str) -> list[tuple[object, ...]]:
        questions = read_questions(dataset, tmp_path, split)
        return [
            (q.index, q.qid, q.video, q.type, q.question, q.options, q.answer) for q in questions
        ]

    assert content("train") == content("val")
    second = read_questions(dataset, tmp_path, "train")[1]
    assert second.question == "a\nb" and second.type == "(unknown)"


def test_places_are_physical_lines(tmp_path: Path) -> None:
    """Also below a field with newlines."""
    rows = [csv_row(qid="1", question="a\nb\n\nc"), csv_row(qid="2"), csv_row(qid="3", answer="B")]
    put(tmp_path / "val.csv", csv_text(rows))
    assert refusal(read_questions, "nextqa", tmp_path, "val").startswith(
        "val.csv:7: 'answer' is 'B', not one of 0, 1, 2, 3, 4; correct /"
    )
    put(tmp_path / "val.csv", csv_text(rows[:2]))
    places = [q.place for q in read_questions("nextqa", tmp_path, "val")]
    assert places == ["val.csv:2", "val.csv:6"]


ROW = ",".join(csv_row()) + "\n"
TOP = ",".join(HEADER) + "\n"
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
BAD_CSV: dict[str, tuple[str | bytes, list[str]]] = {
    "missing column": (
        csv_text([csv_row()[:-2]], HEADER[:-2]),
        ["val.csv:1: columns 'a3', 'a4' missing (has: 'video', ", "add"],
    ),
    "duplicate column": (
        csv_text([[*csv_row(), "x"]], [*HEADER, " a0"]),
        ["val.csv:1: column 'a0' appears twice", "rename"],
    ),
    "field too many": (
        TOP + ROW[:-1] + ",x\n" + ROW,
        ["val.csv:2: 14 fields, header has 13", "correct"],
    ),
    "field too few": (
        TOP + ROW + "1,2,3\n" + ROW.replace("007", "8", 1),
        ["val.csv:3: 3 fields, header has 13", "correct"],
    ),
    "cut last line": (
        TOP + ROW + ROW[:-12],
        ["val.csv:3: the last line is cut off (11 fields, header has 13)", "fetch it again"],
    ),
    "cut last line of four": (
        TOP + ROW + ROW.replace("007", "8", 1) + ROW.replace("007", "9", 1) + ROW[:-12],
        ["val.csv:5: the last line is cut off (11 fields, header has 13)"],
    ),
    "cut at the last comma": (TOP + ROW + ROW[:-4], ["val.csv:3: the last line is cut off"]),
    "NUL": (TOP + ROW.replace("clap", "cl\0ap"), ["val.csv:2: a NUL byte at offset 94;", "UTF-8"]),
    "UTF-16": ((TOP + ROW).encode("utf-16"), ["UTF-16", "byte offset 0", "save it as UTF-8"]),
    "UTF-16 without mark": (
        (TOP + ROW).encode("utf-16-le"),
        ["val.csv:1: a NUL byte at offset 1, so this is UTF-16"],
    ),
    "latin-1": (
        (TOP + ROW.replace("clap", "clé")).encode("latin-1"),
        ["val.csv:2: not UTF-8 (byte 0xe9 at offset 94)", "UTF-8"],
    ),
    "latin-1 after BOM": (
        b"\xef\xbb\xbf" + (TOP + "é").encode("latin-1"),
        ["val.csv:2: not UTF-8 (byte 0xe9 at offset 74)"],
    ),
    "unclosed quote": (
        TOP + ROW + ROW.replace("clap", '"clap') + ROW,
        ["val.csv:3: a quote that opens in this row is never closed"],
    ),
    "unclosed before a quoted field": (
        TOP + ROW.replace("clap", '"clap') + ROW.replace("why", '"why"'),
        ["val.csv:2: broken quotes"],
    ),
    "unclosed in a large file": (
        TOP + ROW.replace("clap", '"clap') + ROW * 4000,
        ["val.csv:2: a quote that opens in this row is never"],
    ),
    "empty file": ("", ["val.csv: is empty; the CSV of the val questions should be there"]),
    "blank file": ("\n \n", ["val.csv: is empty"]),
    "empty quotes only": ('"",""\n""\n', ["val.csv: holds no header and no rows"]),
    "a quoted newline only": ('"\n"', ["val.csv: holds no header and no rows"]),
    "commas only": (",,,\n,,,\n", ["val.csv: holds no header and no rows; fetch it again"]),
    "header only": (TOP, ["val.csv: holds a header and no rows"]),
    "HTML page": ("<!DOCTYPE html><html>quota", ["is an HTML page (26 bytes)", "fetch it again"]),
    "git-lfs pointer": (LFS_POINTER, ["git-lfs pointer", "git lfs pull"]),
    "duplicate question": (
        TOP + ROW + ROW,
        ["val.csv:3: video '007' qid '1' is already at val.csv:2", "count twice"],
    ),
    "no video": (csv_text([csv_row(video=" ")]), ["val.csv:2: 'video' is empty"]),
    "no question": (csv_text([csv_row(question=" ")]), ["val.csv:2: 'question' is empty"]),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv(tmp_path: Path, kind: str) -> None:
    """The message says where, and what to do."""
    content, parts = BAD_CSV[kind]
    put(tmp_path / "val.csv", content)
    message = refusal(read_questions, "nextqa", tmp_path, "val")
    assert all(part in message for part in parts), message


def test_rows_of_blanks_are_counted(tmp_path: Path) -> None:
    """They are passed over, with a warning. An empty line is no row."""
    input_notes = pytest.importorskip("vico.train.input_notes")  # it needs torch
    blank = csv_text(ROWS) + "\n,,,,,,,,,,,,\n \n\n" + ',"", ,,,,,,,,,,\n'
    put(tmp_path / "val.csv", blank)
    questions = read_questions("nextqa", tmp_path, "val")
    assert len(questions) == 2
    notes = input_notes.annotation_notes(RunConfig(), "nextqa", {"val": questions})
    assert notes == ["warning: val: 3 rows of blanks are passed over"]
    put(tmp_path / "val.csv", csv_text(ROWS))
    questions = read_questions("nextqa", tmp_path, "val")
    assert input_notes.annotation_notes(RunConfig(), "nextqa", {"val": questions}) == []


NOT_AN_ANSWER = [
    *("", "1.0", "5", "7", "-1", "B", "True", "nan", "+1", "01", "¹", "0\n1"),
    "x" * 500,
]


@pytest.mark.parametrize("value", NOT_AN_ANSWER)
def test_answers_are_integers_in_range(tmp_path: Path, value: str) -> None:
    put(tmp_path / "train.csv", csv_text([csv_row(answer=value)]))
    message = refusal(read_questions, "nextqa", tmp_path, "train")
    assert message.startswith(f"train.csv:2: 'answer' is {show(value)}, not one of 0, 1, 2, 3, 4; ")


def test_many_bad_rows(tmp_path: Path) -> None:
    """They are counted, and three are shown."""
    rows = [csv_row(qid=str(i), answer="9" if i % 2 else "0") for i in range(20)]
    put(tmp_path / "val.csv", csv_text(rows))
    message = refusal(read_questions, "nextqa", tmp_path, "val")
    assert message.startswith("val.csv: 10 of 20 rows are bad: val.csv:3: ")
    assert message.count("val.csv:") == 4
    assert "; ...; correct" in message


def test_only_test_questions_may_lack_answers(tmp_path: Path) -> None:
    """All of them or none."""
    place = HEADER.index("answer")
    without_answer = [row[:place] + row[place + 1 :] for row in ROWS]
    no_column = csv_text(without_answer, HEADER[:place] + HEADER[place + 1 :])
    no_values = csv_text([csv_row(answer=""), csv_row(qid="2", answer="-1")])
    for content in (no_column, no_values):
        put(tmp_path / "test.csv", content)
        assert [q.answer for q in read_questions("nextqa", tmp_path, "test")] == [None, None]
    put(tmp_path / "val.csv", no_column)
    assert "column 'answer' missing" in refusal(read_questions, "nextqa", tmp_path, "val")
    put(tmp_path / "test.csv", csv_text([csv_row(), csv_row(qid="2", answer="")]))
    assert refusal(read_questions, "nextqa", tmp_path, "test").startswith(
        "test.csv:3: 1 of 2 questions have no answer and the others have"
    )
    three = [csv_row(), csv_row(qid="2", answer=""), csv_row(qid="3")]
    put(tmp_path / "test.csv", csv_text(three))
    assert "1 of 3 questions have no answer" in refusal(read_questions, "nextqa", tmp_path, "test")
    put(tmp_path / "test.csv", csv_text([csv_row(answer="7")]))
    assert "'answer' is '7', not one of" in refusal(read_questions, "nextqa", tmp_path, "test")
