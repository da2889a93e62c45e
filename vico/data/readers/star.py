"""STAR's JSON list: the answer is a text, the choices are unordered, the clip is in seconds."""

import math
from pathlib import Path
from typing import Any

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError
from vico.data.types import FeatureRows, Question
from vico.errors import show

GROUPS = {name: name for name in ("Interaction", "Sequence", "Prediction", "Feasibility")}
MEAN_OF = tuple(GROUPS)  # published next to the total: the mean of these four accuracies


def annotation_file(folder: Path, split: str) -> Path:
    return folder / f"STAR_{split}.json"


def read(folder: Path, split: str) -> list[Question]:
    path = annotation_file(folder, split)
    records = rows.read_json_list(path, f"the JSON list of the {split} questions")

    def question(index: int, place: str, row: Row) -> Question:
        qid = rows.id_field(row, "question_id")
        kind, underscore, _ = qid.partition("_")  # "Interaction_T1_13"
        options = _options(rows.field(row, "choices"))
        return Question(
            index=index,
            qid=qid,
            video=rows.id_field(row, "video_id"),
            type=kind if underscore else rows.UNKNOWN,
            question=rows.question_field(row, "question"),
            options=options,
            answer=_answer(row, options, split),
            feature_rows=_feature_rows(row),
            place=place,
        )

    return rows.questions_from(path, records, question)


def _options(choices: Any) -> tuple[str, ...]:
    """The texts of the choices by rising choice_id."""
    is_list = isinstance(choices, list) and len(choices) >= 2
    if not is_list or not all(isinstance(choice, dict) for choice in choices):
        raise RowError(f"'choices' is {show(choices)}, not a list of two or more objects")
    texts: dict[int, str] = {}
    for choice in choices:
        key = rows.field(choice, "choice_id")
        if not isinstance(key, int) or isinstance(key, bool) or key in texts:
            raise RowError(f"choice_id {show(key)} is no integer or appears twice")
        texts[key] = rows.text_field(choice, "choice")
    return tuple(texts[key] for key in sorted(texts))


def _answer(row: Row, options: tuple[str, ...], split: str) -> int | None:
    """The first option with the answer's text: some questions have two equal options."""
    if split == "test" and row.get("answer") in (None, ""):
        return None
    text = rows.text_field(row, "answer")
    if text not in options:
        raise RowError(f"'answer' is {show(text)}, not one of the choices {show(list(options))}")
    return options.index(text)


def _feature_rows(row: Row) -> FeatureRows:
    """STAR has one feature per second: rows round(start) to round(end), both included.

    As published: Python's round, which takes halves to the even number.
    """
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end < start:
        raise RowError(f"the clip ends at {end} s, before it starts at {start} s")
    return round(start), round(end) + 1


def _seconds(row: Row, key: str) -> float:
    value = rows.field(row, key)
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RowError(f"'{key}' is {show(value)}, not a time in seconds")
    return seconds
