"""STAR's JSON list: the answer is a text, the choices come in any order, the clip is given in seconds."""

import math
from pathlib import Path
from typing import Any

from vico.data.readers import rows as tables
from vico.data.readers.rows import Row, RowError
from vico.data.types import Question
from vico.errors import show

GROUPS = {name: name for name in ("Interaction", "Sequence", "Prediction", "Feasibility")}
MEAN_OF = tuple(GROUPS)  # published next to the total: the mean of these four accuracies


def file_of(folder: Path, split: str) -> Path:
    return folder / f"STAR_{split}.json"


def read(folder: Path, split: str) -> list[Question]:
    path = file_of(folder, split)
    rows = tables.read_json_list(path, f"the JSON list of the {split} questions")

    def question(index: int, place: str, row: Row) -> Question:
        qid = tables.id_field(row, "question_id")
        kind, underscore, _ = qid.partition("_")
        options = _options(tables.field(row, "choices"))
        return Question(
            index=index,
            qid=qid,
            video=tables.id_field(row, "video_id"),
            type=kind if underscore else tables.UNKNOWN,
            question=tables.question_field(row, "question"),
            options=options,
            answer=_answer(row, options, split),
            feature_rows=_feature_rows(row),
            place=place,
        )

    return tables.questions_from(path, rows, question)


def _options(choices: Any) -> tuple[str, ...]:
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(choice, dict) for choice in choices)
    ):
        raise RowError(f"'choices' is {show(choices)}, not a list of two or more objects")
    texts: dict[int, str] = {}
    for choice in choices:
        key = tables.field(choice, "choice_id")
        if not isinstance(key, int) or isinstance(key, bool) or key in texts:
            raise RowError(f"choice_id {show(key)} is no integer or stands twice")
        texts[key] = tables.text_field(choice, "choice")
    return tuple(texts[key] for key in sorted(texts))


def _answer(row: Row, options: tuple[str, ...], split: str) -> int | None:
    """The first choice that bears the answer's text: some questions hold the right text twice."""
    if split == "test" and row.get("answer") in (None, ""):
        return None
    text = tables.text_field(row, "answer")
    if text not in options:
        raise RowError(f"'answer' is {show(text)}, not one of the choices {show(list(options))}")
    return options.index(text)


def _feature_rows(row: Row) -> tuple[int, int]:
    """Features are 1 per second: rows round(start)..round(end) inclusive, rounded half to even as published."""
    start, end = _seconds(row, "start"), _seconds(row, "end")
    if end < start:
        raise RowError(f"the clip ends at {end} s, before it starts at {start} s")
    return round(start), round(end) + 1


def _seconds(row: Row, key: str) -> float:
    value = tables.field(row, key)
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RowError(f"'{key}' is {show(value)}, not a time in seconds")
    return seconds
