"""TVQA's JSON lines: clips of a show, in seconds, with their dialogue."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from vico.data.readers import rows, subtitles
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.readers.subtitles import Clips, Subtitle
from vico.data.types import FeatureRows, Question, Questions
from vico.errors import fail, show
from vico.io.paths import exists

FEATURES_PER_SECOND = 3
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")

Seconds = tuple[int, int]  # first and last whole second


def annotation_file(folder: Path, split: str) -> Path:
    path, public = folder / f"tvqa_{split}.jsonl", folder / "tvqa_test_public.jsonl"
    use_public = split == "test" and not exists(path) and exists(public)
    return public if use_public else path


def read(
    folder: Path, split: str, with_subtitles: bool = False, missing_subtitles: str = "error"
) -> Questions:
    """`missing_subtitles`: "error", or "empty", and then such questions have no dialogue."""
    path = annotation_file(folder, split)
    records = rows.read_jsonl(path, f"the JSON lines of the {split} questions")

    def question(index: int, place: str, row: Row) -> Question:
        rows.refuse_further_options(row, _OPTIONS)
        return Question(
            index=index,
            qid=rows.id_field(row, "qid"),
            video=rows.id_field(row, "vid_name"),
            type=rows.type_field(row, "show_name"),
            question=rows.question_field(row, "q"),
            options=tuple(rows.text_field(row, key) for key in _OPTIONS),
            answer=rows.answer_field(row, "answer_idx", len(_OPTIONS), split),
            feature_rows=_feature_rows(_clip(row)),
            place=place,
        )

    questions = rows.questions_from(path, records, question)
    if with_subtitles:
        clips = subtitles.read(folder, (q.video for q in questions))
        _refuse_subtitles(questions, clips, missing_subtitles)
        _add_dialogue(questions, records, clips)
        questions.notes = _notes(questions, clips)
    return questions


def _clip(row: Row) -> Seconds | None:
    """The clip's seconds, rounded half to even as published; None where the file says NaN.

    `ts` is the text START-END, or a list of two numbers; JSON has no NaN, and so null stands there.
    """
    value = rows.field(row, "ts")
    parts = value if isinstance(value, list) else str(value).split("-")
    try:
        start, end = map(_seconds, parts)
    except (TypeError, ValueError, OverflowError):
        expected = "'START-END' or [START, END] in seconds, or 'NaN-NaN'"
        raise RowError(f"'ts' is {show(value)}, not {expected}") from None
    if math.isnan(start) or math.isnan(end):
        return None
    if not 0 <= start <= end < math.inf:
        raise RowError(f"'ts' is {show(value)}: the clip ends before it starts, or never")
    return round(start), round(end)


def _seconds(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    return float(value)


def _feature_rows(clip: Seconds | None) -> FeatureRows | None:
    if clip is None:
        return None
    first, last = clip
    return first * FEATURES_PER_SECOND, (last + 1) * FEATURES_PER_SECOND


# ---- subtitles
# -------------------------------------------------------------------------------------


def _refuse_subtitles(questions: Sequence[Question], clips: Clips, missing_subtitles: str) -> None:
    """Raise UserError if a question's subtitles are bad or, without leave, missing."""
    bad, remedy = dict(clips.bad), "or run without --sub"
    if missing_subtitles == "error":
        bad |= clips.missing
        if not clips.bad:
            remedy = f"or go without them by --missing_subtitles empty, {remedy}"
    if len(clips.missing) == len({q.video for q in questions}):
        bad |= clips.missing  # another data set's
        remedy = "or run without --sub"
    if not bad:
        return
    num_affected = sum(q.video in bad for q in questions)
    examples = "; ".join(list(bad.values())[: rows.MAX_EXAMPLES])
    more = "; ..." if len(bad) > rows.MAX_EXAMPLES else ""
    fail(
        f"{num_affected} of {len(questions)} questions ({len(bad)} videos) have no usable subtitle "
        f"file, e.g. {examples}{more}; they are read from {clips.source}: "
        f"fetch what is missing, {remedy}"
    )


def _add_dialogue(questions: list[Question], records: Rows, clips: Clips) -> None:
    """Give the questions the subtitles inside their clips. `records`: their rows, in order."""
    for place, (question, (_, row)) in enumerate(zip(questions, records, strict=True)):
        spoken = clips.by_video.get(question.video)
        if spoken is None:
            questions[place] = dataclasses.replace(question, lacks_subtitles=True)
        else:
            text = dialogue(spoken, _clip(row))
            questions[place] = dataclasses.replace(question, dialogue=text)


def dialogue(spoken: list[Subtitle], clip: Seconds | None) -> str:
    """The text of the subtitles that belong to the clip, each after one blank.

    As published: those inside the clip, and those across its start that end inside it. None: all.
    """
    if clip is not None:
        first, last = clip
        spoken = [s for s in spoken if s.end <= last and (s.start >= first or s.end >= first)]
    return "".join(f" {subtitle.text}" for subtitle in spoken)


def _notes(questions: Sequence[Question], clips: Clips) -> tuple[str, ...]:
    notes = [f"the subtitles are those of {clips.source}"]
    num_lacking = sum(q.lacks_subtitles for q in questions)
    if num_lacking:
        notes.append(
            f"{num_lacking} of {len(questions)} questions ({len(clips.missing)} videos) have no "
            "subtitles, and so no dialogue (--missing_subtitles empty)"
        )
    num_silent = sum(not spoken for spoken in clips.by_video.values())
    if num_silent:
        notes.append(f"the subtitles of {num_silent} videos are empty: nobody speaks there")
    if clips.num_not_utf8:
        notes.append(f"{clips.num_not_utf8} subtitle files are not UTF-8: read as ISO-8859-1")
    return tuple(notes)
