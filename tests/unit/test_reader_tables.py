"""What the fields of a row become, and what is said of a row that is wrong: tables of both."""

from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.errors import outcome, refusal
from vico.data.readers import answers, captions, columns, rows, schema, spec
from vico.data.readers.spec import Spec
from vico.data.readers.subtitles import Subtitle, _subtitles_of, parse_srt
from vico.data.types import Question

NAN = float("nan")
WRONG = object()  # in place of a value: the row is refused


def named(value: Any) -> str:
    """In a test's id, which must be the same in each process that shares the tests."""
    return "wrong" if value is WRONG else str(getattr(value, "__name__", value))


# ---- fields of the general schema

FIELDS: list[tuple[Any, list[tuple[Any, Any]]]] = [
    (
        schema._type,
        [
            (" CW ", "CW"),
            ("", "(unknown)"),
            (None, "(unknown)"),
            (NAN, "(unknown)"),
            (3, "3"),
            (3.0, "3"),
            (True, "'x' is True, not a text"),
        ],
    ),
    (
        schema._of_list,
        [
            (["a", 2], ("a", "2")),
            ('["a", "b"]', ("a", "b")),
            ("('a', 'b')", "'x' is \"('a', 'b')\", not a list of texts"),
            (" ['a', 'b'] ", ("a", "b")),
            ({"A": "x", "b ": "y"}, ("x", "y")),
            ({"0": "x", "1": "y"}, ("x", "y")),
            ({1: "x", 2: "y"}, ("x", "y")),
            ({"2": "x", "3": "y"}, "'x' has the keys ['2', '3'], not A, B, ... in order"),
            ({"B": "x", "A": "y"}, "'x' has the keys ['B', 'A'], not A, B, ... in order"),
            (["a", True], "'x[1]' is True, not a text"),
            (["a", None], "'x[1]' is None, not a text"),
            (7, "'x' is 7, not a list of texts"),
        ],
    ),
    (
        schema._seconds,
        [
            (None, None),
            ("  ", None),
            (NAN, None),
            (0, 0.0),
            ("1.5", 1.5),
            (2, 2.0),
            (-0.5, "'x' is -0.5, not a time in seconds"),
            (True, "'x' is True, not a time in seconds"),
            ("inf", "'x' is 'inf', not a time in seconds"),
            ("soon", "'x' is 'soon', not a time in seconds"),
            ([1], "'x' is [1], not a time in seconds"),
        ],
    ),
    (
        rows.id_field,
        [
            ("007", "007"),
            (" 7 ", "7"),
            (7, "7"),
            (4010.0, "4010"),
            (float(2**53 - 1), str(2**53 - 1)),
            (float(2**53), "'x' is 9007199254740992.0, not a text"),
            (-3.0, "-3"),
            (1.5, "'x' is 1.5, not a text"),
            (True, "'x' is True, not a text"),
            (" ", "'x' is empty"),
            ("a\0", "'x' holds a NUL or half a character: 'a\\x00'"),
        ],
    ),
    (
        rows.question_field,
        [(" why ", " why "), (" \n", "'x' is empty"), (3, "'x' is 3, not a text")],
    ),
    (rows.type_field, [("CW", "CW"), ("  ", "(unknown)"), (None, "(unknown)")]),
]
CASES = [(function, value, expected) for function, cases in FIELDS for value, expected in cases]


@pytest.mark.parametrize(("function", "value", "expected"), CASES, ids=named)
def test_fields(function: Any, value: Any, expected: Any) -> None:
    assert outcome(function, {"x": value}, "x") == expected


def test_dialogues() -> None:
    """With one blank before them; none where the row has none."""
    for value, expected in ((None, ""), ("", ""), ("hi", " hi"), ("  hi", "  hi")):
        assert schema._dialogue({"d": value}, {"dialogue": "d"}) == expected
    assert schema._dialogue({"dialogue": "hi"}, {}) == ""


