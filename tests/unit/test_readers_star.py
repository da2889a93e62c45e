"""STAR's JSON list: answers are texts, choices come in any order, clips are in seconds."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import put, star_item
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.readers import star
from vico.data.readers.rows import RowError, plain
from vico.data.types import Question
from vico.train.config import RunConfig


def test_star_items(tmp_path: Path) -> None:
    """Answers are found by text; clips round half to even."""
    odd = star_item(question_id="Odd", start="7.5", end="7.5", answer="d")
    put(tmp_path / "STAR_val.json", [star_item(), odd])
    first, second = read_questions("star", tmp_path, "val")
    assert first == Question(
        index=0,
        qid="Interaction_T1_13",
        video="V1",
        type="Interaction",
        question="Which?",
        options=("a", "b", "b", "d"),
        answer=1,
        feature_rows=(6, 19),
        dialogue="",
        place="STAR_val.json[0]",
        dataset="star",
    )
    assert (second.type, second.feature_rows, second.answer) == ("(unknown)", (8, 9), 3)


def test_star_without_answers(tmp_path: Path) -> None:
    unanswered = star_item()
    del unanswered["answer"]
    put(tmp_path / "STAR_test.json", [unanswered])
    assert read_questions("star", tmp_path, "test")[0].answer is None
    put(tmp_path / "STAR_val.json", [unanswered])
    assert refusal(read_questions, "star", tmp_path, "val").startswith(
        "STAR_val.json[0]: 'answer' is missing (has: 'question_id'"
    )


BAD_STAR: dict[str, tuple[dict[str, Any], str]] = {
    "answer": ({"answer": "E"}, "'answer' is 'E', not one of the choices ['a', 'b', 'b', 'd']"),
    "number": ({"answer": 4}, "'answer' is 4, not one of the choices"),
    "truth value": ({"answer": True}, "'answer' is True, not a text"),
    "empty answer": ({"answer": " . "}, "'answer' is ' . ', not one of the choices"),
    "two that fit": (
        {"answer": "the cat", "choices": ["The cat.", "The cat", "A dog."]},
        "'answer' is 'the cat', fits more than one of the choices ['The cat.', 'The cat', ",
    ),
    "text or letter": (
        {"answer": "B", "choices": {"A": "b.", "B": "c"}},
        "'answer' is 'B', fits more than one of the choices ['b.', 'c']",
    ),
    "choices": ({"choices": "ab"}, "'choices' is 'ab', not a list or an object of 2 to 26"),
    "one choice": ({"choices": ["b"]}, "'choices' is ['b'], not a list or an object of 2 to 26"),
    "choice of a list": ({"choices": ["b", 3]}, "'choice' is 3, not a text"),
    "names of choices": (
        {"choices": {"0": "a", "B": "b"}},
        "the choices are called ['0', 'B'], by numbers and by letters",
    ),
    "name of a choice": (
        {"choices": {"first": "a", "second": "b"}},
        "choice_id 'first' is no integer and no letter",
    ),
    "one number twice": ({"choices": {"1": "a", "01": "b"}}, "choice_id '01' appears twice"),
    "same choice_id": (
        {"choices": [{"choice_id": 1, "choice": "b"}] * 2},
        "choice_id 1 appears twice",
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


PRETTY = json.dumps([star_item()], indent=1)
BAD_JSON = {
    "NaN": (PRETTY.replace("6.5", "NaN"), "STAR_val.json:6: column 12: NaN is not JSON"),
    "key twice": (
        PRETTY.replace('"end"', '"start"'),
        "STAR_val.json:7: column 3: key 'start' appears twice",
    ),
    "number in the list": ("[{}, 3]", "STAR_val.json[1]: a number where an object is expected"),
    "cut": (PRETTY[:-1], "the text is cut off here"),
    "text": ('"x"', "a text where a JSON list or object of questions is expected"),
    "empty object": ("{}", "is an object without entries"),
    "empty list": ("[]", "is a list without entries"),
    "another id than the key": (
        '{"Interaction_1": {"question_id": "Sequence_1"}}',
        "STAR_val.json['Interaction_1']: 'question_id' is 'Sequence_1', unlike the key",
    ),
    "number by id": ('{"a": 3}', "STAR_val.json['a']: a number where an object is expected"),
    "two bad rows": ("[{}, {}]", "2 of 2 rows are bad: STAR_val.json[0]: "),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_bad_json(tmp_path: Path, kind: str) -> None:
    """The message says line and column, or the item."""
    content, part = BAD_JSON[kind]
    put(tmp_path / "STAR_val.json", content)
    message = refusal(read_questions, "star", tmp_path, "val")
    assert message.startswith(part) if part.startswith("STAR_val") else part in message


def test_bom_and_crlf_in_json(tmp_path: Path) -> None:
    put(tmp_path / "STAR_val.json", "\ufeff" + PRETTY.replace("\n", "\r\n"))
    assert read_questions("star", tmp_path, "val")[0].feature_rows == (6, 19)


CHOICES: dict[str, Any] = {
    "texts": ["a", "b", "b", "d"],
    "object by number": {"10": "d", "2": "b", "0": "a", "1": "b"},
    "object by letter": {"A": "a", "d": "d", "C": "b", "B": "b"},
    "object of objects": {str(i): {"choice": text} for i, text in enumerate("abbd")},
    "numbers as text": [{"choice_id": str(i), "choice": text} for i, text in enumerate("abbd")],
}


@pytest.mark.parametrize("kind", CHOICES)
def test_choices_in_other_forms(tmp_path: Path, kind: str) -> None:
    """The sample, and so its digest, is that of the published form."""
    put(tmp_path / "STAR_val.json", [star_item()])
    (published,) = read_questions("star", tmp_path, "val")
    put(tmp_path / "STAR_val.json", [star_item(choices=CHOICES[kind])])
    assert read_questions("star", tmp_path, "val") == [published]


def test_an_object_by_id(tmp_path: Path) -> None:
    """The key is the question_id, which may stand in the question too."""
    items = {"Sequence_1": star_item(), " Odd ": star_item(question_id="Odd")}
    del items["Sequence_1"]["question_id"]
    put(tmp_path / "STAR_val.json", items)
    questions = read_questions("star", tmp_path, "val")
    assert [q.qid for q in questions] == ["Sequence_1", "Odd"]
    assert [q.place for q in questions] == ["STAR_val.json['Sequence_1']", "STAR_val.json[' Odd ']"]


TEXTS = ["The cat.", "The  dog.", "A U.S. flag", "the bag"]
LETTERED = dict(zip("ABCD", TEXTS, strict=True))
FROM_ONE = [{"choice_id": i + 1, "choice": text} for i, text in enumerate(TEXTS)]
ANSWERS: list[tuple[Any, Any, int, str]] = [
    ("The cat", TEXTS, 0, star.LOOSELY),
    (" the dog. ", TEXTS, 1, star.LOOSELY),
    ("A U.S. flag.", TEXTS, 2, star.LOOSELY),
    (2, TEXTS, 2, star.BY_NAME),
    ("2", TEXTS, 2, star.BY_NAME),
    ("d", TEXTS, 3, star.BY_NAME),
    ("B", LETTERED, 1, star.BY_NAME),
    (1, LETTERED, 1, star.BY_NAME),
    (1, FROM_ONE, 0, star.BY_NAME),
    (2, ["4", "3", "1", "0"], 2, star.BY_NAME),
    ("C", ["same", "b", "same"], 2, star.BY_NAME),
]


@pytest.mark.parametrize("answer, choices, index, how", ANSWERS)
def test_answers_that_are_no_text_of_a_choice(
    tmp_path: Path, answer: Any, choices: Any, index: int, how: str
) -> None:
    """They are found, counted and said at the start."""
    input_notes = pytest.importorskip("vico.train.input_notes")  # it needs torch
    items = [star_item(), star_item(question_id="A_2", answer=answer, choices=choices)]
    put(tmp_path / "STAR_val.json", items)
    questions = read_questions("star", tmp_path, "val")
    assert [q.answer for q in questions] == [1, index]
    notes = input_notes.annotation_notes(RunConfig(), "star", {"val": questions})
    assert notes == [f"val: 1 of 2 answers are {how}"]


@given(
    st.lists(st.text("ab. B", min_size=1, max_size=4), min_size=2, max_size=4),
    st.text("ab. B", min_size=1, max_size=4),
)
def test_an_answer_fits_one_text_or_is_refused(texts: list[str], answer: str) -> None:
    choices = {str(i): text for i, text in enumerate(texts)}
    try:
        index, how = star._answer({"answer": answer}, choices, "train")
    except RowError:
        assert answer not in texts
        return
    assert index is not None
    if answer in texts:
        assert (index, how) == (texts.index(answer), "")
    elif how == star.LOOSELY:
        fitting = {text for text in texts if plain(text) == plain(answer)}
        assert fitting == {texts[index]}
    else:
        assert answer.strip().upper() == star.LETTERS[index]
