"""The edges of what readers take: how many, which of two files, and the last of several cases."""

from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import OPTIONS, put, star_item, tvqa_row
from support.errors import outcome, refusal
from vico.data.readers import (
    captions,
    columns,
    nextqa,
    rows,
    schema,
    spec,
    star,
    subtitles,
    table_files,
    tvqa,
)
from vico.data.readers.conversations import _answer
from vico.data.readers.spec import Spec
from vico.data.types import Question

# ---- tables


def test_a_table_without_a_last_newline(tmp_path: Path) -> None:
    """It is whole where its last required field is there; the last of others may be empty."""
    for header, last, is_whole in (
        ("a,b", "1,2", True),
        ("a,b", "1,", False),
        ("a,b", "1", False),
        ("a,b,c", "1,2,", True),
        ("a,b,c", "1,2,3", True),
    ):
        path = put(tmp_path / "val.csv", f"{header}\n{last}")
        if is_whole:
            (row,) = rows.read_csv(path, "it", ["a", "b"], {})
            assert row == ("val.csv:2", dict(zip(header.split(","), last.split(","), strict=True)))
        else:
            count = f"{len(last.split(','))} fields, header has 2"
            assert refusal(rows.read_csv, path, "it", ["a", "b"], {}) == (
                f"val.csv:2: the last line is cut off ({count}); correct {path} or fetch it again"
            )


def test_what_separates_columns() -> None:
    """What makes the most names; of equally many, the comma before the tab."""
    marks = {"a,b": ",", "a\tb": "\t", "a;b,c;d": ";", "a|b|c,d": "|", "a": ",", "": ","}
    marks |= {"a;": ";", "a\tb,c": ",", '"a;b;c",d': ",", "a;;;b,c,d": ","}
    assert {header: rows.delimiter_of(header) for header in marks} == marks


def test_which_lists_of_an_object_are_rows(tmp_path: Path) -> None:
    """None where an entry is an object, or there is no list."""
    path = tmp_path / "val.json"
    for content in ({"a": 1}, {"a": []}, {"a": [{}], "b": {"c": 1}}):
        assert table_files._in_lists(path, content) is None
    found = table_files._in_lists(path, {"v": 1, "d": [{"q": 1}, {"q": 2}], "w": "x"})
    assert found == [("val.json['d'][0]", {"q": 1}), ("val.json['d'][1]", {"q": 2})]
    assert found.notes == (
        "val.json: the rows are those of the list 'd'",
        "val.json: 2 entries are not read: 'v', 'w'",
    )
    each = table_files._in_lists(path, {"v": [{"q": 1}], "w": [{"q": 2}]})
    assert each == [
        ("val.json['v'][0]", {"video": "v", "q": 1}),
        ("val.json['w'][0]", {"video": "w", "q": 2}),
    ]
    assert each.notes == ("val.json: the rows are those of a list for each video 'v', 'w'",)
    named = {"a": [{"q": 1}], "b": [{" Vid ": "v"}]}
    assert refusal(table_files._in_lists, path, named) == (
        f"{path}: holds 2 lists of rows that name their video, 'a', 'b'; write the one that is "
        "meant into a file of its own"
    )


def test_columns_of_options_that_are_named() -> None:
    described = Spec(Path("dataset.yaml"), columns={"options": ("x", "y")})
    found = columns.find(["video", "question", "y", "x"], described)
    assert (found.options, found.unread) == (("x", "y"), ())
    missing = "column 'y' of the options is missing"
    assert outcome(columns.find, ["video", "question", "x"], described) == missing
    names = [str(i) for i in range(21)]
    shown = ", ".join(f"'{i}'" for i in range(20))
    said = f"no 'video' (has: {shown}); name the column in dataset.yaml (columns: video: ...)"
    assert outcome(columns.find, names, Spec(Path("dataset.yaml"))) == said


@pytest.mark.parametrize("split", ["val", "test"])
def test_columns_that_no_row_has(split: str) -> None:
    """Only the answer may be lacking, and only in a test split."""
    for field in ("answer", "video"):
        described = Spec(Path("d.yaml"), columns={field: "x"})
        table = schema._Table(described, split, rows.Rows())
        table.refuse_absent_columns(Path("v.csv"))
        table._columns[("b", "a")] = columns.Columns({}, (), ())
        if field == "answer" and split == "test":
            table.refuse_absent_columns(Path("v.csv"))
            continue
        said = f"d.yaml: columns: {field}: 'x' is no column of v.csv (has: 'a', 'b')"
        assert refusal(table.refuse_absent_columns, Path("v.csv")) == said


