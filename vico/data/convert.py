"""Writes a data set in the general schema, and reads it back to see that nothing was lost."""

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vico.data.datasets import Dataset, find_dataset, read_questions
from vico.data.readers import schema, spec
from vico.data.readers.rows import UNKNOWN
from vico.data.types import Question
from vico.errors import fail
from vico.io.atomic import write_bytes
from vico.io.paths import exists


def convert(
    name: str, folder: Path, target: Path, splits: Sequence[str], subtitles: bool
) -> list[str]:
    """Write SPLIT.jsonl and dataset.yaml into `target`; returns a line on each split.

    Raises UserError for a file with a fault, one that is there already, or a question that the
    schema cannot hold.
    """
    dataset = find_dataset(name, folder)
    rate = dataset.frames_per_second
    names = [spec.FILE_NAME, *(f"{split}.jsonl" for split in splits)]
    for file in names:
        if exists(target / file):
            fail(f"{target / file}: already exists; name another --output, or remove it")
    read = {split: read_questions(name, folder, split, subtitles) for split in splits}
    target.mkdir(parents=True, exist_ok=True)
    write_bytes(target / spec.FILE_NAME, _description(dataset, rate).encode())
    lines = []
    for split, questions in read.items():
        path = target / f"{split}.jsonl"
        write_bytes(path, "".join(_lines(questions, rate)).encode())
        _compare(questions, schema.read(target, split), path)
        lines.append(f"{path}: {len(questions)} questions of {name}, {split}")
    return lines


def _lines(questions: Iterable[Question], rate: float) -> Iterable[str]:
    for q in questions:
        row: dict[str, Any] = {"id": q.qid, "video": q.video, "question": q.question}
        row |= {"options": list(q.options), "answer": q.answer}
        if q.type != UNKNOWN:
            row["type"] = q.type
        if q.feature_rows is not None:
            row["start"], row["end"] = schema.clip_seconds(q.feature_rows, rate)
        if q.dialogue:
            row["dialogue"] = q.dialogue
        if q.caption:
            row["caption"] = q.caption
        yield json.dumps(row, ensure_ascii=False) + "\n"


def _description(dataset: Dataset, rate: float) -> str:
    """dataset.yaml, as JSON writes the values: YAML reads them."""
    groups: dict[str, list[str]] = {}
    for name, group in (dataset.groups or {}).items():
        groups.setdefault(group, []).append(name)
    values: dict[str, Any] = {
        "frames_per_second": rate,
        "answer": "index",
        "dialogue": dataset.has_dialogue,
    }
    if groups:
        values["groups"] = groups
    if dataset.mean_of:
        values["mean_of"] = list(dataset.mean_of)
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items())


def _compare(questions: Sequence[Question], again: Sequence[Question], path: Path) -> None:
    """Raise UserError for a question that is another one when it is read back."""

    def content(q: Question) -> Question:
        return dataclasses.replace(q, place="", dataset="", lacks_subtitles=False)

    for before, after in zip(questions, again, strict=True):
        if content(before) != content(after):
            fail(
                f"{before.place}: the schema cannot hold this question ({path} reads otherwise); "
                "a clip must begin and end with whole seconds of features"
            )
