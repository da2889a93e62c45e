"""Tables inside other things: lists of a JSON object, and what is asked and said in a chat."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.errors import refusal
from vico.data.datasets import read_questions
from vico.data.types import Questions

ROW: dict[str, Any] = {"video": "v", "question": "why", "options": ["cat", "dog"], "answer": 1}
WITHOUT_VIDEO = {name: value for name, value in ROW.items() if name != "video"}


def read(tmp_path: Path, content: Any) -> Questions:
    put(tmp_path / "my" / "val.json", json.dumps(content))
    questions = read_questions("my", tmp_path / "my", "val")
    assert isinstance(questions, Questions)
    return questions


def test_the_one_list_of_an_object(tmp_path: Path) -> None:
    """What else the file holds is said."""
    questions = read(tmp_path, {"version": 1.0, "data": [ROW, ROW], "splits": []})
    assert [(q.video, q.place) for q in questions] == [
        ("v", "val.json['data'][0]"),
        ("v", "val.json['data'][1]"),
    ]
    assert questions.notes[:2] == (
        "val.json: the rows are those of the list 'data'",
        "val.json: 2 entries are not read: 'version', 'splits'",
    )


def test_a_list_for_each_video(tmp_path: Path) -> None:
    questions = read(tmp_path, {"v1": [WITHOUT_VIDEO], "4010": [WITHOUT_VIDEO, WITHOUT_VIDEO]})
    assert [q.video for q in questions] == ["v1", "4010", "4010"]
    assert "a list for each video 'v1', '4010'" in questions.notes[0]


def test_lists_that_are_no_videos(tmp_path: Path) -> None:
    """Those of splits must not be read as one."""
    for row in (ROW, {**WITHOUT_VIDEO, "Video_ID": "v"}):
        message = refusal(read, tmp_path, {"train": [row], "val": [row]})
        assert "val.json: holds 2 lists of rows that name their video, 'train', 'val'" in message
    assert "no 'video'" in refusal(read, tmp_path, {"data": [WITHOUT_VIDEO]})
    assert "a number where an object is exp" in refusal(read, tmp_path, {"data": [ROW, 7]})


@pytest.mark.parametrize(
    "answer",
    [
        "B",
        "(B) dog",
        "The answer is B.",
        "Answer: B",
        "<answer>B</answer>",
        "Best option: (B) dog",
        "dog",
    ],
)
def test_what_is_said_in_a_chat(tmp_path: Path, answer: str) -> None:
    """The video is a piece of the question, and the answer stands in a sentence or in tags."""
    text = {"type": "text", "text": "What?\nA. cat\nB. dog"}
    asked = [{"type": "video", "video": "file:///x/v.mp4", "fps": 1.0}, text]
    said = [{"type": "text", "text": answer}]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    (question,) = read(tmp_path, [{"messages": turns}])
    assert (question.video, question.options) == ("file:///x/v.mp4", ("cat", "dog"))
    assert question.answer == 1


def test_a_chat_without_options(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A dog"}]
    message = refusal(read, tmp_path, [{"video": "v", "conversations": turns}])
    assert (
        "no row is a question with options about one video: without options by letter; " in message
    )


def test_a_folder_without_a_table_says_what_it_holds(tmp_path: Path) -> None:
    put(tmp_path / "my" / "train.xlsx", b"PK")
    message = refusal(read_questions, "my", tmp_path / "my", "train")
    assert message.endswith(f"{tmp_path}/my holds 'train.xlsx': none is such a table")


def test_types_that_are_numbers(tmp_path: Path) -> None:
    """As parquet holds them where some are missing."""
    rows = [{**ROW, "type": kind} for kind in (3, 3.0, float("nan"), None)]
    path = tmp_path / "my" / "val.parquet"
    put(path, b"")
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_parquet(path)
    kinds = [q.type for q in read_questions("my", tmp_path / "my", "val")]
    assert kinds == ["3", "3", "(unknown)", "(unknown)"]
