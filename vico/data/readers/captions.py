"""The caption of each video, which the caption task learns to write."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.types import Question
from vico.data.video_ids import VideoIds
from vico.errors import fail, show
from vico.io.paths import exists
from vico.io.text import json_kind, parse_json, read_text

FILE_NAMES = (
    "llava_v15_13b_n6.json",
    "star_caption_7B.json",
    "blip2_n6.json",
    "captions.json",
    "captions.jsonl",
)
FILE = "the JSON object of captions by video id"  # in messages
VIDEO_KEYS = ("video", "video_id")


class Captions(Mapping[str, str]):
    """By the video ids that questions have (`video_ids.py`). A blank one is none."""

    def __init__(self, texts: Mapping[str, str] | None = None, path: Path = Path()) -> None:
        """`path`: of the file that holds them."""
        self.path, self._texts = path, dict(texts or {})
        self._ids = VideoIds(self._texts, path)
        self.notes: tuple[str, ...] = ()  # which captions these are, where there are others

    def __getitem__(self, video: str) -> str:
        key = self._ids.find(video)
        if key is None or not self._texts[key].strip():
            raise KeyError(video)
        return self._texts[key]

    def __iter__(self) -> Iterator[str]:
        return (video for video, text in self._texts.items() if text.strip())

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def key(self, video: str) -> str | None:
        """What the file calls a video, also one whose caption is blank."""
        return self._ids.find(video)

    @property
    def empty(self) -> frozenset[str]:
        """The file's ids of videos whose caption is blank."""
        return frozenset(self._texts.keys() - set(self))


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


def read(folder: Path, path: Path | None) -> Captions:
    """Of a caption file. Raises UserError for one that is not as expected."""
    path = find(folder, path)
    records, bad = _records(path), []
    texts: dict[str, str] = {}
    for place, row in records:
        try:
            video = _video_of(row)
            if video in texts:
                raise RowError(f"video {show(video)} has two captions; keep one")
            texts[video] = text_of(video, rows.field(row, "caption"))
        except RowError as problem:
            bad.append(f"{place}: {problem}")
    rows.refuse(path, bad, len(records))
    return Captions(texts, path)


def in_rows(splits: Mapping[str, Sequence[Question]], path: Path) -> Captions | None:
    """Those that the training questions hold themselves; None: they hold none.

    `splits`: the questions of a data set; `path`: of the training split. Raises UserError for a
    video with two captions, in whichever splits.
    """
    first: dict[str, Question] = {}
    others = []
    for q in (q for questions in splits.values() for q in questions if q.caption.strip()):
        if first.setdefault(q.video, q).caption.strip() != q.caption.strip():
            others.append(q)
    if others:
        q, videos = others[0], {q.video for q in others}
        fail(
            f"{first[q.video].place} and {q.place}: two captions of video {show(q.video)} (so have "
            f"{len(videos)} videos); a video has one: correct one of the rows, or leave it empty"
        )
    texts = {q.video: "" for q in splits["train"]}
    for q in splits["train"]:
        texts[q.video] = texts[q.video] or (q.caption if q.caption.strip() else "")
    captions = Captions(texts, path)
    return captions if captions else None


def chosen(
    splits: Mapping[str, Sequence[Question]], path: Path, folder: Path, named: Path | None
) -> Captions:
    """Those of --captions (`named`), else those in rows (`in_rows`), else of the folder's file.

    Raises UserError.
    """
    own = in_rows(splits, path)
    if own is None or named is not None:
        captions = read(folder, named)
        if own is not None:
            of = f"of {captions.path} (--captions)"
            captions.notes = (f"captions: {of}; those in the rows of {path} are not used",)
        return captions
    unused = [folder / name for name in FILE_NAMES if exists(folder / name)]
    own.notes = (
        f"captions: of {len(own)} videos, in the rows of {path}",
        *(f"{file}: not used: rows have captions; --captions names a file" for file in unused),
    )
    return own


def _records(path: Path) -> Rows:
    """An object for each video, with a key of VIDEO_KEYS and `caption`."""
    text = read_text(path, FILE)
    if path.suffix.lower() == ".jsonl" or rows.is_jsonl(text):
        records = rows.read_jsonl(path, FILE)
    else:
        content = parse_json(text, path, 1)
        if isinstance(content, dict):
            entries = content.items()
            return Rows((path.name, {"video": video, "caption": text}) for video, text in entries)
        if not isinstance(content, list):
            fail(
                f"{path.name}:1: column 1: {json_kind(content)} where a JSON object or list of "
                f"captions is expected; correct {path}"
            )
        records = rows.objects_of(path, content)
    return Rows((place, _record(row)) for place, row in records)


def _record(row: Row) -> Row:
    """Of {video: caption} too, an object with one entry."""
    if len(row) != 1 or row.keys() & {*VIDEO_KEYS, "caption"}:
        return row
    ((video, text),) = row.items()
    return {"video": video, "caption": text}


def _video_of(row: Row) -> str:
    keys = [key for key in VIDEO_KEYS if key in row]
    if len(keys) > 1:
        raise RowError(f"has both {' and '.join(keys)}; keep the one that questions name")
    return rows.id_field(row, keys[0] if keys else VIDEO_KEYS[0])


def text_of(video: str, value: Any) -> str:
    """A text, verbatim; a list of sentences, joined by a blank; null is a blank caption."""
    if isinstance(value, dict):
        value = rows.field(value, "caption")
    if value is None:
        return ""
    sentences = value if isinstance(value, list) else [value]
    try:
        texts = [rows.text_field({video: sentence}, video) for sentence in sentences]
    except RowError as problem:
        raise RowError(f"caption of video {problem}") from None
    if len(texts) == 1:
        return texts[0]
    return " ".join(text.strip() for text in texts if text.strip())


def check(captions: Captions, questions: Sequence[Question]) -> None:
    """Raise UserError if the video of a question has no caption."""
    without = [q.video for q in questions if q.video not in captions]
    if without:
        videos = list(dict.fromkeys(without))
        examples = ", ".join(
            show(video) + " (it is empty)" * (captions.key(video) is not None)
            for video in videos[: rows.MAX_EXAMPLES]
        )
        fail(
            f"{captions.path}: {len(without)} of {len(questions)} questions ({len(videos)} videos) "
            f"have no caption, e.g. {examples}; name the file that belongs to these questions by "
            "--captions PATH, let them go without by --missing_captions drop, "
            "or train with --cap 0"
        )


def notes(label: str, captions: Captions, questions: Sequence[Question]) -> list[str]:
    """How many training questions have no caption, and how many unused captions are empty.

    `label`: of the questions.
    """
    lines = list(captions.notes)
    lacking = [q.video for q in questions if q.video not in captions]
    if lacking:
        lines.append(
            f"{label}: {len(lacking)} of {len(questions)} questions ({len(set(lacking))} videos) "
            "have no caption, and no captioning loss (--missing_captions drop)"
        )
    num_unused = len(captions.empty.difference(map(captions.key, lacking)))
    if num_unused:
        lines.append(f"{label}: {num_unused} captions are empty, and training does not use them")
    return lines
