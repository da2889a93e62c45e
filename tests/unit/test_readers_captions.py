"""The caption file of a dataset."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.annotation_files import FILE_PROPERTY, put
from support.errors import refusal
from support.feature_files import questions_about
from vico.data.readers import captions
from vico.data.readers.captions import Captions


def test_the_only_caption_file_of_a_folder(tmp_path: Path) -> None:
    assert "no caption file (llava_v15_13b_n6.json, " in refusal(captions.read, tmp_path, None)
    (tmp_path / "blip2_n6.json").write_text('{"007": " A man. ", "8": "x"}')
    assert captions.read(tmp_path, None) == {"007": " A man. ", "8": "x"}
    (tmp_path / "llava_v15_13b_n6.json").write_text("{}")
    message = refusal(captions.read, tmp_path, None)
    assert "holds llava_v15_13b_n6.json and blip2_n6.json; say which by --captions PATH" in message


def test_named_caption_file(tmp_path: Path) -> None:
    """Its path is absolute, or relative to the folder."""
    path = tmp_path / "mine.json"
    path.write_text('\ufeff{"007": "mine"}', encoding="utf-8")
    for name in ("blip2_n6.json", "llava_v15_13b_n6.json"):
        (tmp_path / name).write_text("{}")
    assert captions.read(tmp_path, path) == {"007": "mine"}
    assert captions.read(tmp_path, Path("mine.json")) == {"007": "mine"}
    assert "nowhere.json: no such file" in refusal(captions.read, tmp_path, Path("nowhere.json"))


BAD_CAPTIONS = [
    (
        '{"a": true, "b": 7}',
        "2 of 2 rows are bad: mine.json: caption of video 'a' is True, not a text",
    ),
    ('{"a": ["x", 7]}', "mine.json: caption of video 'a' is 7, not a text"),
    ('{"a": {"text": "x"}}', "mine.json: 'caption' is missing (has: 'text')"),
    ('{"a": "x", " a": "y"}', "mine.json: video 'a' has two captions; keep one"),
    ('[{"video": "a", "caption": "x"}] []', "mine.json:1: column 34: Extra data"),
    ("7", "mine.json:1: column 1: a number where a JSON object or list of captions is expected"),
    ('[{"id": "a", "caption": "x"}]', "mine.json[0]: 'video' is missing (has: 'id', 'caption')"),
    ('[{"video_id": "a", "text": "x"}]', "mine.json[0]: 'caption' is missing (has: 'video_id', "),
    ('[{"video": "a"}]', "mine.json[0]: 'caption' is missing (has: 'video')"),
    ('[{"video": "a", "video_id": "b", "caption": "x"}]', "has both video and video_id; keep "),
    ('[{"a": "x"}, {"a": "x"}]', "mine.json[1]: video 'a' has two captions; keep one"),
    ('{"a": "x",\n "a": "y"}', "mine.json:2: column 2: key 'a' appears twice"),
    ('["a"]', "mine.json[0]: a text where an object is expected"),
    ('{"a": "x"', "the text is cut off here"),
    ('{"a": "x" y', "mine.json:1: column 11: Expecting ',' delimiter; correct "),
]


@pytest.mark.parametrize("content, part", BAD_CAPTIONS)
def test_bad_caption_files(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    assert part in refusal(captions.read, tmp_path, tmp_path / "mine.json")


LIST = [{"video": "007", "caption": "A man. "}, {"video_id": 8, "caption": "x"}]
FORMS: dict[str, list[Any] | dict[str, Any] | str] = {
    "captions.json": {"007": "A man. ", "8": "x"},
    "a list": LIST,
    "a list of pairs": [{"007": "A man. "}, {"8": "x"}],
    "objects by id": {"007": {"caption": "A man. ", "model": "m"}, "8": {"caption": "x"}},
    "captions.jsonl": LIST,
    "lines.json": "".join(json.dumps(record) + "\r\n" for record in LIST),
    "pairs.jsonl": [{"007": "A man. "}, {" 8": "x"}],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_captions(tmp_path: Path, name: str) -> None:
    """Two names are found by themselves."""
    put(tmp_path / name, FORMS[name])
    path = None if name in captions.FILE_NAMES else Path(name)
    assert captions.read(tmp_path, path) == {"007": "A man. ", "8": "x"}


def test_lists_of_sentences(tmp_path: Path) -> None:
    """They are joined by a blank."""
    content = {"a": ["A man.", " He runs. ", "", "He sits."], "b": [" one "], "c": [], "d": [" "]}
    put(tmp_path / "captions.json", content)
    read = captions.read(tmp_path, None)
    assert read == {"a": "A man. He runs. He sits.", "b": " one "}
    assert read.empty == {"c", "d"}


def test_empty_captions(tmp_path: Path) -> None:
    """Training does not use them: no error."""
    put(tmp_path / "captions.json", {"v0": "x", "v1": " \n", "v2": None, "v3": ""})
    read = captions.read(tmp_path, None)
    captions.check(read, questions_about(("v0", None)))
    assert read == {"v0": "x"} and read.empty == {"v1", "v2", "v3"}
    message = refusal(captions.check, read, questions_about(("v1", None), ("v9", None)))
    assert "2 of 2 questions (2 videos) have no caption, e.g. 'v1' (it is empty), 'v9'; " in message


@given(st.dictionaries(st.text("ab1", min_size=1), st.text("aB .\u732b"), max_size=4))
@FILE_PROPERTY
def test_all_forms_give_the_same_captions(tmp_path: Path, texts: dict[str, str]) -> None:
    records = [{"video": video, "caption": text} for video, text in texts.items()]
    expected = {video: text for video, text in texts.items() if text.strip()}
    for name, content in (("a.json", texts), ("b.json", records), ("c.jsonl", records)):
        if texts or name == "a.json":
            read = captions.read(tmp_path, put(tmp_path / name, content))
            assert read == expected and read.empty == texts.keys() - expected.keys()


def test_questions_without_caption_are_counted() -> None:
    questions = questions_about(*((f"v{i // 2}", None) for i in range(12)))
    captions.check(Captions({f"v{i}": "x" for i in range(6)}), questions)
    message = refusal(captions.check, Captions({"v0": "x"}, Path("c.json")), questions)
    assert message.startswith(
        "c.json: 10 of 12 questions (5 videos) have no caption, e.g. 'v1', 'v2', 'v3'; "
    )
    assert "--cap 0" in message


@pytest.mark.parametrize(
    "key, video",
    [("a/v1.mp4", "v1"), ("v1", "clips/v1.webm"), ("v1.MP4", "v1.npy"), (" 4010.0", "4010")],
)
def test_ids_are_found_as_those_of_features(tmp_path: Path, key: str, video: str) -> None:
    put(tmp_path / "captions.json", {key: "x", "007": " "})
    read = captions.read(tmp_path, None)
    captions.check(read, questions_about((video, None)))
    assert read[video] == read.get(video) == "x" and video in read and "7" not in read
    lacking = questions_about((video, None), ("b/007.mp4", None))
    assert "e.g. 'b/007.mp4' (it is empty); " in refusal(captions.check, read, lacking)
    (note,) = captions.notes("train", read, lacking)
    assert note.startswith("train: 1 of 2 questions"), "the empty one is used"


def test_ids_that_are_numbers(tmp_path: Path) -> None:
    put(
        tmp_path / "captions.jsonl",
        '{"video": 4010.0, "caption": "x"}\n{"video": 8, "caption": "y"}',
    )
    assert captions.read(tmp_path, None) == {"4010": "x", "8": "y"}
    put(tmp_path / "captions.jsonl", '{"video": 4010.5, "caption": "x"}\n')
    assert "captions.jsonl:1: 'video' is 4010.5" in refusal(captions.read, tmp_path, None)


def test_two_ids_that_may_be_meant(tmp_path: Path) -> None:
    put(tmp_path / "captions.json", {"a/v1": "x", "b/v1": "y"})
    read = captions.read(tmp_path, None)
    assert read["b/v1"] == "y"
    message = refusal(captions.check, read, questions_about(("v1", None)))
    assert "captions.json: 'a/v1' and 'b/v1' may both be video 'v1'; keep one" in message