def test_dataset_yaml_is_taken_as_it_is(tmp_path: Path) -> None:
    """And a folder without one counts from 0, at one frame a second."""
    path = tmp_path / "dataset.yaml"
    silent = spec.read(tmp_path)
    assert silent == Spec(path, {}, {}, 1.0, None, 0, None, (), None)
    put(
        path,
        "answer: letter\nanswer_base: 0\nframes_per_second: 2\ndialogue: false\n"
        "groups: {C: [CW, CH]}\nmean_of: [C]\nfiles: {val: x.csv}\ncolumns: {video: v}\n",
    )
    groups = {"CW": "C", "CH": "C"}
    expected = Spec(path, {"video": "v"}, {"val": "x.csv"}, 2.0, "letter", 0, groups, ("C",), False)
    assert spec.read(tmp_path) == expected
    for line, said in (
        ("answer: number", "answer: 'number' is none of index, letter, text"),
        ("answer_base: 2", "answer_base: 2 is neither 0 nor 1"),
        ("answer_base: false", "answer_base: False is neither 0 nor 1"),
        ("mean_of: [C]", "mean_of: 'C' is none of the groups"),
        ("groups: {A: [x], B: [x]}", "groups: type 'x' is in two groups"),
        ("dialogue: 0", "dialogue: 0 is neither true nor false"),
        ("files: {val: ../x.csv}", "files: '../x.csv' leads out of the data set's folder"),
    ):
        put(path, line + "\n")
        assert refusal(spec.read, tmp_path) == f"{path}: {said}"


def test_words_around_an_answer_once() -> None:
    assert _answer("The answer is A, or the answer is B") == "A, or the answer is B"


def test_texts_of_nextqa_as_answers(tmp_path: Path) -> None:
    """By text where every answer is an option's and not all are an index; not in CSV."""
    row = {"video": "v", "question": "q", "type": "CW"}
    row |= dict(zip(("a0", "a1", "a2", "a3", "a4"), OPTIONS, strict=True))
    answered = [{**row, "qid": str(i), "answer": text} for i, text in enumerate(OPTIONS[::-1])]
    put(tmp_path / "val.jsonl", answered)
    assert [q.answer for q in nextqa.read(tmp_path, "val")] == [4, 3, 2, 1, 0]
    put(tmp_path / "val.jsonl", [*answered, {**row, "qid": "x", "answer": "1"}])
    said = "'answer' is '007', not one of 0, 1, 2, 3, 4"
    assert f"val.jsonl:1: {said}; " in refusal(nextqa.read, tmp_path, "val")


# ---- STAR


def test_names_of_choices() -> None:
    names: dict[Any, str] = {"a": "A", " B ": "B", 7: "7", "-3": "-3", "007": "7", "9" * 9: "9" * 9}
    assert {key: star._name(key) for key in names} == names
    for key in ("", "AB", "-", "1.0", "9" * 10, True, None, 1.5, "é"):
        assert outcome(star._name, key) == f"choice_id {key!r} is no integer and no letter"


def test_how_many_choices() -> None:
    """From two to one for each letter."""
    texts = [f"of {i}" for i in range(27)]
    for number in (2, 26):
        assert list(star._choices(texts[:number]).values()) == texts[:number]
    for number in (0, 1, 27):
        message = outcome(star._choices, texts[:number])
        assert message.endswith(", not a list or an object of 2 to 26 choices")
    mixed = "the choices are called ['0', 'A'], by numbers and by letters"
    assert outcome(star._choices, {"0": "x", "a": "y"}) == mixed
    assert outcome(star._choices, {"1": "x", "01": "y"}) == "choice_id '01' appears twice"
    assert list(star._choices({"10": "c", "2": "b", "-1": "a"}).items()) == [
        ("-1", "a"),
        ("2", "b"),
        ("10", "c"),
    ]


def test_clips_of_star() -> None:
    """Both ends included, halves to even; a clip may last no time."""
    for start, end, expected in ((6.5, 18.1, (6, 19)), (2, 2, (2, 3)), (0.5, 1.5, (0, 3))):
        assert star._feature_rows(star_item(start=start, end=end)) == expected
    said = "the clip ends at 1.0 s, before it starts at 2.0 s"
    assert outcome(star._feature_rows, star_item(start=2, end=1)) == said


# ---- captions and subtitles


def test_which_caption_file_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the current folder before that of the data set's; without either, the former."""
    folder, name = tmp_path / "my", Path("c.json")
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    here, there = tmp_path / name, folder / name
    for files, expected in (([], here), ([there], there), ([here, there], here), ([here], here)):
        for path in (here, there):
            path.unlink(missing_ok=True)
        for path in files:
            path.write_text("{}")
        assert captions.locate(folder, name) == expected
    here.unlink()
    said = f"no such file, and {folder} holds no c.json; correct the path, or train with --cap 0"
    assert refusal(captions.find, folder, name) == f"--captions {here}: {said}"


