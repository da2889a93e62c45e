"""The general schema: every form of a table gives the same questions, or one line says why not."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import FILE_PROPERTY, put
from support.errors import refusal
from vico.data.datasets import accuracy_groups, find_dataset, read_questions
from vico.data.readers import schema
from vico.data.readers.answers import _reading
from vico.data.types import Question

ROW: dict[str, Any] = {"video": "007", "question": "why", "options": ["clap", "None"], "answer": 1}
NAMED = {**ROW, "id": "q1", "type": "CW"}
EXPECTED = Question(0, "q1", "007", "CW", "why", ("clap", "None"), 1, dataset="my")
COLUMNS = {"a0": "clap", "a1": "None"}


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def flat(**changes: Any) -> dict[str, Any]:
    row = {name: value for name, value in NAMED.items() if name != "options"}
    return {**row, **COLUMNS, **changes}


def renamed(row: dict[str, Any], **names: str) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in row.items()}


def questions(folder: Path, split: str = "val") -> list[Question]:
    return read_questions("my", folder, split)


@pytest.fixture
def my(tmp_path: Path) -> Path:
    (tmp_path / "my").mkdir()
    return tmp_path / "my"


TWINS: dict[str, tuple[str, Any]] = {
    "JSON lines": ("val.jsonl", [NAMED]),
    "JSON, a list": ("val.json", json.dumps([NAMED])),
    "JSON, by id": ("val.json", json.dumps({"q1": ROW | {"type": "CW"}})),
    "options in columns": ("val.jsonl", [flat()]),
    "options as text": ("val.csv", table([{**NAMED, "options": '["clap", "None"]'}])),
    "options as Python writes them": ("val.csv", table([{**NAMED, "options": "['clap', 'None']"}])),
    "options by letter": ("val.jsonl", [{**NAMED, "options": {"A": "clap", "B": "None"}}]),
    "CSV": ("val.csv", table([flat()])),
    "tabs": ("val.csv", table([flat()], "\t")),
    "tabs, .tsv": ("val.tsv", table([flat()], "\t")),
    "semicolons": ("val.csv", table([flat()], ";")),
    "vertical bars": ("val.csv", table([flat()], "|")),
    "CRLF and a byte order mark": ("val.csv", "\ufeff" + table([flat()]).replace("\n", "\r\n")),
    "capitals": ("val.csv", table([{name.title(): value for name, value in flat().items()}])),
    "option_0": ("val.csv", table([renamed(flat(), a0="option_0", a1="option_1")])),
    "Option 1": ("val.csv", table([renamed(flat(), a0="Option 1", a1="Option 2")])),
    "option_a": ("val.csv", table([renamed(flat(), a0="option_a", a1="option_b")])),
    "A, B": ("val.csv", table([renamed(flat(), a0="A", a1="B")])),
    "a choices list": ("val.jsonl", [renamed(NAMED, options="choices")]),
    "question_id": ("val.csv", table([renamed(flat(), id="question_id", video="video_id")])),
    "an empty further column": ("val.csv", table([flat(a2="", a3="")])),
    "answer 1.0": ("val.csv", table([flat(answer="1.0")])),
    "answer 1.0, a number": ("val.jsonl", [{**NAMED, "answer": 1.0}]),
    "answer B": ("val.csv", table([flat(answer="B")])),
    "answer (b)": ("val.csv", table([flat(answer=" (b) ")])),
    "answer B. None": ("val.csv", table([flat(answer="B. none.")])),
    "answer as text": ("val.csv", table([flat(answer="None")])),
    "answer as text, loosely": ("val.csv", table([flat(answer="none. ")])),
    "no times": ("val.csv", table([flat(start="", end="")])),
    "no dialogue": ("val.csv", table([flat(dialogue="")])),
}


@pytest.mark.parametrize("kind", TWINS)
def test_twins(my: Path, kind: str) -> None:
    name, content = TWINS[kind]
    put(my / name, content)
    (question,) = questions(my)
    assert replace(question, place="") == EXPECTED


def test_json_lines_called_json(my: Path) -> None:
    rows = [NAMED, {**NAMED, "id": "q2", "answer": 0}]
    put(my / "train.jsonl", rows)
    put(my / "val.json", "\n".join(map(json.dumps, rows)))
    one, other = questions(my, "train"), questions(my)
    assert [replace(q, place="") for q in one] == [replace(q, place="") for q in other]
    assert [q.place for q in other] == ["val.json:1", "val.json:2"]


def test_parquet(my: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {name: [value] for name, value in NAMED.items()}
    parquet.write_table(pyarrow.table({**columns, "answer": [1.0]}), my / "val.parquet")
    (question,) = questions(my)
    assert replace(question, place="") == EXPECTED


def test_conversations(my: Path) -> None:
    asked = "<video>\nwhy\nOptions:\nA. clap\nB. None\nAnswer with the option's letter."
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": "B"}]
    llava = {"id": "q1", "video": "007", "type": "CW", "conversations": turns}
    put(my / "val.json", json.dumps([llava]))
    (question,) = read = questions(my)
    assert replace(question, place="") == EXPECTED
    notes = " ".join(getattr(read, "notes", ()))
    assert "1 texts around the options are left out, as \"Answer with the option's" in notes
    images = [{"id": "i", name: "x.jpg", "conversations": turns} for name in ("image", "images")]
    put(my / "val.json", json.dumps([llava, *images]))
    notes = " ".join(getattr(questions(my), "notes", ()))
    assert "warning: 2 of 3 rows are not" in notes and "about an image: 2" in notes
    content = [{"type": "video", "video": "x"}, {"type": "text", "text": "why\n(A) clap\n(B) None"}]
    qwen = [{"role": "user", "content": content}, {"role": "assistant", "content": "(B) None"}]
    put(my / "train.jsonl", [{"id": "q1", "videos": ["007"], "type": "CW", "messages": qwen}])
    (question,) = questions(my, "train")
    assert replace(question, place="") == EXPECTED


def test_several_questions_of_a_conversation(my: Path) -> None:
    """Each is a question, with an id of its own."""
    turns = []
    for name in ("why", "how"):
        turns.append({"from": "human", "value": f"{name}\nA. clap\nB. None"})
        turns.append({"from": "gpt", "value": "A"})
    put(my / "val.json", json.dumps([{"id": 3, "video": "007", "conversations": turns}]))
    assert [(q.qid, q.question) for q in questions(my)] == [("3", "why"), ("3#1", "how")]


def test_video_r1(my: Path) -> None:
    row = {
        "problem_id": "q1",
        "problem": "why",
        "data_type": "video",
        "problem_type": "multiple choice",
        "options": ["A. clap", "B. None"],
        "solution": "<answer>B</answer>",
        "path": "007",
        "data_source": "CW",
    }
    others = [{**row, "data_type": "image"}, {**row, "problem_type": "numerical"}]
    put(my / "val.json", json.dumps([row, *others]))
    (question,) = read = questions(my)
    assert replace(question, place="") == EXPECTED
    notes = " ".join(getattr(read, "notes", ()))
    assert "warning: 2 of 3 rows are not a multiple-choice question about a video" in notes
    assert "data_type 'image': 1, problem_type 'numerical': 1" in notes


def test_column_map(my: Path) -> None:
    row = {
        "clip": "007",
        "ask": "why",
        "x": "clap",
        "y": "None",
        "right": 2,
        "n": "q1",
        "kind": "CW",
    }
    put(my / "pairs.csv", table([row]))
    put(
        my / "dataset.yaml",
        "columns: {video: clip, question: ask, options: [x, y], answer: right, id: n, type: kind}\n"
        "files: {val: pairs.csv}\nanswer_base: 1\ngroups: {causal: [CW]}\n",
    )
    (question,) = questions(my)
    assert replace(question, place="") == EXPECTED
    assert accuracy_groups(find_dataset("my", my), ["CW"]) == {"causal": ["CW"]}


def test_2_to_26_options(my: Path) -> None:
    many = [f"option {i}" for i in range(26)]
    put(my / "val.jsonl", [ROW, {**ROW, "options": many, "answer": "Z"}])
    assert [len(q.options) for q in questions(my)] == [2, 26]
    assert [q.answer for q in questions(my)] == [1, 25]


def test_rows_without_id_are_numbered(my: Path) -> None:
    put(my / "val.jsonl", [ROW, ROW])
    assert [q.qid for q in questions(my)] == ["0", "1"]


CLIPS = [(1.5, 6.099999999999998, 1, (2, 7)), (1.62, 2.02, 3, (6, 9)), (0, 0, 0.5, (0, 1))]


@pytest.mark.parametrize(("start", "end", "rate", "expected"), CLIPS)
def test_clips(my: Path, start: float, end: float, rate: float, expected: tuple[int, int]) -> None:
    """STAR's rule at one frame per second, TVQA's at three."""
    put(my / "val.csv", table([flat(start=start, end=end)]))
    put(my / "dataset.yaml", f"frames_per_second: {rate}\n")
    assert questions(my)[0].feature_rows == expected
    assert (
        schema.feature_rows(
            dict(zip(("start", "end"), schema.clip_seconds(expected, rate), strict=True)),
            {"start": "start", "end": "end"},
            rate,
        )
        == expected
    )


def test_dialogue(my: Path) -> None:
    """The prompts mention it where the first row has one, or dataset.yaml says so."""
    put(my / "val.jsonl", [{**NAMED, "dialogue": "hello"}])
    assert questions(my)[0].dialogue == " hello"
    assert find_dataset("my", my).has_dialogue
    put(my / "train.jsonl", [ROW, {**NAMED, "dialogue": "hello"}])
    assert "train.jsonl:2: has a dialogue" in refusal(read_questions, "my", my, "train")
    put(my / "dataset.yaml", "dialogue: true\n")
    assert [q.dialogue for q in questions(my, "train")] == ["", " hello"]


def test_what_is_counted(my: Path) -> None:
    """Columns that are not read, options that are not offered, the form of the answers."""
    put(
        my / "val.csv",
        table([flat(a2="", note="x"), flat(id="q2", a2="sit", note="x", answer="A")]),
    )
    notes = " ".join(getattr(questions(my), "notes", ()))
    assert "1 columns are not read: 'note'" in notes
    assert "1 of 2 rows leave option columns empty" in notes
    assert "answers: 1 by index, 1 by letter" in notes
    assert "options in 'a0' to 'a2'" in notes


def test_answers_that_count_from_1(my: Path) -> None:
    rows = [{**ROW, "answer": 1} for _ in range(20)]
    put(my / "val.jsonl", rows)
    notes = " ".join(getattr(questions(my), "notes", ()))
    assert "warning: no answer of 20 is 0; if answers count from 1" in notes


BAD: dict[str, tuple[str, Any, str]] = {
    "one option": ("val.jsonl", [{**ROW, "options": ["a"]}], "val.jsonl:1: 1 options, not 2 to 26"),
    "27": ("val.jsonl", [{**ROW, "options": ["a"] * 27}], "27 options, not 2 to 26"),
    "no question": ("val.jsonl", [{"video": "1", "options": ["a", "b"]}], "no 'question' (has: "),
    "no options": ("val.csv", table([{"video": 1, "question": "q"}]), "no 'options' (has: "),
    "answer 2": ("val.jsonl", [{**ROW, "answer": 2}], "put 'answer_base: 1' into dataset.yaml"),
    "answer 0.5": ("val.jsonl", [{**ROW, "answer": 0.5}], "'answer' is 0.5, not one of 0 to 1, A"),
    "answer true": ("val.jsonl", [{**ROW, "answer": True}], "'answer' is True, not one of"),
    "none": ("val.jsonl", [{k: v for k, v in ROW.items() if k != "answer"}], "answer' is miss"),
    "answer of two meanings": (
        "val.csv",
        table([flat(a0="1", a1="0", answer="1")]),
        "'answer' is '1', the index of option 1 and the text of option 0",
    ),
    "empty option in the middle": ("val.csv", table([flat(a0="")]), "'a0' is empty, and a later"),
    "a gap": ("val.csv", table([renamed(flat(), a1="a2")]), "a column is missing between those"),
    "options twice": ("val.jsonl", [{**NAMED, **COLUMNS}], "options could be in 'options' and in"),
    "video twice": ("val.jsonl", [{**renamed(ROW, video="vid"), "video_id": 1}], "video' could"),
    "an option null": ("val.jsonl", [{**ROW, "options": ["a", None]}], "'options[1]' is None"),
    "options no list": ("val.csv", table([{**ROW, "options": "a, b"}]), "'a, b', not a list"),
    "start alone": ("val.jsonl", [{**ROW, "start": 1}], "a start without an end"),
    "backwards": ("val.jsonl", [{**ROW, "start": 2, "end": 1}], "ends at 1.0 s, before it starts"),
    "gzip": ("val.csv", b"\x1f\x8b\x08\x00abc", "is gzip-compressed"),
    "workbook": ("val.csv", b"PK\x03\x04....xl/workbook.xml", "is an Excel workbook"),
    "parquet": ("val.csv", b"PAR1\0\0", "is a parquet file"),
    "HTML": ("val.csv", "<!DOCTYPE html><html>", "is an HTML page"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad(my: Path, kind: str) -> None:
    name, content, part = BAD[kind]
    put(my / name, content)
    assert part in refusal(read_questions, "my", my, "val")


BAD_YAML = {
    "columns: {type: kind}": "columns: type: 'kind' is no column of val.jsonl (has: 'answer', ",
    "columns: {vidio: x}": "columns: 'vidio' is none of video, ",
    "colums: {video: x}": "unknown key 'colums'; did you mean 'columns'?",
    "files: {val: ../x.csv}": "files: '../x.csv' leads out of the data set's folder",
    "frames_per_second: fast": "frames_per_second: 'fast' is no number from 0.001 to 1000",
    "answer_base: 2": "answer_base: 2 is neither 0 nor 1",
    "answer: number": "answer: 'number' is none of index, letter, text",
    "groups: {a: [x], b: [x]}": "groups: type 'x' is in two groups",
    "mean_of: [a]": "mean_of: 'a' is none of the groups",
    "dialogue: 3": "dialogue: 3 is neither true nor false",
    "files: 3": "files: 3 is no list of lines 'SPLIT: FILE'",
    "- video": "must hold lines 'key: value'",
    "answer: index\nanswer: text": "'answer' appears twice",
    "a: [": "not valid YAML",
    "a: &x {b: 1}\nc: {<<: *x}": "holds a merge",
}


@pytest.mark.parametrize("text", BAD_YAML)
def test_bad_yaml(my: Path, text: str) -> None:
    put(my / "val.jsonl", [ROW])
    put(my / "dataset.yaml", text)
    message = refusal(read_questions, "my", my, "val")
    assert "dataset.yaml: " in message and BAD_YAML[text] in message


def test_unknown_dataset(my: Path) -> None:
    put(my / "val.jsonl", [ROW])
    message = refusal(find_dataset, "myy", my.parent / "myy")
    assert "it can be nextqa, star, tvqa, intentqa, my, or a folder" in message
    assert "did you mean 'my'?" in message
    assert "no such data set" in refusal(find_dataset, "../my", my)


def test_two_tables_of_a_split(my: Path) -> None:
    put(my / "val.jsonl", [ROW])
    put(my / "val.csv", table([flat()]))
    assert "holds val.jsonl and val.csv; keep one" in refusal(read_questions, "my", my, "val")


OPTION_TEXTS = st.lists(st.text("abcx 12.,;'", min_size=1, max_size=8), min_size=2, max_size=26)


@FILE_PROPERTY
@given(
    OPTION_TEXTS.filter(lambda texts: all(text.strip() for text in texts)),
    st.sampled_from(["index", "letter", "text"]),
    st.sampled_from(",\t;"),
    st.data(),
)
def test_forms_of_answers(
    tmp_path: Path, options: list[str], form: str, delimiter: str, data: st.DataObject
) -> None:
    """With the form stated, any file gives the option that it names, whatever separates fields."""
    place = data.draw(st.integers(0, len(options) - 1))
    answer = {"index": str(place), "letter": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[place]}
    row = {"video": "v", "question": "q", "answer": answer.get(form, options[place])}
    row |= {f"a{i}": text for i, text in enumerate(options)}
    put(tmp_path / "my" / "val.csv", table([row], delimiter))
    put(tmp_path / "my" / "dataset.yaml", f"answer: {form}\n")
    (question,) = questions(tmp_path / "my")
    assert question.options == tuple(options)
    assert question.answer is not None and options[question.answer] == options[place]


def test_nextqa_as_json_and_parquet(tmp_path: Path) -> None:
    """With the answers as text too; a sixth option is refused."""
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    options = {f"a{i}": text for i, text in enumerate(["clap", "None", "nan", "NA ", "007"])}
    row = {"video": 4010, "question": "why", "qid": 1, "type": "CW", "answer": 1, **options}
    put(tmp_path / "val.json", json.dumps([row]))
    parquet.write_table(
        pyarrow.Table.from_pylist([{**row, "answer": "None"}]), tmp_path / "train.parquet"
    )
    asked = [read_questions("nextqa", tmp_path, split)[0] for split in ("val", "train")]
    assert [(q.video, q.qid, q.answer, q.options[1]) for q in asked] == [
        ("4010", "1", 1, "None")
    ] * 2
    put(tmp_path / "val.json", json.dumps([{**row, "a5": "more"}]))
    assert "val.json[0]: column 'a5'" in refusal(read_questions, "nextqa", tmp_path, "val")


@pytest.mark.parametrize(
    ("value", "forms"),
    [
        ("B", {"letter": 1}),
        ("(b)", {"letter": 1}),
        ("B. clap", {"letter": 1}),
        ("B. dog", {}),  # not what B is
        ("D", {}),
        ("2", {"index": 1}),
        (3, {"index": 2}),
        (3.0, {"index": 2}),
        (2.5, {}),
        (0, {}),
        (4, {}),
        ("4", {}),
        (True, {}),
        ("clap", {"text": 1}),
        (" Clap. ", {"text": 1}),
    ],
)
def test_what_an_answer_may_mean(value: object, forms: dict[str, int]) -> None:
    """Of three options, with answers that count from 1."""
    reading = _reading(value, ["sit", "clap", "run"], 1)
    assert reading.by_form == forms and reading.is_loose == (value == " Clap. ")