def test_clips_of_whole_seconds() -> None:
    """Both ends included, at least one row, halves to even."""
    both = {"start": "s", "end": "e"}
    clips = [
        (0, 0, 1.0, (0, 1)),
        (0.5, 1.5, 1.0, (0, 3)),
        (2, 2, 0.1, (0, 1)),
        (4, 9, 3.0, (12, 30)),
    ]
    clips += [(7, 7, 0.5, (4, 5)), (10, 10, 0.25, (2, 3))]
    for start, end, rate, expected in clips:
        assert schema.feature_rows({"s": start, "e": end}, both, rate) == expected
    assert schema.feature_rows({"s": None, "e": NAN}, both, 1.0) is None
    assert schema.feature_rows({}, {}, 1.0) is None
    alone = "a start without an end, or an end without a start"
    assert outcome(schema.feature_rows, {"s": 1, "e": ""}, both, 1.0) == alone
    assert outcome(schema.feature_rows, {"e": 0}, {"end": "e"}, 1.0) == alone
    assert outcome(schema.feature_rows, {"s": 3, "e": 2.5}, both, 1.0) == (
        "the clip ends at 2.5 s, before it starts at 3.0 s"
    )
    assert schema.clip_seconds((12, 30), 3.0) == (4, 9) and schema.clip_seconds((0, 1), 1) == (0, 0)


def test_answers_of_test_questions() -> None:
    """A right option's index; a question of the test split may lack it, and no other."""
    for split in ("train", "val", "test"):
        assert [rows.answer_field({"a": value}, "a", 3, split) for value in (0, "2", " 1 ")] == [
            0,
            2,
            1,
        ]
        for value in (3, -2, "x", 1.5, True):
            words = f"'a' is {value!r}, not one of 0, 1, 2"
            assert outcome(rows.answer_field, {"a": value}, "a", 3, split) == words
    for value in (None, "", -1, "-1"):
        assert rows.answer_field({"a": value}, "a", 3, "test") is None
        words = f"'a' is {value!r}, not one of 0, 1, 2"
        assert outcome(rows.answer_field, {"a": value}, "a", 3, "val") == words
    assert rows.answer_field({}, "a", 2, "test") is None
    assert outcome(rows.answer_field, {}, "a", 2, "val") == "'a' is missing, not one of 0, 1"


def test_names_of_columns() -> None:
    """In capitals or by another name; what is there under its own name is not replaced."""
    aliases = {"vid": "video", "q": "question"}
    names = rows.canonical_names([" Vid ", "Q", "Other", "type"], ("video", "question"), aliases)
    assert names == ["video", "question", "Other", "type"]
    kept = rows.canonical_names(["vid", "video", "Video"], ("video",), aliases)
    assert kept == ["vid", "video", "Video"]


def test_columns_that_appear_twice(tmp_path: Path) -> None:
    path = put(tmp_path / "val.csv", "z,a,z,a\n1,2,3,4\n")
    message = refusal(rows.read_csv, path, "it", (), {})
    assert message.startswith("val.csv:1: column 'a' appears twice (has: 'z', 'a', 'z', 'a'); ")


def test_options_that_are_null(tmp_path: Path) -> None:
    """In columns of one option each, as in a CSV; and what dataset.yaml says of dialogues."""
    row = {"video": "v", "question": "q", "a0": "x", "a1": "y", "a2": None, "answer": 0}
    put(tmp_path / "val.jsonl", [row])
    assert schema.read(tmp_path, "val")[0].options == ("x", "y")
    assert schema.has_dialogue(tmp_path) is False
    put(tmp_path / "dataset.yaml", "dialogue: true\n")
    assert schema.has_dialogue(tmp_path) is True


