"""Conversations as rows of the general schema: what they become, and what is said of bad ones."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.errors import outcome, refusal
from vico.data.readers import answers, conversations, rows
from vico.data.readers.conversations import _answer, _of_conversation, _without_letters

LISTS = {
    "why\nA. clap\nB. None": ("why", ["clap", "None"], ""),
    "<video>\nwhy\nOptions:\n(A) clap\n(B) None\n\nAnswer.\nNow.": (
        "why",
        ["clap", "None"],
        "Answer.\nNow.",
    ),
    "why\n\nhow\nchoices\nA: x\nB). y  \nC. z": ("why\n\nhow", ["x", "y", "z"], ""),
    "B. no\nwhy\nA. x\nB. y": ("B. no\nwhy", ["x", "y"], ""),
    "why\nA. x\nmore of it\nthen": ("why", ["x"], "more of it\nthen"),
    "why\nA. x\nB. y\nD. z": "option D is not in the row of letters: 'why\\nA. x\\nB. y\\nD. z'",
    "why\nA. x\nrest\nB. y": "option B is not in the row of letters: 'why\\nA. x\\nrest\\nB. y'",
}


@pytest.mark.parametrize("text", LISTS)
def test_options_by_letter(text: str) -> None:
    assert outcome(conversations.split_options, text) == LISTS[text]


def test_26_options_by_letter() -> None:
    listed = "\n".join(f"{letter}. of {letter}" for letter in answers.LETTERS)
    question, options, rest = conversations.split_options(f"why\n{listed}\nNow.")
    assert (question, rest) == ("why", "Now.")
    assert options == [f"of {letter}" for letter in answers.LETTERS]
    again = outcome(conversations.split_options, f"why\n{listed}\nA. again")
    assert again.startswith("option A is not in the row of letters: ")
    with pytest.raises(conversations._OtherTaskError, match=r"^without options by letter:$"):
        conversations.split_options("why\nB. x")


def turns(*texts: str, names: tuple[str, ...] = ("human", "gpt")) -> list[dict[str, str]]:
    pairs = enumerate(texts)
    return [{"from": names[i % len(names)], "value": text} for i, text in pairs]


ASKED = "why\nA. x\nB. y"
CHATS: list[tuple[dict[str, Any], Any]] = [
    ({"conversations": "hello"}, "'conversations' is 'hello', not a list of objects"),
    ({"messages": ["hello"]}, "'messages' is ['hello'], not a list of objects"),
    ({"video": "v", "x": 1}, "no 'conversations' (has: 'video', 'x')"),
    ({"conversations": []}, "'conversations' holds 0 texts, not questions with an answer each"),
    (
        {"conversations": turns(ASKED, "A", ASKED)},
        "'conversations' holds 3 texts, not questions with an answer each",
    ),
    (
        {"conversations": turns(ASKED, "A", names=("gpt", "gpt"))},
        "'conversations' goes from 'gpt' to 'gpt'",
    ),
    (
        {"conversations": turns(ASKED, "A", names=("human", "user"))},
        "'conversations' goes from 'human' to 'user'",
    ),
    (
        {"conversations": [{"from": 3, "value": "x"}] * 2},
        "a turn of 'conversations' is {'from': 3, 'value': 'x'}, not who speaks and a text",
    ),
    ({"conversations": turns(ASKED, "A")}, "no 'video' (has: 'conversations')"),
    (
        {"video": "v", "conversations": turns("Be brief.", ASKED, "A", names=("system", *"ab"))},
        "'conversations' goes from 'a' to 'b'",
    ),
]


@pytest.mark.parametrize(("row", "words"), CHATS, ids=lambda case: str(case)[:40])
def test_bad_conversations(row: dict[str, Any], words: str) -> None:
    assert outcome(_of_conversation, row) == words


def test_what_a_conversation_becomes() -> None:
    said = turns("Be brief.", f"{ASKED}\nLetter.", "A", names=("system", "user", "assistant"))
    row = {"video": ["v"], "kind": "CW", "conversations": said}
    made = {"kind": "CW", "video": "v", "question": "why", "options": ["x", "y"], "answer": "A"}
    assert _of_conversation(row) == [(made, "Be brief. Letter.")]
    twice = {**row, "conversations": turns(ASKED, "A", ASKED, "The answer is (B)")}
    assert [(r["answer"], "id" in r, rest) for r, rest in _of_conversation(twice)] == [
        ("A", False, ""),
        ("(B)", False, ""),
    ]
    ids = [r.get("id") for r, _ in _of_conversation({**twice, "id": "q"})]
    assert ids == ["q", "q#1"]
    for name in ("image", "images"):
        with pytest.raises(conversations._OtherTaskError, match=r"^about an image:$"):
            _of_conversation({"conversations": turns(ASKED, "A"), name: "x.jpg"})
    for videos in ([], ["v", "w"]):
        with pytest.raises(conversations._OtherTaskError, match=r"^about several videos:$"):
            _of_conversation({**row, "video": videos})


def test_words_around_an_answer() -> None:
    said = {"B": "B", "<answer> B </answer>": "B", "The correct answer is B. a dog": "B. a dog"}
    said |= {"answer: (C)": "(C)", "the best option is: D": "D", "a dog": "a dog"}
    said |= {"The answer is dog": "The answer is dog", "<answer>the answer is A</answer>": "A"}
    assert {text: _answer(text) for text in said} == said


def test_letters_before_options() -> None:
    """Taken away where each option has its own."""
    assert _without_letters(["A. x", "(B) y"]) == ["x", "y"]
    for kept in (["B. x", "A. y"], ["A. x", "y"], ["A. x", "A. y"], "A. x", ["A. x", 3], ["x"]):
        assert _without_letters(kept) == kept


def test_what_is_said_of_conversations(tmp_path: Path) -> None:
    """Rows of other tasks and texts that are left out are counted, the most frequent first."""
    chat = {"id": 1, "video": "v", "conversations": turns(f"{ASKED}\nNow.", "A")}
    others = [{"image": "x", "conversations": turns(ASKED, "A")}] * 2
    others.append({"video": "v", "conversations": turns("why", "A")})
    path = put(tmp_path / "val.json", json.dumps([others[2], *others[:2], chat, chat]))
    made = conversations.as_rows(path, rows.read_json_items(path, "the table", "id"))
    assert len(made) == 2 and made.notes == (
        "warning: 3 of 5 rows are not a question with options about one video, and are passed "
        "over: about an image: 2, without options by letter: 1",
        "2 texts around the options are left out, as 'Now.'",
    )
    assert conversations._notes(2, Counter(), Counter({"": 0, "Now.": 0}), "x") == []
    put(path, json.dumps(others))
    message = refusal(conversations.as_rows, path, rows.read_json_items(path, "it", "id"))
    assert "no row is a question with options about one video: about an image; an opt" in message
    plain = rows.read_json_items(put(path, json.dumps([{"video": 1}])), "it", "id")
    assert conversations.as_rows(path, plain) is plain
    bad = [chat, {**chat, "conversations": 3}]
    message = refusal(conversations.as_rows, path, rows.objects_of(path, bad))
    assert message.startswith("val.json[1]: 'conversations' is 3, not a list of objects; correct")


def test_the_columns_of_video_r1_alone(tmp_path: Path) -> None:
    row = {"problem": "why", "options": ["A. x", "B. y"], "solution": "<answer>B</answer>"}
    made = conversations.as_rows(tmp_path / "val.json", rows.Rows([("val.json[0]", row)]))
    assert made == [("val.json[0]", {"question": "why", "options": ["x", "y"], "answer": "B"})]
