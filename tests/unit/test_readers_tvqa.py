"""TVQA's JSON lines: what is legal arrives verbatim; else one line says why."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import OPTIONS, put, tvqa_row
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.types import Question
from vico.train.config import RunConfig


def test_tvqa_rows_and_clips(tmp_path: Path) -> None:
    stamps = ["48.62-60.02", "NaN-NaN", "2.5-3.5", "7.0-7.0", "0-3"]
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(ts=ts, qid=i) for i, ts in enumerate(stamps)])
    questions = read_questions("tvqa", tmp_path, "val")
    assert questions[0] == Question(
        index=0,
        qid="0",
        video="s01_clip",
        type="Castle",
        question="Why?",
        options=tuple(OPTIONS),
        answer=1,
        feature_rows=(147, 183),
        dialogue="",
        place="tvqa_val.jsonl:1",
        dataset="tvqa",
    )
    assert [q.feature_rows for q in questions] == [(147, 183), None, (6, 15), (21, 24), (0, 12)]


@pytest.mark.parametrize(
    "ts, rows",
    [
        ([48.62, 60.02], (147, 183)),
        (["48.62", "60.02"], (147, 183)),
        ("48.62 - 60.02", (147, 183)),
        ([2.5, 3.5], (6, 15)),
        ([7, 7.0], (21, 24)),
        ([None, None], None),
        (["NaN", "NaN"], None),
    ],
)
def test_times_as_a_list(tmp_path: Path, ts: Any, rows: Any) -> None:
    """JSON has no NaN: a list that pandas wrote holds null for it."""
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(ts=ts)])
    assert read_questions("tvqa", tmp_path, "val")[0].feature_rows == rows


def test_public_test_file(tmp_path: Path) -> None:
    """It has another name, and no answers."""
    row = tvqa_row()
    del row["answer_idx"], row["show_name"]
    put(tmp_path / "tvqa_test_public.jsonl", [row])
    only = read_questions("tvqa", tmp_path, "test")[0]
    assert (only.answer, only.type, only.place) == (None, "(unknown)", "tvqa_test_public.jsonl:1")


BAD_TIMES = ["", "5", "9-3", "a-b", "1-inf", "-5-9"]
BAD_LISTS = [[], [1], [1, 2, 3], [9, 3], [True, 3], ["a", 3], [[1], 2], 5, True, None, {"a": 1}]
BAD_ANSWERS = [5, -1, None, True, 1.0, "x"]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    *(({"ts": ts}, f"'ts' is '{ts}'") for ts in BAD_TIMES),
    *(({"ts": ts}, f"'ts' is {ts!r}") for ts in BAD_LISTS),
    *(
        ({"answer_idx": answer}, f"'answer_idx' is {answer!r}, not one of 0, 1, 2, 3, 4")
        for answer in BAD_ANSWERS
    ),
    ({"a3": 7}, "'a3' is 7, not a text"),
    ({"qid": 1.5}, "'qid' is 1.5, not a text"),
    ({"q": ""}, "'q' is empty"),
]


@pytest.mark.parametrize("change, part", BAD_ROWS)
def test_bad_tvqa_rows(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    put(tmp_path / "tvqa_val.jsonl", "\ufeff\n" + json.dumps(tvqa_row(**change)) + "\r\n")
    message = refusal(read_questions, "tvqa", tmp_path, "val")
    assert message.startswith("tvqa_val.jsonl:2: ") and part in message


LINE = json.dumps(tvqa_row())
BAD_JSONL = [
    (LINE + "\n" + LINE[:-30], "tvqa_val.jsonl:2: column 1"),
    (LINE + "\n" + LINE[:-1], "the text is cut off here"),
    (
        LINE.replace('"a1"', '"a0"'),
        "tvqa_val.jsonl:1: column 16: key 'a0' appears twice in one object",
    ),
    (LINE.replace('"a1"', '"\\u00610"'), "column 16: key 'a0' appears twice"),
    (
        "\n" + LINE.replace(": 5,", ": NaN,"),
        f"tvqa_val.jsonl:2: column {LINE.index(': 5,') + 3}: NaN is not JSON",
    ),
    (LINE.replace(": 5,", ": [{}, -Infinity],"), "-Infinity is not JSON"),
    (LINE[:-1] + ",}", f"tvqa_val.jsonl:1: column {len(LINE) // 10}"),
    (
        f"[{LINE}]",
        "tvqa_val.jsonl:1: column 1: a list where one JSON object per line is expected",
    ),
    ("[" * 100_000, "tvqa_val.jsonl:1: column 1: "),
    ("9" * 10_000, "tvqa_val.jsonl:1: column 1: "),
]


@pytest.mark.parametrize("content, part", BAD_JSONL)
def test_bad_jsonl(tmp_path: Path, content: str, part: str) -> None:
    """The message says line and column."""
    put(tmp_path / "tvqa_val.jsonl", content)
    assert part in refusal(read_questions, "tvqa", tmp_path, "val")


def test_lines_of_blanks_are_counted(tmp_path: Path) -> None:
    input_notes = pytest.importorskip("vico.train.input_notes")  # it needs torch
    rows = [json.dumps(tvqa_row(qid=i)) for i in range(2)]
    put(tmp_path / "tvqa_val.jsonl", f"{rows[0]}\r\n \r\n\r\n{rows[1]}\n\n\t\n")
    questions = read_questions("tvqa", tmp_path, "val")
    notes = input_notes.annotation_notes(RunConfig(), "tvqa", {"val": questions})
    assert notes == ["warning: val: 2 rows of blanks are passed over"]
