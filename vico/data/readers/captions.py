"""The caption of each video, which the caption task learns to write."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vico.data.readers import rows
from vico.data.types import Question
from vico.errors import fail, show
from vico.io.paths import exists
from vico.io.text import read_json_object

FILE_NAMES = ("llava_v15_13b_n6.json", "star_caption_7B.json", "blip2_n6.json")


def locate(folder: Path, path: Path) -> Path:
    """The absolute path of --captions PATH, relative to the current folder or to the dataset's.

    The current folder's file is taken where both exist.
    """
    here, in_folder = path.absolute(), (folder / path).absolute()
    return in_folder if not exists(here) and exists(in_folder) else here


def find(folder: Path, path: Path | None) -> Path:
    """The caption file: that of --captions (see `locate`), or the one that the folder holds."""
    if path is not None:
        located = locate(folder, path)
        if not exists(located):
            fail(
                f"--captions {located}: no such file, and {folder} holds no {path.name}; correct "
                "the path, or train with --cap 0"
            )
        return located
    found = [folder / name for name in FILE_NAMES if exists(folder / name)]
    if len(found) > 1:
        names = " and ".join(file.name for file in found)
        fail(f"{folder}: holds {names}; say which by --captions PATH")
    if not found:
        fail(
            f"{folder}: holds no caption file ({', '.join(FILE_NAMES)}); "
            "name one by --captions PATH, or train with --cap 0"
        )
    return found[0]


def read(folder: Path, path: Path | None) -> dict[str, str]:
    """Captions by video id. Raises UserError for a file that is not as expected."""
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
    """Raise UserError if the video of a question has no caption."""
    without = [q.video for q in questions if q.video not in captions]
    if without:
        videos = list(dict.fromkeys(without))
        examples = ", ".join(show(video) for video in videos[: rows.MAX_EXAMPLES])
        fail(
            f"{path}: {len(without)} of {len(questions)} questions ({len(videos)} videos) have no "
            f"caption, e.g. {examples}; name the file that belongs to these questions by "
            "--captions PATH, or train with --cap 0"
        )