def test_ids_with_blanks(tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert rows.strip_ids({" a ": 1, "b": 2}, path) == {"a": 1, "b": 2}
    message = refusal(rows.strip_ids, {"a": 1, " a": 2, "z": 3, "b": 4}, path)
    assert message == f"{path}: two entries are called 'a' but for blanks around it; keep one"


def test_few_examples_of_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    rows.refuse(path, [], 9)
    remedy = f"correct {path} or fetch it again"
    assert refusal(rows.refuse, path, ["r1"], 9) == f"r1; {remedy}"
    assert refusal(rows.refuse, path, ["r1", "r2", "r3"], 9) == (
        f"val.csv: 3 of 9 rows are bad: r1; r2; r3; {remedy}"
    )
    assert refusal(rows.refuse, path, ["r1", "r2", "r3", "r4"], 9) == (
        f"val.csv: 4 of 9 rows are bad: r1; r2; r3; ...; {remedy}"
    )
    assert rows.shown([str(i) for i in range(21)]).endswith("'18', '19'")


# ---- columns, answers, dataset.yaml

SPEC = Spec(Path("dataset.yaml"))


def test_columns_in_any_order() -> None:
    """Options go by number or letter; other names of fields and unread columns are said."""
    found = columns.find(["a2", "vid", "a0", "a1", "q", "x"], SPEC)
    assert found.options == ("a0", "a1", "a2") and found.unread == ("x",)
    assert found.of == {"video": "vid", "question": "q"}
    assert found.describe() == "video in 'vid', question in 'q', options in 'a0' to 'a2'"
    for names in (["choice_2", "Choice 1"], ["c", "b", "a"], ["option-1", "option-0"]):
        assert columns.find(["video", "question", *names], SPEC).options == tuple(reversed(names))
    alone = columns.find(["video", "question", "options", "b"], SPEC)
    assert (alone.options, alone.unread) == ((), ("b",)), "a letter alone is no option"
    assert alone.describe() == "video in 'video', question in 'question', options in 'options'"


BAD_COLUMNS = {
    "video q a0 a2": "a column is missing between those of the options: 'a0', 'a2'",
    "video q a2 a3": "a column is missing between those of the options: 'a2', 'a3'",
    "video q a0 a1 opt_0 opt_1": "options could be in 'a0', 'a1' and in 'opt_0', 'opt_1'; ",
    "video q a_1 a1 a2": "columns 'a_1' and 'a1' are one",
    "video q choices a0 a1": "options could be in 'choices' and in 'a0', 'a1'; ",
    "vid vid_name q a0 a1": "'video' could be 'vid' or 'vid_name'; name one in dataset.yaml",
    "video options": "no 'question' (has: 'video', 'options'); name the column in dataset.yaml",
    "q options": "no 'video' (has: 'q', 'options'); name the column in dataset.yaml",
    "video q": "no 'options' (has: 'video', 'q'); name the column in dataset.yaml",
}


@pytest.mark.parametrize("names", BAD_COLUMNS)
def test_columns_that_could_be_two(names: str) -> None:
    assert outcome(columns.find, names.split(), SPEC).startswith(BAD_COLUMNS[names])


def test_doubts_about_answers() -> None:
    """Told from 20 rows on, where none is 0 and all are numbers."""
    numbers = [answers.Reading({"index": 1})] * 20
    warning = (
        "warning: no answer of 20 is 0; if answers count from 1, put 'answer_base: 1' into "
        "dataset.yaml"
    )
    assert answers.base_notes([1] * 20, numbers, 0) == [warning]
    assert answers.base_notes([1] * 19, numbers[:19], 0) == []
    assert answers.base_notes([1] * 19 + [0], numbers, 0) == []
    assert answers.base_notes([1] * 20, numbers, 1) == []
    assert answers.base_notes([1] * 20, [*numbers[1:], answers.Reading({"letter": 1})], 0) == []


YAML: list[tuple[Any, Any, Any]] = [
    (spec._frames_per_second, 0.001, 0.001),
    (spec._frames_per_second, 1000, 1000.0),
    (spec._frames_per_second, 0.0009, WRONG),
    (spec._frames_per_second, 1000.1, WRONG),
    (spec._frames_per_second, True, WRONG),
    (spec._text, " x ", "x"),
    (spec._text, 7, "7"),
    (spec._text, " ", WRONG),
    (spec._text, True, WRONG),
    (spec._text, 1.5, WRONG),
    (spec._texts, ["a", 1], ("a", "1")),
    (spec._texts, [], WRONG),
    (spec._texts, "a", WRONG),
    (spec._answer_base, 1, 1),
    (spec._answer_base, True, WRONG),
    (spec._columns, {"options": ["a", "b"]}, {"options": ("a", "b")}),
    (spec._columns, {"options": "all", "video": 3}, {"options": "all", "video": "3"}),
    (spec._columns, {"video": ["a", "b"]}, WRONG),
    (spec._files, {"val": "x.csv"}, {"val": "x.csv"}),
    (spec._files, {"val": "/x.csv"}, WRONG),
    (spec._files, {"value": "x.csv"}, WRONG),
    (spec._groups, {"C": ["CW", "CH"], "T": ["TN"]}, {"CW": "C", "CH": "C", "TN": "T"}),
    (spec._groups, {}, WRONG),
]


@pytest.mark.parametrize(("check", "value", "expected"), YAML, ids=named)
def test_values_of_dataset_yaml(check: Any, value: Any, expected: Any) -> None:
    if expected is WRONG:
        with pytest.raises(ValueError, match=r"[a-z]"):
            check(value)
    else:
        assert check(value) == expected


# ---- captions and subtitles


def ask(video: str, caption: str = "", place: str = "p") -> Question:
    return Question(0, video, video, "X", "q", ("a", "b"), 0, caption=caption, place=place)


def test_captions_of_videos(tmp_path: Path) -> None:
    """What a caption may be, which are empty or unused, and which are lacking."""
    texts = {"a text": "a text", None: "", " b ": " b "}
    assert {value: captions.text_of("v", value) for value in texts} == texts
    assert captions.text_of("v", ["A. ", "", " B."]) == "A. B."
    assert captions.text_of("v", {"caption": "c"}) == "c"
    bad = outcome(captions.text_of, "v", ["a", 3])
    assert bad == "caption of video 'v' is 3, not a text"
    known = captions.Captions({"v": "a", "w": " ", "u": ""}, tmp_path / "c.json")
    assert (list(known), len(known), known.empty) == (["v"], 1, frozenset({"w", "u"}))
    captions.check(known, [ask("v")])
    assert captions.notes("train", known, [ask("v")]) == [
        "train: 2 captions are empty, and training does not use them"
    ]
    asked = [ask(video) for video in ("v", "w", "w", "x")]
    assert captions.notes("train", known, asked) == [
        "train: 3 of 4 questions (2 videos) have no caption, and no captioning loss "
        "(--missing_captions drop)",
        "train: 1 captions are empty, and training does not use them",
    ]
    message = refusal(captions.check, known, asked)
    assert "c.json: 3 of 4 questions (2 videos) have no caption, e.g. 'w' (it is empty), 'x';" in (
        message
    )


def test_a_record_of_a_caption() -> None:
    assert captions._record({"v": "text"}) == {"video": "v", "caption": "text"}
    for row in ({"video": "v"}, {"caption": "c"}, {"v": "a", "w": "b"}):
        assert captions._record(row) == row
    assert captions._video_of({"video_id": 7, "caption": "c"}) == "7"
    twice = outcome(captions._video_of, {"video": "v", "video_id": "v"})
    assert twice == "has both video and video_id; keep the one that questions name"
    assert outcome(captions._video_of, {"x": 1}) == "'video' is missing (has: 'x')"


SRT = """1
00:00:01,500 --> 00:01:02,900
Hi.

 there
2
01:00:00.1-->01:00:00

3
0:0:5 --> 0:0:4
7"""


def test_subtitles_in_whole_seconds() -> None:
    """Numbers before the next time stamps are no text; one at the end is."""
    assert parse_srt(SRT, Path("c.srt")) == [
        Subtitle(1, 62, "Hi.  there"),
        Subtitle(3600, 3600, ""),
        Subtitle(5, 4, "7"),
    ]
    assert parse_srt(" \n", Path("c.srt")) == []
    assert outcome(parse_srt, "hello", Path("c.srt")) == "c.srt (holds no subtitle)"
    words = outcome(parse_srt, "1\nx --> 00:00:01", Path("c.srt"))
    assert words == "c.srt:2 (time stamps 'x --> 00:00:01')"
    row = {"sub": [{"text": "Hi. \n\nthere", "start": 1.9, "end": "62.5"}]}
    assert _subtitles_of(row) == [Subtitle(1, 62, "Hi. there")]
    for wrong in ("x", ["x"], None):
        words = outcome(_subtitles_of, {"sub": wrong})
        assert words == f"'sub' is {wrong!r}, not a list of objects"
