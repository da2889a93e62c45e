"""TVQA's JSON lines and SubRip files: clips of a show, in seconds, with their dialogue."""

import codecs
import dataclasses
import math
import re
from dataclasses import dataclass
from pathlib import Path

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.types import FeatureRows, Question
from vico.errors import fail, show
from vico.io.paths import exists, is_folder, read_bytes

SUBTITLES = "tvqa_subtitles"  # the folder of VID_NAME.srt
FEATURES_PER_SECOND = 3
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
# At most nine digits each: int() refuses thousands, and no clip is that long.
_TIME = r"(\d{1,9}):(\d{1,9}):(\d{1,9})"
_TIME_STAMPS = re.compile(rf"\s*{_TIME}[,.:]?\d*\s*-->\s*{_TIME}(?!\d)", re.ASCII)

Seconds = tuple[int, int]  # first and last whole second


@dataclass(frozen=True, slots=True)
class Subtitle:
    """Start and end in whole seconds: as published, the time stamps lose their milliseconds."""

    start: int
    end: int
    text: str


def annotation_file(folder: Path, split: str) -> Path:
    path, public = folder / f"tvqa_{split}.jsonl", folder / "tvqa_test_public.jsonl"
    use_public = split == "test" and not exists(path) and exists(public)
    return public if use_public else path


def read(folder: Path, split: str, subtitles: bool = False) -> list[Question]:
    path = annotation_file(folder, split)
    records = rows.read_jsonl(path, f"the JSON lines of the {split} questions")

    def question(index: int, place: str, row: Row) -> Question:
        clip = _clip(row)
        return Question(
            index=index,
            qid=rows.id_field(row, "qid"),
            video=rows.id_field(row, "vid_name"),
            type=rows.type_field(row, "show_name"),
            question=rows.question_field(row, "q"),
            options=tuple(rows.text_field(row, key) for key in _OPTIONS),
            answer=rows.answer_field(row, "answer_idx", len(_OPTIONS), split),
            feature_rows=_feature_rows(clip),
            place=place,
        )

    questions = rows.questions_from(path, records, question)
    if subtitles:
        questions[:] = _with_dialogue(questions, records, folder / SUBTITLES)
    return questions


def _clip(row: Row) -> Seconds | None:
    """The clip's seconds, rounded half to even as published; None where the file says NaN."""
    text = rows.text_field(row, "ts")
    try:
        start, end = (float(part) for part in text.split("-"))
    except ValueError:
        raise RowError(f"'ts' is {show(text)}, not 'START-END' in seconds or 'NaN-NaN'") from None
    if math.isnan(start) or math.isnan(end):
        return None
    if not 0 <= start <= end < math.inf:
        raise RowError(f"'ts' is {show(text)}: the clip ends before it starts, or never")
    return round(start), round(end)


def _feature_rows(clip: Seconds | None) -> FeatureRows | None:
    if clip is None:
        return None
    first, last = clip
    return first * FEATURES_PER_SECOND, (last + 1) * FEATURES_PER_SECOND


# ---- subtitles
# -------------------------------------------------------------------------------------


def _with_dialogue(questions: list[Question], records: Rows, folder: Path) -> list[Question]:
    """The questions with the subtitles inside their clips. `records`: their rows, in order."""
    if not is_folder(folder):
        fail(
            f"{folder}: no such folder; the subtitles VID_NAME.srt should be there: "
            "fetch them, or run without --sub"
        )
    subtitles: dict[str, list[Subtitle]] = {}
    bad: dict[str, str] = {}
    for video in dict.fromkeys(q.video for q in questions):
        try:
            subtitles[video] = _read_srt(folder, video)
        except RowError as problem:
            bad[video] = str(problem)
    if bad:
        _refuse_subtitles(questions, bad, folder)
    return [
        dataclasses.replace(q, dialogue=dialogue(subtitles[q.video], _clip(row)))
        for q, (_, row) in zip(questions, records, strict=True)
    ]


def _refuse_subtitles(questions: list[Question], bad: dict[str, str], folder: Path) -> None:
    """Raise UserError. `bad`: what is wrong, by video."""
    num_affected = sum(q.video in bad for q in questions)
    examples = "; ".join(list(bad.values())[: rows.MAX_EXAMPLES])
    more = "; ..." if len(bad) > rows.MAX_EXAMPLES else ""
    fail(
        f"{num_affected} of {len(questions)} questions ({len(bad)} videos) have no usable subtitle "
        f"file, e.g. {examples}{more}; fetch the missing ones into {folder}, or run without --sub"
    )


def dialogue(subtitles: list[Subtitle], clip: Seconds | None) -> str:
    """The text of the subtitles that belong to the clip, each after one blank.

    As published: those inside the clip, and those across its start that end inside it. None: all.
    """
    if clip is not None:
        first, last = clip
        subtitles = [s for s in subtitles if s.end <= last and (s.start >= first or s.end >= first)]
    return "".join(f" {subtitle.text}" for subtitle in subtitles)


def _read_srt(folder: Path, video: str) -> list[Subtitle]:
    # Ids come from a file. They must not lead out of the folder.
    if any(part in video for part in ("/", "\\", "..", "\0")):
        raise RowError(f"vid_name {show(video)} is no file name")
    path = folder / f"{video}.srt"
    try:
        data = read_bytes(path)
    except (OSError, ValueError) as problem:
        raise RowError(f"{path} ({getattr(problem, 'strerror', None) or problem})") from None
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("iso-8859-1")
    return _parse_srt(text, path)


def _parse_srt(text: str, path: Path) -> list[Subtitle]:
    """A subtitle's text runs from its time stamps to the next number; empty lines are dropped."""
    spans: list[Seconds] = []
    texts: list[list[str]] = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if stamps := _TIME_STAMPS.match(line):
            h1, m1, s1, h2, m2, s2 = map(int, stamps.groups())
            if texts and texts[-1] and texts[-1][-1].strip().isdecimal():
                texts[-1].pop()  # the number of the subtitle that begins here
            spans.append((h1 * 3600 + m1 * 60 + s1, h2 * 3600 + m2 * 60 + s2))
            texts.append([])
        elif "-->" in line:
            raise RowError(f"{path}:{number} (time stamps {show(line)})")
        elif texts and line.strip():
            texts[-1].append(line.rstrip())
    if not spans:
        raise RowError(f"{path} (holds no subtitle)")
    return [
        Subtitle(start, end, " ".join(lines))
        for (start, end), lines in zip(spans, texts, strict=True)
    ]
