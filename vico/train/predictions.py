"""Reads the predictions of an evaluation: a line of predictions_SPLIT.jsonl per question."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from vico.errors import UserError, fail, show
from vico.io.text import json_kind, parse_json, read_json_lines

_REMEDY = "name the predictions_SPLIT.jsonl of an evaluation"


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The lines of the file, checked. Raises UserError for the first that is damaged."""
    records, faults = read_readable_predictions(path)
    if faults:
        raise faults[0]
    return records


def read_readable_predictions(path: Path) -> tuple[list[dict[str, Any]], list[UserError]]:
    """The undamaged lines of the file, and an error for each other one.

    Raises UserError where the file is no text at all.
    """
    return read_json_lines(path, "the file of predictions", partial(_parse, path))


def _parse(path: Path, line: str, number: int) -> dict[str, Any]:
    record, place = parse_json(line, path, number), f"{path}:{number}"
    if not isinstance(record, dict):
        fail(f"{place}: {json_kind(record)} where an object is expected; {_REMEDY}")
    _check(record, place)
    return record


def _check(record: Mapping[str, Any], place: str) -> None:
    for name in ("qid", "video"):
        if not isinstance(record.get(name), str):
            fail(f"{place}: '{name}' is {show(record.get(name))} and must be a text; {_REMEDY}")
    scores = record.get("scores")
    if not isinstance(scores, list) or not scores:
        fail(f"{place}: 'scores' is {show(scores)} and must be a list; {_REMEDY}")
    if wrong := [score for score in scores if not _is_number(score)]:
        fail(f"{place}: 'scores' holds {show(wrong[0])} and must hold numbers; {_REMEDY}")
    rules: dict[str, int | None] = {"index": None, "prediction": len(scores)}
    rules["answer"] = len(scores)
    for name, limit in rules.items():
        value: Any = record.get(name)
        if name == "answer" and value is None:
            continue
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if not is_whole or not 0 <= value < (limit or 10**9):
            allowed = "at least 0" if limit is None else f"from 0 to {limit - 1}"
            fail(f"{place}: '{name}' is {show(value)} and must be a whole number {allowed}")


def _is_number(value: Any) -> bool:
    """Whether a score can be this number; a whole one of 400 digits is no float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and -1e300 < value < 1e300 and math.isfinite(value)
