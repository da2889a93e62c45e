"""The one long text per video that the caption task learns to write."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vico.data.readers import rows
from vico.data.types import Question
from vico.errors import fail, show
from vico.io.text import read_json_object

NAMES = ("llava_v15_13b_n6.json", "star_caption_7B.json", "blip2_n6.json")


def find(folder: Path, path: Path | None) -> Path:
    """The caption file: `--captions PATH` (from here, or else from the data folder), or the one the folder holds."""
    if path is not None:
        return path if os.path.exists(path) or not os.path.exists(folder / path) else folder / path
    found = [folder / name for name in NAMES if os.path.exists(folder / name)]
    if len(found) > 1:
        fail(
            f"{folder}: holds {' and '.join(file.name for file in found)}; say which by --captions PATH"
        )
    if not found:
        fail(
            f"{folder}: holds no caption file ({', '.join(NAMES)}); name one by --captions PATH, or train with --cap 0"
        )
    return found[0]


def read(folder: Path, path: Path | None) -> dict[str, str]:
    path = find(folder, path)
    captions = read_json_object(path, "the JSON object of captions by video id")
    bad = []
    for video in captions:
        try:
            rows.question_field(captions, video)
        except rows.RowError as problem:
            bad.append(f"{path.name}: caption of video {problem}")
    rows.refuse(path, bad, len(captions))
    return rows.strip_ids(captions, path)


def check(captions: Mapping[str, str], questions: Sequence[Question], path: Path) -> None:
    """Every question brings its video's caption: none may be missing."""
    without = [q.video for q in questions if q.video not in captions]
    if without:
        videos = list(dict.fromkeys(without))
        examples = ", ".join(show(video) for video in videos[: rows.NUM_SHOWN])
        fail(
            f"{path}: {len(without)} of {len(questions)} questions ({len(videos)} videos) have no caption, e.g. {examples}; "
            "name the file that belongs to these questions by --captions PATH, or train with --cap 0"
        )
