"""The caption file of a dataset."""

from pathlib import Path

import pytest

from support.errors import refusal
from support.feature_files import questions_about
from vico.data.readers import captions


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
    ('{"a": " ", "b": "x"}', "caption of video 'a' is empty"),
    (
        '{"a": null, "b": 7}',
        "2 of 2 rows are bad: mine.json: caption of video 'a' is None, not a text",
    ),
    ('{"a": "x",\n "a": "y"}', "mine.json:2: column 2: key 'a' appears twice"),
    ('["a"]', "a list where a JSON object is expected"),
    ('{"a": "x"', "the text is cut off here"),
]


@pytest.mark.parametrize("content, part", BAD_CAPTIONS)
def test_bad_caption_files(tmp_path: Path, content: str, part: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    assert part in refusal(captions.read, tmp_path, tmp_path / "mine.json")


def test_questions_without_caption_are_counted() -> None:
    questions = questions_about(*((f"v{i // 2}", None) for i in range(12)))
    captions.check({f"v{i}": "x" for i in range(6)}, questions, Path("c.json"))
    message = refusal(captions.check, {"v0": "x"}, questions, Path("c.json"))
    assert message.startswith(
        "c.json: 10 of 12 questions (5 videos) have no caption, e.g. 'v1', 'v2', 'v3'; "
    )
    assert "--cap 0" in message
