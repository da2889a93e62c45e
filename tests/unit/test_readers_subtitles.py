"""TVQA's subtitles: the same dialogue from each form; else one line says why."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import FILE_PROPERTY, put, tvqa_row
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.readers.subtitles import JSON_LINES, Subtitle, parse_srt
from vico.data.readers.tvqa import dialogue
from vico.data.types import Questions
from vico.train.config import RunConfig

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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "iso-8859-1", "utf-16"])
def test_subtitle_encodings(tmp_path: Path, encoding: str) -> None:
    srt = "01:00:01,5 --> 01:00:02.25\ncafé 42".encode(encoding)
    assert read_dialogue(tmp_path, srt, "3601-3602") == " café 42"


def test_time_stamps_are_hours_minutes_and_seconds(tmp_path: Path) -> None:
    (spoken,) = parse_srt("1\n01:02:03,4 --> 05:06:07.800\nhm\n", tmp_path)
    assert (spoken.start, spoken.end, spoken.text) == (3723, 18367, "hm")


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
    for srt in ("<html>", "1\nhm\n"):
        assert "s01_clip.srt (holds no subtitle)" in refusal(read_dialogue, tmp_path, srt)
    message = refusal(read_dialogue, tmp_path, "1\n00:00:0x --> 00:00:02\nhm\n")
    assert "s01_clip.srt:2 (time stamps '00:00:0x --> 00:00:02')" in message
    for stamp in ("9" * 5000 + ":00:00 --> 00:00:02", "00:00:00 --> 00:00:" + "9" * 5000):
        assert "s01_clip.srt:2 (time stamps '" in refusal(read_dialogue, tmp_path, f"1\n{stamp}\n")


def test_unused_subtitles_are_noted(tmp_path: Path) -> None:
    """They lie there, and --sub is not given."""
    input_notes = pytest.importorskip("vico.train.input_notes")  # it needs torch
    put(tmp_path / "tvqa" / "tvqa_subtitles" / "v0.srt", SRT)
    config = RunConfig(dataset="tvqa", data_path=tmp_path)
    put(tmp_path / "tvqa" / JSON_LINES, [])
    assert input_notes.annotation_notes(config, "tvqa", {}) == [
        f"{tmp_path}/tvqa/{name}: not used; --sub puts the subtitles into the prompts"
        for name in ("tvqa_subtitles", JSON_LINES)
    ]
    for changes in ({"sub": True}, {"data_path": tmp_path / "other"}, {"dataset": "star"}):
        changed = replace(config, **changes)
        assert input_notes.annotation_notes(changed, changed.dataset, {}) == []


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


def test_utf16_of_both_orders(tmp_path: Path) -> None:
    for mark, encoding in (("\ufeff", "utf-16-le"), ("\ufeff", "utf-16-be")):
        srt = (mark + SRT.replace("two", "caf\u00e9 \u732b")).encode(encoding)
        assert "caf\u00e9 \u732b lines" in read_dialogue(tmp_path, srt)


BAD_ENCODINGS = {
    "UTF-16 without a mark": SRT.encode("utf-16-le"),
    "UTF-32": SRT.encode("utf-32"),
    "binary": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "half a character of UTF-16": "\ufeffhm".encode("utf-16-le") + b"\x00\xd8x\x00",
}


@pytest.mark.parametrize("kind", BAD_ENCODINGS)
def test_subtitles_in_no_known_encoding(tmp_path: Path, kind: str) -> None:
    message = refusal(read_dialogue, tmp_path, BAD_ENCODINGS[kind])
    assert "s01_clip.srt (holds NUL: UTF-16" in message or "(begins as UTF-16 and is" in message


def test_capital_suffix(tmp_path: Path) -> None:
    """It is taken where there is no other."""
    assert read_dialogue(tmp_path, SRT) and read_dialogue(tmp_path, SRT, "NaN-NaN") == ALL_SPOKEN
    srt = tmp_path / "tvqa_subtitles" / "s01_clip.srt"
    srt.rename(srt.with_suffix(".SRT"))
    assert read_questions("tvqa", tmp_path, "val", True)[0].dialogue == ALL_SPOKEN
    put(srt, "00:00:01,5 --> 00:00:02.25\nother")
    assert read_questions("tvqa", tmp_path, "val", True)[0].dialogue == " other"


@pytest.mark.parametrize("srt", [b"", b" \r\n", b"\xef\xbb\xbf", b"\xff\xfe"])
def test_silent_clips(tmp_path: Path, srt: bytes) -> None:
    """An empty file is legal, and counted."""
    assert read_dialogue(tmp_path, srt) == ""
    questions = read_questions("tvqa", tmp_path, "val", subtitles=True)
    assert isinstance(questions, Questions) and not questions[0].lacks_subtitles
    assert questions.notes == (
        f"the subtitles are those of {tmp_path}/tvqa_subtitles",
        "the subtitles of 1 videos are empty: nobody speaks there",
    )


def test_subtitles_that_are_not_utf8_are_counted(tmp_path: Path) -> None:
    read_dialogue(tmp_path, SRT.replace("two", "caf\u00e9 \x92").encode("iso-8859-1"))
    questions = read_questions("tvqa", tmp_path, "val", subtitles=True)
    assert isinstance(questions, Questions)
    assert questions.notes[1:] == ("1 subtitle files are not UTF-8: read as ISO-8859-1",)


def official(subtitles: list[tuple[float, float, str]], video: str = "s01_clip") -> dict[str, Any]:
    """A line of the official file."""
    return {"vid_name": video, "sub": [{"text": t, "start": s, "end": e} for s, e, t in subtitles]}


OFFICIAL = [
    (40.0, 47.9, "(Ted:) before"),
    (40.0, 48.999, "into the clip"),
    (49.1, 50, "two\nlines"),
    (59, 60.9, "ends in the last second"),
    (59, 61.0, "out of the clip"),
]


@pytest.mark.parametrize("ts", ["NaN-NaN", "49.2-60.02", "48.4-60.02", "20-30.1"])
def test_official_subtitles(tmp_path: Path, ts: str) -> None:
    """The same subtitles in either form give the same dialogue."""
    from_srt = read_dialogue(tmp_path, SRT, ts)
    (tmp_path / "tvqa_subtitles" / "s01_clip.srt").unlink()
    (tmp_path / "tvqa_subtitles").rmdir()
    put(tmp_path / JSON_LINES, [official([], "unused"), official(OFFICIAL)])
    questions = read_questions("tvqa", tmp_path, "val", subtitles=True)
    assert isinstance(questions, Questions) and questions[0].dialogue == from_srt
    assert questions.notes == (f"the subtitles are those of {tmp_path}/{JSON_LINES}",)


def test_both_forms_of_subtitles(tmp_path: Path) -> None:
    """The SubRip files are read, and that is said."""
    put(tmp_path / JSON_LINES, [official([(49, 50, "another")])])
    assert read_dialogue(tmp_path, SRT, "NaN-NaN") == ALL_SPOKEN
    questions = read_questions("tvqa", tmp_path, "val", subtitles=True)
    assert isinstance(questions, Questions)
    source = f"{tmp_path}/tvqa_subtitles, not of {JSON_LINES} beside it"
    assert questions.notes == (f"the subtitles are those of {source}",)


BAD_LINES: dict[str, tuple[list[Any] | str, str]] = {
    "no line": ([official([], "other")], f"{JSON_LINES} (has no line of 's01_clip')"),
    "no id": ([{"sub": []}], f"{JSON_LINES}:1: 'vid_name' is missing (has: 'sub')"),
    "twice": (
        [official([])] * 2,
        f"{JSON_LINES}:2: vid_name 's01_clip' is already at {JSON_LINES}:1",
    ),
    "no sub": ([{"vid_name": "s01_clip"}], f"{JSON_LINES}:1 ('sub' is missing"),
    "a text": (
        [{"vid_name": "s01_clip", "sub": "hm"}],
        f"{JSON_LINES}:1 ('sub' is 'hm', not a list",
    ),
    "a time": (
        [official([(1, 2, "x"), ("soon", 2, "y")])],  # type: ignore[list-item]
        "('start' is 'soon', not a time",
    ),
    "no text": ([{"vid_name": "s01_clip", "sub": [{"start": 1, "end": 2}]}], "('text' is missing"),
    "no JSON": ("{", f"{JSON_LINES}:1: column 2: "),
    "empty": ("", f"{JSON_LINES}: is empty"),
}


@pytest.mark.parametrize("kind", BAD_LINES)
def test_bad_official_subtitles(tmp_path: Path, kind: str) -> None:
    content, part = BAD_LINES[kind]
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row()])
    put(tmp_path / JSON_LINES, content)
    assert part in refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)


def test_missing_subtitles_taken_as_empty(tmp_path: Path) -> None:
    """They are counted; what is bad is still an error, and so is it when all are missing."""
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(qid=i, vid_name=f"v{i // 2}") for i in range(6)])
    arguments = ("tvqa", tmp_path, "val", True, "empty")
    put(tmp_path / "tvqa_subtitles" / "other.srt", SRT)
    assert "6 of 6 questions (3 videos) have no usable" in refusal(read_questions, *arguments)
    put(tmp_path / "tvqa_subtitles" / "v0.srt", SRT)
    put(tmp_path / "tvqa_subtitles" / "v1.srt", "")
    questions = read_questions("tvqa", tmp_path, "val", True, "empty")
    assert [q.lacks_subtitles for q in questions] == [False] * 4 + [True] * 2
    assert [bool(q.dialogue) for q in questions] == [True] * 2 + [False] * 4
    assert isinstance(questions, Questions) and questions.notes[1] == (
        "2 of 6 questions (1 videos) have no subtitles, and so no dialogue "
        "(--missing_subtitles empty)"
    )
    message = refusal(read_questions, "tvqa", tmp_path, "val", True)
    assert message.startswith("2 of 6 ") and "--missing_subtitles empty" in message
    put(tmp_path / "tvqa_subtitles" / "v1.srt", "<html>")
    message = refusal(read_questions, *arguments)
    assert message.startswith("2 of 6 ") and "v1.srt (holds no subtitle)" in message


@FILE_PROPERTY
@given(
    st.lists(
        st.tuples(
            st.integers(0, 99_999),
            st.integers(0, 99_999),
            st.lists(st.text("ab (:)", min_size=1).filter(str.strip), min_size=1, max_size=3),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_both_forms_give_the_same_dialogue(
    tmp_path: Path, spoken: list[tuple[int, int, list[str]]]
) -> None:
    def stamp(milliseconds: int) -> str:
        seconds, rest = divmod(milliseconds, 1000)
        return f"00:{seconds // 60:02}:{seconds % 60:02},{rest:03}"

    blocks = [
        f"{i}\n{stamp(s)} --> {stamp(e)}\n" + "\n".join(t) for i, (s, e, t) in enumerate(spoken)
    ]
    put(tmp_path / "a" / "tvqa_subtitles" / "s01_clip.srt", "\n\n".join(blocks) + "\n")
    lines = [(s / 1000, e / 1000, "\n".join(t)) for s, e, t in spoken]
    put(tmp_path / "b" / JSON_LINES, [official(lines)])
    dialogues = []
    for name in ("a", "b"):
        put(tmp_path / name / "tvqa_val.jsonl", [tvqa_row(ts="20-70")])
        dialogues.append(read_questions("tvqa", tmp_path / name, "val", True)[0].dialogue)
    assert dialogues[0] == dialogues[1]


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
