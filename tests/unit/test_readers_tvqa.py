"""TVQA's JSON lines and SubRip files: what is legal arrives verbatim; else one line says why."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import FILE_PROPERTY, OPTIONS, put, tvqa_row
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.readers.tvqa import Subtitle, dialogue
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


def test_public_test_file(tmp_path: Path) -> None:
    """It has another name, and no answers."""
    row = tvqa_row()
    del row["answer_idx"], row["show_name"]
    put(tmp_path / "tvqa_test_public.jsonl", [row])
    only = read_questions("tvqa", tmp_path, "test")[0]
    assert (only.answer, only.type, only.place) == (None, "(unknown)", "tvqa_test_public.jsonl:1")


BAD_TIMES = ["", "5", "9-3", "a-b", "1-inf", "-5-9"]
BAD_ANSWERS = [5, -1, None, True, 1.0, "x"]
BAD_ROWS: list[tuple[dict[str, Any], str]] = [
    *(({"ts": ts}, f"'ts' is '{ts}'") for ts in BAD_TIMES),
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


# ---- subtitles -----------------------------------------------------------------------------

SRT = """1
00:00:40,000 --> 00:00:47,900
(Ted:) before

2
00:00:40,000 --> 00:00:48,999
into the clip

3
00:00:49,100 --> 00:00:50,000
two
lines

4
00:00:59,000 --> 00:01:00,900
ends in the last second
5
00:00:59,000 --> 00:01:01,000
out of the clip
"""
ALL_SPOKEN = " (Ted:) before into the clip two lines ends in the last second out of the clip"


def read_dialogue(folder: Path, srt: str | bytes, ts: str = "48.62-60.02") -> str:
    """The dialogue of a question about the clip `ts` of a video with these subtitles."""
    put(folder / "tvqa_val.jsonl", [tvqa_row(ts=ts)])
    put(folder / "tvqa_subtitles" / "s01_clip.srt", srt)
    return read_questions("tvqa", folder, "val", subtitles=True)[0].dialogue


@pytest.mark.parametrize(
    "ts, expected",
    [
        ("49.2-60.02", " two lines ends in the last second"),
        ("48.4-60.02", " into the clip two lines ends in the last second"),
        ("NaN-NaN", ALL_SPOKEN),
        ("20-30.1", ""),
    ],
)
def test_dialogue_of_a_clip(tmp_path: Path, ts: str, expected: str) -> None:
    assert read_dialogue(tmp_path, SRT, ts) == expected
    assert read_questions("tvqa", tmp_path, "val")[0].dialogue == ""


SRT_TWINS = {
    "BOM": "\ufeff" + SRT,
    "CRLF": SRT.replace("\n", "\r\n"),
    "CR": SRT.replace("\n", "\r"),
    "blanks and an empty line": SRT.replace("two\n", "two  \n\n"),
    "empty lines first": "\n\n" + SRT,
}


@pytest.mark.parametrize("kind", SRT_TWINS)
def test_legal_subtitle_twins(tmp_path: Path, kind: str) -> None:
    assert read_dialogue(tmp_path, SRT_TWINS[kind], "NaN-NaN") == ALL_SPOKEN


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "iso-8859-1"])
def test_subtitle_encodings(tmp_path: Path, encoding: str) -> None:
    srt = "01:00:01,5 --> 01:00:02.25\ncafé 42".encode(encoding)
    assert read_dialogue(tmp_path, srt, "3601-3602") == " café 42"


def test_subtitle_after_the_clip(tmp_path: Path) -> None:
    assert read_dialogue(tmp_path, "01:00:01,5 --> 01:00:02.25\nlate", "0-10") == ""


@FILE_PROPERTY
@given(
    start=st.integers(0, 9),
    length=st.integers(0, 9),
    first=st.integers(0, 9),
    duration=st.integers(0, 9),
)
def test_a_subtitle_is_kept_if_it_ends_in_the_clip(
    start: int, length: int, first: int, duration: int
) -> None:
    """The two published conditions come to this one, if no subtitle ends before it starts."""
    end, last = start + length, first + duration
    is_inside = start >= first and end <= last
    is_across_start = start <= first and end <= last and first <= end
    is_kept = dialogue([Subtitle(start, end, "x")], (first, last)) == " x"
    assert is_kept == (is_inside or is_across_start) == (first <= end <= last)


def test_files_without_subtitles(tmp_path: Path) -> None:
    for srt in ("", " \n", "<html>"):
        assert "s01_clip.srt (holds no subtitle)" in refusal(read_dialogue, tmp_path, srt)
    message = refusal(read_dialogue, tmp_path, "1\n00:00:0x --> 00:00:02\nhm\n")
    assert "s01_clip.srt:2 (time stamps '00:00:0x --> 00:00:02')" in message
    for stamp in ("9" * 5000 + ":00:00 --> 00:00:02", "00:00:00 --> 00:00:" + "9" * 5000):
        assert "s01_clip.srt:2 (time stamps '" in refusal(read_dialogue, tmp_path, f"1\n{stamp}\n")


def test_unused_subtitles_are_noted(tmp_path: Path) -> None:
    """They lie there, and --sub is not given."""
    preflight = pytest.importorskip("vico.train.preflight")  # it needs torch
    put(tmp_path / "tvqa" / "tvqa_subtitles" / "v0.srt", SRT)
    config = RunConfig(dataset="tvqa", data_path=tmp_path)
    note = f"{tmp_path}/tvqa/tvqa_subtitles: not used; --sub puts the subtitles into the prompts"
    assert preflight.annotation_notes(config, {}) == [note]
    for changes in ({"sub": True}, {"data_path": tmp_path / "other"}, {"dataset": "star"}):
        assert preflight.annotation_notes(replace(config, **changes), {}) == []


def test_lines_of_blanks_are_counted(tmp_path: Path) -> None:
    preflight = pytest.importorskip("vico.train.preflight")  # it needs torch
    rows = [json.dumps(tvqa_row(qid=i)) for i in range(2)]
    put(tmp_path / "tvqa_val.jsonl", f"{rows[0]}\r\n \r\n\r\n{rows[1]}\n\n\t\n")
    questions = read_questions("tvqa", tmp_path, "val")
    notes = preflight.annotation_notes(RunConfig(), {"val": questions})
    assert notes == ["warning: val: 2 rows of blanks are passed over"]


def test_missing_subtitles(tmp_path: Path) -> None:
    """They are counted, and three are named."""
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(qid=i, vid_name=f"v{i // 2}") for i in range(12)])
    message = refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)
    assert "tvqa_subtitles: no such folder" in message
    put(tmp_path / "tvqa_subtitles" / "v0.srt", SRT)
    message = refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)
    assert message.startswith("10 of 12 questions (5 videos) have no usable subtitle file, e.g. ")
    assert f"{tmp_path}/tvqa_subtitles/v1.srt (No such file" in message
    assert "--sub" in message
    assert message.count(".srt") == 3


def test_datasets_without_subtitles(tmp_path: Path) -> None:
    message = refusal(read_questions, "nextqa", tmp_path, "val", subtitles=True)
    assert "--sub: nextqa has no subtitles" in message


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a\0b", "x" * 300, "a\\b"])
def test_ids_are_never_trusted_as_paths(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.srt", SRT)
    put(tmp_path / "tvqa_subtitles" / "ok.srt", SRT)
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(vid_name=name)])
    message = refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)
    allowed = ("is no file name", "File name too long", "holds a NUL")
    assert any(part in message for part in allowed), message
