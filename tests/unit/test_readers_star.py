"""STAR's JSON list: answers are texts, choices come in any order, clips are in seconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put, star_item
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.types import Question


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
    "answer": ({"answer": "B"}, "'answer' is 'B', not one of the choices ['a', 'b', 'b', 'd']"),
    "choices": ({"choices": "ab"}, "'choices' is 'ab', not a list"),
    "same choice_id": (
        {"choices": [{"choice_id": 1, "choice": "b"}] * 2},
        "choice_id 1 is no integer or appears twice",
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
    "object": ("{}", "an object where a JSON list of questions is expected"),
    "empty list": ("[]", "is an empty list"),
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
