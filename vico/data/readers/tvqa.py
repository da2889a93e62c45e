"""TVQA's JSON lines and SubRip files: clips of a show, localised in seconds, with the dialogue spoken in them."""

import codecs
import dataclasses
import math
import os
import re
from pathlib import Path

from vico.data.readers import rows as tables
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.types import Question
from vico.errors import fail, show
from vico.io.atomic import read_bytes

FEATURES_PER_SECOND = 3
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_SPOKEN = re.compile(r"\s*(\d+):(\d+):(\d+)[,.:]?\d*\s*-->\s*(\d+):(\d+):(\d+)", re.ASCII)

Lines = list[tuple[int, int, str]]  # subtitles: start and end in whole seconds, text


def file_of(folder: Path, split: str) -> Path:
    path, public = folder / f"tvqa_{split}.jsonl", folder / "tvqa_test_public.jsonl"
    return (
        public if split == "test" and not os.path.exists(path) and os.path.exists(public) else path
    )


def read(folder: Path, split: str, subtitles: bool = False) -> list[Question]:
    path = file_of(folder, split)
    rows = tables.read_jsonl(path, f"the JSON lines of the {split} questions")

    def question(index: int, place: str, row: Row) -> Question:
        clip = _clip(row)
        return Question(
            index=index,
            qid=tables.id_field(row, "qid"),
            video=tables.id_field(row, "vid_name"),
            type=tables.type_field(row, "show_name"),
            question=tables.question_field(row, "q"),
            options=tuple(tables.text_field(row, key) for key in _OPTIONS),
            answer=tables.answer_field(row, "answer_idx", len(_OPTIONS), split),
            feature_rows=clip
            and (clip[0] * FEATURES_PER_SECOND, (clip[1] + 1) * FEATURES_PER_SECOND),
            place=place,
        )

    questions = tables.questions_from(path, rows, question)
    return _with_dialogue(questions, rows, folder / "tvqa_subtitles") if subtitles else questions


def _clip(row: Row) -> tuple[int, int] | None:
    """First and last second of the clip, rounded half to even as published; None when the file says NaN."""
    text = tables.text_field(row, "ts")
    try:
        start, end = (float(part) for part in text.split("-"))
    except ValueError:
        raise RowError(f"'ts' is {show(text)}, not 'START-END' in seconds or 'NaN-NaN'") from None
    if math.isnan(start) or math.isnan(end):
        return None
    if not 0 <= start <= end < math.inf:
        raise RowError(f"'ts' is {show(text)}: the clip ends before it starts, or never")
    return round(start), round(end)


def _with_dialogue(questions: list[Question], rows: Rows, folder: Path) -> list[Question]:
    if not os.path.isdir(folder):
        fail(
            f"{folder}: no such folder; the subtitles VID_NAME.srt should be there: fetch them, or run without --sub"
        )
    spoken: dict[str, Lines] = {}
    bad: dict[str, str] = {}
    for video in dict.fromkeys(q.video for q in questions):
        try:
            spoken[video] = _read_srt(folder, video)
        except RowError as problem:
            bad[video] = str(problem)
    if bad:
        affected = sum(q.video in bad for q in questions)
        shown = "; ".join(list(bad.values())[: tables.NUM_SHOWN]) + (
            "; ..." if len(bad) > tables.NUM_SHOWN else ""
        )
        fail(
            f"{affected} of {len(questions)} questions ({len(bad)} videos) have no usable subtitle file, e.g. {shown}; "
            f"fetch the missing ones into {folder}, or run without --sub"
        )
    return [
        dataclasses.replace(q, dialogue=dialogue(spoken[q.video], _clip(row)))
        for q, (_, row) in zip(questions, rows, strict=True)
    ]


def dialogue(lines: Lines, clip: tuple[int, int] | None) -> str:
    """The lines inside the clip (bounds included), or across its start and ending inside it, each after one blank.

    Whole seconds are the published ones: a subtitle's stamp loses its milliseconds, the clip's times are rounded.
    """
    if clip is None:
        return "".join(f" {text}" for _, _, text in lines)
    first, last = clip
    inside = [
        text for start, end, text in lines if end <= last and (start >= first or end >= first)
    ]
    return "".join(f" {text}" for text in inside)


def _read_srt(folder: Path, video: str) -> Lines:
    if any(
        part in video for part in ("/", "\\", "..", "\0")
    ):  # ids come from a file: they must not lead elsewhere
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


def _parse_srt(text: str, path: Path) -> Lines:
    """A subtitle's text runs from its time stamps to the number before the next ones, empty lines left out."""
    spans: list[tuple[int, int]] = []
    texts: list[list[str]] = []
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if stamps := _SPOKEN.match(line):
            h1, m1, s1, h2, m2, s2 = map(int, stamps.groups())
            if texts and texts[-1] and texts[-1][-1].strip().isdecimal():
                texts[-1].pop()
            spans.append((h1 * 3600 + m1 * 60 + s1, h2 * 3600 + m2 * 60 + s2))
            texts.append([])
        elif "-->" in line:
            raise RowError(f"{path}:{number} (time stamps {show(line)})")
        elif texts and line.strip():
            texts[-1].append(line.rstrip())
    if not spans:
        raise RowError(f"{path} (holds no subtitle)")
    return [(start, end, " ".join(lines)) for (start, end), lines in zip(spans, texts, strict=True)]
