"""Annotation and subtitle files: what is legal arrives verbatim, what is not ends with one line that helps."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.errors import refusal
from vico.data.datasets import DATASETS, accuracy_groups, count_equal_options, read_questions
from vico.data.readers import rows as tables
from vico.data.readers import tvqa
from vico.data.types import Question
from vico.errors import UserError

HEADER = [
    "video",
    "frame_count",
    "width",
    "height",
    "question",
    "answer",
    "qid",
    "type",
    "a0",
    "a1",
    "a2",
    "a3",
    "a4",
]
OPTIONS = ["clap", "None", "nan", "NA ", "007"]
RULES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def csv_row(
    video: str = "007",
    qid: str = "1",
    answer: str = "0",
    question: str = "why",
    kind: str = "CW",
    **more: str,
) -> list[str]:
    row = (
        dict(
            zip(HEADER, [video, "9", "4", "3", question, answer, qid, kind, *OPTIONS], strict=True)
        )
        | more
    )
    return list(row.values())


def csv_text(rows: list[list[str]], header: list[str] = HEADER, end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerows([header, *rows])
    return out.getvalue()


def star_item(**more: Any) -> dict[str, Any]:
    choices = [{"choice_id": i, "choice": c} for i, c in [(3, "d"), (1, "b"), (0, "a"), (2, "b")]]
    return {
        "question_id": "Interaction_T1_13",
        "question": "Which?",
        "video_id": "V1",
        "start": 6.5,
        "end": 18.099999999999998,
        "answer": "b",
        "choices": choices,
    } | more


def tvqa_row(**more: Any) -> dict[str, Any]:
    options = {f"a{i}": text for i, text in enumerate(OPTIONS)}
    facts = {
        "answer_idx": 1,
        "q": "Why?",
        "qid": 5,
        "vid_name": "s01_clip",
        "show_name": "Castle",
        "ts": "48.62-60.02",
    }
    return {**options, **facts, **more}


def put(path: Path, content: str | bytes | list[Any] | dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif isinstance(content, (list, dict)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_csv_row_becomes_a_question(tmp_path: Path) -> None:
    put(tmp_path / "val.csv", csv_text([csv_row(), csv_row(qid="2", answer="4")]))
    first, second = read_questions("nextqa", tmp_path, "val")
    assert first == Question(0, "1", "007", "CW", "why", tuple(OPTIONS), 0, None, "", "val.csv:2")
    assert (second.index, second.qid, second.answer, second.place) == (1, "2", 4, "val.csv:3")
    put(tmp_path / "val.csv", csv_text([csv_row(), csv_row(qid="2", a4="clap")]))
    assert count_equal_options(read_questions("nextqa", tmp_path, "val")) == 1


CLEAN = [csv_row(), csv_row(qid="2", question="a\nb", kind="")]
SPACED = [f" {name} " for name in HEADER]
TWINS = {
    "BOM": "\ufeff" + csv_text(CLEAN),
    "CRLF": csv_text([[field.replace("\n", "\r\n") for field in row] for row in CLEAN], end="\r\n"),
    "blanks around names and ids": csv_text(
        [csv_row(" 007\t", " 1 "), csv_row(qid=" 2", question="a\nb", kind=" ")], SPACED
    ),
    "extra columns": csv_text([[*row, "x\ny", ""] for row in CLEAN], [*HEADER, "action", "lemma"]),
    "columns in another order": csv_text([row[::-1] for row in CLEAN], HEADER[::-1]),
    "video_id": csv_text(CLEAN, ["video_id", *HEADER[1:]]),
    "empty lines": csv_text(CLEAN) + "\n,,,,,,,,,,,,\n\n",
    "no newline at the end": csv_text(CLEAN).rstrip("\n"),
    "nor a value in the last extra column": csv_text(
        [[*row, ""] for row in CLEAN], [*HEADER, "note"]
    ).rstrip("\n"),
    "all quoted": csv_text(CLEAN).replace("clap", '"clap"'),
}


@pytest.mark.parametrize("dataset", ["nextqa", "intentqa"])
@pytest.mark.parametrize("kind", TWINS)
def test_odd_but_legal_twins_give_the_same_questions(
    tmp_path: Path, kind: str, dataset: str
) -> None:
    put(tmp_path / "train.csv", csv_text(CLEAN))
    put(tmp_path / "val.csv", TWINS[kind])
    clean, twin = (read_questions(dataset, tmp_path, split) for split in ("train", "val"))
    bare = [
        [(q.index, q.qid, q.video, q.type, q.question, q.options, q.answer) for q in some]
        for some in (clean, twin)
    ]
    assert bare[0] == bare[1]
    assert clean[1].question == "a\nb" and clean[1].type == "(unknown)"


def test_lines_are_physical_ones_behind_newlines_in_quotes(tmp_path: Path) -> None:
    rows = [csv_row(qid="1", question="a\nb\n\nc"), csv_row(qid="2"), csv_row(qid="3", answer="B")]
    put(tmp_path / "val.csv", csv_text(rows))
    assert refusal(read_questions, "nextqa", tmp_path, "val").startswith(
        "val.csv:7: 'answer' is 'B', not one of 0, 1, 2, 3, 4; correct /"
    )
    put(tmp_path / "val.csv", csv_text(rows[:2]))
    assert [q.place for q in read_questions("nextqa", tmp_path, "val")] == [
        "val.csv:2",
        "val.csv:6",
    ]


ROW = ",".join(csv_row()) + "\n"
TOP = ",".join(HEADER) + "\n"
BAD_CSV: dict[str, tuple[str | bytes, list[str]]] = {
    "missing column": (
        csv_text([csv_row()[:-2]], HEADER[:-2]),
        ["val.csv:1: columns 'a3', 'a4' missing (has: 'video', ", "add"],
    ),
    "duplicate column": (
        csv_text([[*csv_row(), "x"]], [*HEADER, " a0"]),
        ["val.csv:1: column 'a0' stands there twice", "rename"],
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
    "header only": (TOP, ["val.csv: holds a header and no rows"]),
    "HTML page": ("<!DOCTYPE html><html>quota", ["is an HTML page (26 bytes)", "fetch it again"]),
    "git-lfs pointer": (
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
        ["git-lfs pointer", "git lfs pull"],
    ),
    "duplicate question": (
        TOP + ROW + ROW,
        ["val.csv:3: video '007' qid '1' stands already at val.csv:2", "count twice"],
    ),
    "no video": (csv_text([csv_row(video=" ")]), ["val.csv:2: 'video' is empty"]),
    "no question": (csv_text([csv_row(question=" ")]), ["val.csv:2: 'question' is empty"]),
}


@pytest.mark.parametrize("kind", BAD_CSV)
def test_bad_csv_says_where_and_what_to_do(tmp_path: Path, kind: str) -> None:
    content, parts = BAD_CSV[kind]
    put(tmp_path / "val.csv", content)
    message = refusal(read_questions, "nextqa", tmp_path, "val")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    "value", ["", "1.0", "5", "7", "-1", "B", "True", "nan", "+1", "01", "¹", "0\n1", "x" * 500]
)
def test_answers_are_integers_in_range(tmp_path: Path, value: str) -> None:
    put(tmp_path / "train.csv", csv_text([csv_row(answer=value)]))
    message = refusal(read_questions, "nextqa", tmp_path, "train")
    assert message.startswith(
        f"train.csv:2: 'answer' is {tables.show(value)}, not one of 0, 1, 2, 3, 4; "
    )


def test_many_bad_rows_are_counted_and_three_shown(tmp_path: Path) -> None:
    put(
        tmp_path / "val.csv",
        csv_text([csv_row(qid=str(i), answer="9" if i % 2 else "0") for i in range(20)]),
    )
    message = refusal(read_questions, "nextqa", tmp_path, "val")
    assert (
        message.startswith("val.csv: 10 of 20 rows are bad: val.csv:3: ")
        and message.count("val.csv:") == 4
        and "; ...; correct" in message
    )


def test_a_missing_file_is_named_with_what_should_be_there(tmp_path: Path) -> None:
    for dataset, name in [
        ("nextqa", "val.csv"),
        ("star", "STAR_val.json"),
        ("tvqa", "tvqa_val.jsonl"),
    ]:
        assert refusal(read_questions, dataset, tmp_path, "val").startswith(
            f"{tmp_path / name}: no such file; the "
        )
    (tmp_path / "val.csv").mkdir()
    assert "cannot be read (Is a directory)" in refusal(read_questions, "nextqa", tmp_path, "val")


def test_only_test_questions_may_lack_answers_and_only_all_of_them(tmp_path: Path) -> None:
    place = HEADER.index("answer")
    plain = csv_text(
        [row[:place] + row[place + 1 :] for row in CLEAN], HEADER[:place] + HEADER[place + 1 :]
    )
    for content in (plain, csv_text([csv_row(answer=""), csv_row(qid="2", answer="-1")])):
        put(tmp_path / "test.csv", content)
        assert [q.answer for q in read_questions("nextqa", tmp_path, "test")] == [None, None]
    put(tmp_path / "val.csv", plain)
    assert "column 'answer' missing" in refusal(read_questions, "nextqa", tmp_path, "val")
    put(tmp_path / "test.csv", csv_text([csv_row(), csv_row(qid="2", answer="")]))
    assert refusal(read_questions, "nextqa", tmp_path, "test").startswith(
        "test.csv:3: 1 of 2 questions have no answer and the others have"
    )
    put(tmp_path / "test.csv", csv_text([csv_row(answer="7")]))
    assert "'answer' is '7', not one of" in refusal(read_questions, "nextqa", tmp_path, "test")


TEXT = st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)


@RULES
@given(texts=st.lists(st.lists(TEXT, min_size=5, max_size=5), min_size=1, max_size=4))
def test_any_option_text_comes_back_verbatim(tmp_path: Path, texts: list[list[str]]) -> None:
    put(
        tmp_path / "val.csv",
        csv_text([[*csv_row(qid=str(i))[:8], *options] for i, options in enumerate(texts)]),
    )
    assert [list(q.options) for q in read_questions("nextqa", tmp_path, "val")] == texts
    put(
        tmp_path / "tvqa_val.jsonl",
        [tvqa_row(qid=i, **{f"a{k}": t for k, t in enumerate(o)}) for i, o in enumerate(texts)],
    )
    assert [list(q.options) for q in read_questions("tvqa", tmp_path, "val")] == texts


@RULES
@given(data=st.data())
@pytest.mark.parametrize(
    "dataset, name", [("nextqa", "val.csv"), ("star", "STAR_val.json"), ("tvqa", "tvqa_val.jsonl")]
)
def test_damage_never_ends_in_another_exception(
    tmp_path: Path, dataset: str, name: str, data: st.DataObject
) -> None:
    clean: Any = {"nextqa": TOP + ROW, "star": [star_item()], "tvqa": [tvqa_row()]}[dataset]
    whole = put(tmp_path / name, clean).read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    junk = data.draw(
        st.one_of(
            st.binary(max_size=6),
            st.sampled_from([b'"', b"NaN", b"\n", b"[[", b"null", b"1e999", b"\\ud800"]),
        )
    )
    (tmp_path / name).write_bytes(whole[:at] + junk + whole[at + data.draw(st.integers(0, 9)) :])
    try:
        read_questions(dataset, tmp_path, "val")
    except UserError as problem:
        assert str(problem).isprintable()


def test_star_answers_are_texts_and_clips_round_half_to_even(tmp_path: Path) -> None:
    put(
        tmp_path / "STAR_val.json",
        [star_item(), star_item(question_id="Odd", start="7.5", end="7.5", answer="d")],
    )
    first, second = read_questions("star", tmp_path, "val")
    assert first == Question(
        0,
        "Interaction_T1_13",
        "V1",
        "Interaction",
        "Which?",
        ("a", "b", "b", "d"),
        1,
        (6, 19),
        "",
        "STAR_val.json[0]",
    )
    assert (second.type, second.feature_rows, second.answer) == ("(unknown)", (8, 9), 3)
    unanswered = {key: value for key, value in star_item().items() if key != "answer"}
    put(tmp_path / "STAR_test.json", [unanswered])
    assert read_questions("star", tmp_path, "test")[0].answer is None
    put(tmp_path / "STAR_val.json", [unanswered])
    assert refusal(read_questions, "star", tmp_path, "val").startswith(
        "STAR_val.json[0]: 'answer' is missing (has: 'question_id'"
    )


BAD_STAR: dict[str, tuple[dict[str, Any], str]] = {
    "answer": ({"answer": "B"}, "'answer' is 'B', not one of the choices ['a', 'b', 'b', 'd']"),
    "choices": ({"choices": "ab"}, "'choices' is 'ab', not a list"),
    "same choice_id": (
        {"choices": [{"choice_id": 1, "choice": "b"}] * 2},
        "choice_id 1 is no integer or stands twice",
    ),
    "choice without text": (
        {"choices": [{"choice_id": 1}, {"choice_id": 2}]},
        "'choice' is missing (has: 'choice_id')",
    ),
    "time": ({"start": "soon"}, "'start' is 'soon', not a time in seconds"),
    "infinite": ({"end": "inf"}, "'end' is 'inf', not a time in seconds"),
    "huge": ({"end": 10**400}, "not a time in seconds"),
    "backwards": (
        {"start": 20},
        "the clip ends at 18.099999999999998 s, before it starts at 20.0 s",
    ),
    "video": ({"video_id": None}, "'video_id' is None, not a text"),
    "half a character": ({"question": "\ud800?"}, "'question' holds a NUL or half a character"),
}


@pytest.mark.parametrize("kind", BAD_STAR)
def test_bad_star_items(tmp_path: Path, kind: str) -> None:
    change, part = BAD_STAR[kind]
    put(tmp_path / "STAR_train.json", [star_item(question_id="Sequence_1_1"), star_item(**change)])
    message = refusal(read_questions, "star", tmp_path, "train")
    assert message.startswith("STAR_train.json[1]: ") and part in message and "correct" in message


def test_tvqa_rows_and_clips(tmp_path: Path) -> None:
    stamps = ["48.62-60.02", "NaN-NaN", "2.5-3.5", "7.0-7.0"]
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(ts=ts, qid=i) for i, ts in enumerate(stamps)])
    questions = read_questions("tvqa", tmp_path, "val")
    assert questions[0] == Question(
        0, "0", "s01_clip", "Castle", "Why?", tuple(OPTIONS), 1, (147, 183), "", "tvqa_val.jsonl:1"
    )
    assert [q.feature_rows for q in questions] == [(147, 183), None, (6, 15), (21, 24)]
    unanswered = {
        key: value for key, value in tvqa_row().items() if key not in ("answer_idx", "show_name")
    }
    put(tmp_path / "tvqa_test_public.jsonl", [unanswered])
    only = read_questions("tvqa", tmp_path, "test")[0]
    assert (only.answer, only.type, only.place) == (None, "(unknown)", "tvqa_test_public.jsonl:1")


@pytest.mark.parametrize(
    "change, part",
    [({"ts": ts}, f"'ts' is '{ts}'") for ts in ["", "5", "9-3", "a-b", "1-inf", "-5-9"]]
    + [
        ({"answer_idx": a}, f"'answer_idx' is {a!r}, not one of 0, 1, 2, 3, 4")
        for a in [5, -1, None, True, 1.0, "x"]
    ]
    + [
        ({"a3": 7}, "'a3' is 7, not a text"),
        ({"qid": 1.5}, "'qid' is 1.5, not a text"),
        ({"q": ""}, "'q' is empty"),
    ],
)
def test_bad_tvqa_rows(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    put(tmp_path / "tvqa_val.jsonl", "\ufeff\n" + json.dumps(tvqa_row(**change)) + "\r\n")
    message = refusal(read_questions, "tvqa", tmp_path, "val")
    assert message.startswith("tvqa_val.jsonl:2: ") and part in message


LINE = json.dumps(tvqa_row())


@pytest.mark.parametrize(
    "content, part",
    [
        (LINE + "\n" + LINE[:-30], "tvqa_val.jsonl:2: column 1"),
        (LINE + "\n" + LINE[:-1], "the text is cut off here"),
        (
            LINE.replace('"a1"', '"a0"'),
            "tvqa_val.jsonl:1: column 16: key 'a0' stands twice in one object",
        ),
        (LINE.replace('"a1"', '"\\u00610"'), "column 16: key 'a0' stands twice"),
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
    ],
)
def test_bad_jsonl_says_line_and_column(tmp_path: Path, content: str, part: str) -> None:
    put(tmp_path / "tvqa_val.jsonl", content)
    assert part in refusal(read_questions, "tvqa", tmp_path, "val")


def test_bad_json_says_line_and_column(tmp_path: Path) -> None:
    def message(content: str) -> str:
        put(tmp_path / "STAR_val.json", content)
        return refusal(read_questions, "star", tmp_path, "val")

    pretty = json.dumps([star_item()], indent=1)
    assert message(pretty.replace("6.5", "NaN")).startswith(
        "STAR_val.json:6: column 12: NaN is not JSON"
    )
    assert message(pretty.replace('"end"', '"start"')).startswith(
        "STAR_val.json:7: column 3: key 'start' stands twice"
    )
    assert "the text is cut off here" in message(pretty[:-1])
    assert "an object where a JSON list of questions is expected" in message("{}")
    assert "is an empty list" in message("[]")
    assert message("[{}, 3]").startswith("STAR_val.json[1]: a number where an object is expected")
    assert "2 of 2 rows are bad: STAR_val.json[0]: " in message("[{}, {}]")
    put(tmp_path / "STAR_val.json", "\ufeff" + pretty.replace("\n", "\r\n"))
    assert read_questions("star", tmp_path, "val")[0].feature_rows == (6, 19)


# ---- subtitles -------------------------------------------------------------------------------------------------------

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


def read_dialogue(folder: Path, srt: str | bytes, ts: str = "48.62-60.02") -> str:
    put(folder / "tvqa_val.jsonl", [tvqa_row(ts=ts)])
    put(folder / "tvqa_subtitles" / "s01_clip.srt", srt)
    return read_questions("tvqa", folder, "val", subtitles=True)[0].dialogue


def test_subtitles_inside_the_clip_become_the_dialogue(tmp_path: Path) -> None:
    assert read_dialogue(tmp_path, SRT, "49.2-60.02") == " two lines ends in the last second"
    assert (
        read_dialogue(tmp_path, SRT, "48.4-60.02")
        == " into the clip two lines ends in the last second"
    )
    everything = " (Ted:) before into the clip two lines ends in the last second out of the clip"
    assert read_dialogue(tmp_path, SRT, "NaN-NaN") == everything
    assert read_dialogue(tmp_path, SRT, "20-30.1") == ""
    for twin in (
        "\ufeff" + SRT,
        SRT.replace("\n", "\r\n"),
        SRT.replace("\n", "\r"),
        SRT.replace("two\n", "two  \n\n"),
        "\n\n" + SRT,
    ):
        assert read_dialogue(tmp_path, twin, "NaN-NaN") == everything
    assert read_questions("tvqa", tmp_path, "val")[0].dialogue == ""
    for encoding in ("utf-8", "utf-8-sig", "iso-8859-1"):
        assert (
            read_dialogue(
                tmp_path, "01:00:01,5 --> 01:00:02.25\ncafé 42".encode(encoding), "3601-3602"
            )
            == " café 42"
        )
    assert read_dialogue(tmp_path, "01:00:01,5 --> 01:00:02.25\nlate", "0-10") == ""


@RULES
@given(
    start=st.integers(0, 9),
    length=st.integers(0, 9),
    first=st.integers(0, 9),
    duration=st.integers(0, 9),
)
def test_a_line_is_kept_exactly_when_it_ends_in_the_clip(
    start: int, length: int, first: int, duration: int
) -> None:
    """For lines that do not end before they start, the two published conditions come to one."""
    end, last = start + length, first + duration
    published = (start >= first and end <= last) or (
        start <= first and end <= last and first <= end
    )
    assert (
        (tvqa.dialogue([tvqa.Subtitle(start, end, "x")], (first, last)) == " x")
        == published
        == (first <= end <= last)
    )


def test_subtitle_files_without_subtitles(tmp_path: Path) -> None:
    for srt in ("", " \n", "<html>"):
        assert "s01_clip.srt (holds no subtitle)" in refusal(read_dialogue, tmp_path, srt)
    assert "s01_clip.srt:2 (time stamps '00:00:0x --> 00:00:02')" in refusal(
        read_dialogue, tmp_path, "1\n00:00:0x --> 00:00:02\nhm\n"
    )


def test_missing_subtitles_are_counted_and_named(tmp_path: Path) -> None:
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(qid=i, vid_name=f"v{i // 2}") for i in range(12)])
    assert "tvqa_subtitles: no such folder" in refusal(
        read_questions, "tvqa", tmp_path, "val", subtitles=True
    )
    put(tmp_path / "tvqa_subtitles" / "v0.srt", SRT)
    message = refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)
    assert message.startswith("10 of 12 questions (5 videos) have no usable subtitle file, e.g. ")
    assert (
        f"{tmp_path}/tvqa_subtitles/v1.srt (No such file" in message
        and "--sub" in message
        and message.count(".srt") == 3
    )
    assert "--sub: nextqa has no subtitles" in refusal(
        read_questions, "nextqa", tmp_path, "val", subtitles=True
    )


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", "a\0b", "x" * 300, "a\\b"])
def test_ids_are_never_trusted_as_paths(tmp_path: Path, name: str) -> None:
    put(tmp_path / "secret.srt", SRT)
    put(tmp_path / "tvqa_subtitles" / "ok.srt", SRT)
    put(tmp_path / "tvqa_val.jsonl", [tvqa_row(vid_name=name)])
    message = refusal(read_questions, "tvqa", tmp_path, "val", subtitles=True)
    assert any(
        part in message for part in ("is no file name", "File name too long", "holds a NUL")
    ), message


def test_types_fall_into_the_reported_groups() -> None:
    groups = accuracy_groups("nextqa", ["DB", "TN", "CW", "CH", "DO", "??", "CW"])
    assert groups == {"C": ["CH", "CW"], "T": ["TN"], "D": ["DB", "DO"], "(unknown)": ["??"]}
    assert accuracy_groups("intentqa", ["TN", "TP", "CH"]) == {"CH": ["CH"], "TP&TN": ["TN", "TP"]}
    assert accuracy_groups("tvqa", ["House M.D.", "Castle"]) == {
        "Castle": ["Castle"],
        "House M.D.": ["House M.D."],
    }
    assert list(accuracy_groups("star", ["Feasibility", "Interaction", "(unknown)"])) == [
        "Interaction",
        "Feasibility",
        "(unknown)",
    ]
    assert DATASETS["star"].mean_of == ("Interaction", "Sequence", "Prediction", "Feasibility")


@given(
    types=st.lists(st.sampled_from(["CW", "TP", "DB", "Sequence", "(unknown)", "C", ""])),
    dataset=st.sampled_from(sorted(DATASETS)),
)
def test_each_type_is_in_exactly_one_group(types: list[str], dataset: str) -> None:
    assert sorted(
        name for names in accuracy_groups(dataset, types).values() for name in names
    ) == sorted(set(types))