def test_three_examples_of_missing_subtitles() -> None:
    def asked(number: int) -> list[Question]:
        return [Question(i, "q", f"v{i}", "X", "q", ("a", "b"), 0) for i in range(number)]

    for number, more in ((3, ""), (4, "; ...")):
        bad = {f"v{i}": f"file {i}" for i in range(number)}
        clips = subtitles.Clips("S", {"v9": []}, {}, bad)
        assert refusal(tvqa._refuse_subtitles, asked(number + 1), clips, "error") == (
            f"{number} of {number + 1} questions ({number} videos) have no usable subtitle file, "
            f"e.g. file 0; file 1; file 2{more}; they are read from S: fetch what is missing, or "
            "run without --sub"
        )
    clips = subtitles.Clips("S", {}, {"v0": "file 0"})
    tvqa._refuse_subtitles(asked(2), clips, "empty")
    for number, leave, remedy in (
        (2, "error", "or go without them by --missing_subtitles empty, or run without --sub"),
        (1, "empty", "or run without --sub"),
    ):
        message = refusal(tvqa._refuse_subtitles, asked(number), clips, leave)
        assert message.startswith(f"1 of {number} questions (1 videos) have no usable")
        assert message.endswith(f"read from S: fetch what is missing, {remedy}")


def test_encodings_of_subtitles(tmp_path: Path) -> None:
    """UTF-8, UTF-16 by its mark, and else ISO-8859-1, which is counted."""
    path = tmp_path / "v.srt"
    files = subtitles._Files(tmp_path)
    for data, text in (
        ("é".encode("utf-8-sig"), "é"),
        ("é".encode("utf-16"), "é"),
        (b"\xfe\xff\0\xe9", "é"),
        (b"\xe9", "é"),
        (b"\xef\xbb\xbf\xe9", "é"),
    ):
        assert files._decode(data, path) == text
    assert files.num_not_utf8 == 2
    reason = "begins as UTF-16 and is not (truncated data)"
    assert outcome(files._decode, b"\xff\xfea", path) == f"{path} ({reason})"
    no_text = "holds NUL: UTF-16 without its mark, UTF-32, or no text"
    assert outcome(files._decode, b"a\0", path) == f"{path} ({no_text})"
    for video in ("../v", "a\\b", "a..b", "a\0"):
        assert outcome(files.read, video) == f"vid_name {video!r} is no file name"


def test_items_of_subtitles_are_objects() -> None:
    item = {"text": "a", "start": 0, "end": 1}
    for items in ([item, "x"], ["x", item], {"a": item}):
        message = outcome(subtitles._subtitles_of, {"sub": items})
        assert message.startswith("'sub' is ") and message.endswith(", not a list of objects")


@pytest.mark.parametrize(
    ("ts", "expected"),
    [
        ("48.62-60.02", (49, 60)),
        ([0.5, 1.5], (0, 2)),
        ("3-3", (3, 3)),
        ("NaN-NaN", None),
        ([None, 3], None),
        ("4-3", "'ts' is '4-3': the clip ends before it starts, or never"),
        ("0-inf", "'ts' is '0-inf': the clip ends before it starts, or never"),
        ([-1, 3], "'ts' is [-1, 3]: the clip ends before it starts, or never"),
        ([True, 3], "'ts' is [True, 3], not 'START-END' or [START, END] in seconds, or 'NaN-NaN'"),
        ("1-2-3", "'ts' is '1-2-3', not 'START-END' or [START, END] in seconds, or 'NaN-NaN'"),
        ("soon", "'ts' is 'soon', not 'START-END' or [START, END] in seconds, or 'NaN-NaN'"),
    ],
)
def test_clips_of_tvqa(ts: Any, expected: Any) -> None:
    """Three features a second, of both ends."""
    clip = outcome(tvqa._clip, tvqa_row(ts=ts))
    assert clip == expected
    assert tvqa._feature_rows((2, 4)) == (6, 15) and tvqa._feature_rows(None) is None


def test_which_subtitles_belong_to_a_clip() -> None:
    """Those inside, and those across its start; all where there is no clip."""
    spoken = [subtitles.Subtitle(i, i + 2, str(i)) for i in range(7)]
    assert tvqa.dialogue(spoken, (2, 5)) == " 0 1 2 3"
    assert tvqa.dialogue(spoken, (3, 5)) == " 1 2 3"
    assert tvqa.dialogue(spoken, None) == " 0 1 2 3 4 5 6"
