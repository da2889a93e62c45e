"""The general schema: a table of video, question, options and answer, and what else it has."""

import ast
import contextlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vico.data.readers import answers, captions, columns, conversations, rows, spec, table_files
from vico.data.readers.answers import LETTERS, Answers, Reading
from vico.data.readers.columns import Columns
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.readers.spec import Spec
from vico.data.types import FeatureRows, Question, Questions
from vico.errors import UserError, show
from vico.io.paths import exists, is_folder

MIN_OPTIONS, MAX_OPTIONS = 2, len(LETTERS)


def is_dataset(folder: Path) -> bool:
    """Whether the folder holds a table of a split, or says in dataset.yaml which file is one."""
    if not is_folder(folder):
        return False
    names = [f"{split}{suffix}" for split in spec.SPLITS for suffix in table_files.READERS]
    return any(exists(folder / name) for name in (spec.FILE_NAME, *names))


def annotation_file(folder: Path, split: str) -> Path:
    return _file_of(spec.read(folder), split)


def _file_of(described: Spec, split: str) -> Path:
    folder = described.path.parent
    if split in described.files:
        return folder / described.files[split]
    return table_files.find(folder, split)


def read(folder: Path, split: str) -> Questions:
    """The questions of a split, in file order. Raises UserError for a file with a fault."""
    described = spec.read(folder)
    questions = _read_table(described, _file_of(described, split), split, f"{split} questions")
    if not described.dialogue and (spoken := [q for q in questions if q.dialogue]):
        if described.dialogue is None and _first_row_speaks(folder, described):
            return questions
        raise UserError(
            f"{spoken[0].place}: has a dialogue, which the prompts of this data set do not "
            f"mention; put 'dialogue: true' into {described.path}"
        )
    return questions


def read_file(path: Path) -> Questions:
    """The questions of any table. A dataset.yaml beside it describes its columns.

    All or none have an answer. Raises UserError for a file with a fault.
    """
    return _read_table(spec.read(path.parent), path, "test", "questions")


def _read_table(described: Spec, path: Path, split: str, what: str) -> Questions:
    records = table_files.read(path, f"the table of the {what}")
    records = conversations.as_rows(path, records)
    table = _Table(described, split, records)
    table.refuse_absent_columns(path)
    questions = rows.questions_from(path, records, table.question)
    questions.notes = (*questions.notes, *table.notes(questions))
    return questions


def has_dialogue(folder: Path) -> bool:
    """Whether prompts mention the dialogue: as dataset.yaml says, or the first row has one."""
    described = spec.read(folder)
    if described.dialogue is not None:
        return described.dialogue
    return _first_row_speaks(folder, described)


def _first_row_speaks(folder: Path, described: Spec) -> bool:
    """By the columns of the first split that is there; what is wrong with it, `read` says."""
    for split in spec.SPLITS:
        with contextlib.suppress(UserError, RowError):
            path = _file_of(described, split)
            if exists(path):
                names = table_files.first_names(path)
                return "dialogue" in columns.find(names, described).of if names else False
    return False


class _Table:
    """The rows of one file, and what they have in common."""

    def __init__(self, described: Spec, split: str, records: Rows) -> None:
        self._spec, self._split = described, split
        self._columns: dict[tuple[str, ...], Columns] = {}
        self._num_not_offered = self._num_numbered = 0
        self._captions: dict[str, str] = {}  # one text for all rows of a video
        self._read: list[tuple[tuple[str, ...], Reading | None] | RowError] = []
        for _, row in records:
            try:
                self._read.append(self._options_and_answer(row))
            except RowError as problem:
                self._read.append(problem)
        found = [entry[1] for entry in self._read if isinstance(entry, tuple)]
        self._readings = [reading for reading in found if reading is not None]
        self._answers = Answers(self._readings, described.answer)
        self._unread = Counter(name for c in self._columns.values() for name in c.unread)

    def columns_of(self, row: Row) -> Columns:
        names = tuple(row)
        if names not in self._columns:
            self._columns[names] = columns.find(names, self._spec)
        return self._columns[names]

    def refuse_absent_columns(self, path: Path) -> None:
        """Raise UserError for a column of dataset.yaml that no row has: it is misspelled."""
        present = {name for names in self._columns for name in names}
        for field, column in self._spec.columns.items():
            needed = field != "answer" or self._split != "test"
            if present and needed and isinstance(column, str) and column not in present:
                raise UserError(
                    f"{self._spec.path}: columns: {field}: {show(column)} is no column of "
                    f"{path.name} (has: {', '.join(show(name) for name in sorted(present))})"
                )

    def _options_and_answer(self, row: Row) -> tuple[tuple[str, ...], Reading | None]:
        found = self.columns_of(row)
        if found.options:
            options = self._of_columns(row, found.options)
        else:
            options = _of_list(row, found.of["options"])
        if not MIN_OPTIONS <= len(options) <= MAX_OPTIONS:
            raise RowError(f"{len(options)} options, not {MIN_OPTIONS} to {MAX_OPTIONS}")
        key = found.of.get("answer", "answer")
        return options, answers.read(row, key, options, self._spec.answer_base, self._split)

    def _of_columns(self, row: Row, names: Sequence[str]) -> tuple[str, ...]:
        """Empty ones behind the last option are none; they are counted."""
        texts = ["" if row[name] is None else _option(row[name], name) for name in names]
        num_used = len(texts)
        while num_used and not texts[num_used - 1].strip():
            num_used -= 1
        for name, text in zip(names[:num_used], texts, strict=False):
            if not text.strip():
                raise RowError(f"{show(name)} is empty, and a later option is not")
        self._num_not_offered += num_used < len(texts)
        return tuple(texts[:num_used])

    def question(self, index: int, place: str, row: Row) -> Question:
        entry = self._read[index]
        if isinstance(entry, RowError):
            raise entry
        options, reading = entry
        of = self.columns_of(row).of
        answer = None
        if reading is not None:
            answer = self._answers.index(reading, of["answer"], row[of["answer"]])
        self._num_numbered += "id" not in of
        video = rows.id_field(row, of["video"])
        caption = captions.text_of(video, row[of["caption"]]) if "caption" in of else ""
        return Question(
            index=index,
            qid=rows.id_field(row, of["id"]) if "id" in of else str(index),
            video=video,
            type=_type(row, of["type"]) if "type" in of else rows.UNKNOWN,
            question=rows.question_field(row, of["question"]),
            options=options,
            answer=answer,
            feature_rows=feature_rows(row, of, self._spec.frames_per_second),
            dialogue=_dialogue(row, of),
            caption=self._captions.setdefault(caption, caption),
            place=place,
        )

    def notes(self, questions: Sequence[Question]) -> list[str]:
        total = len(questions)
        described = dict.fromkeys(c.describe() for c in self._columns.values())
        notes = [f"read as {' / '.join(list(described)[: rows.MAX_EXAMPLES])}"]
        notes += self._answers.notes()
        indices = [q.answer for q in questions if q.answer is not None]
        notes += answers.base_notes(indices, self._readings, self._spec.answer_base)
        if self._num_not_offered:
            notes.append(f"{self._num_not_offered} of {total} rows leave option columns empty")
        if self._num_numbered:
            notes.append(f"{self._num_numbered} of {total} rows have no id and are numbered")
        if self._unread:
            names = ", ".join(show(name) for name in list(self._unread)[: rows.MAX_NAMES])
            notes.append(f"{len(self._unread)} columns are not read: {names}")
        return notes


def _option(value: Any, name: str) -> str:
    """A whole number of a JSON file as its digits; any other text verbatim."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return rows.text_field({name: value}, name)


def _of_list(row: Row, name: str) -> tuple[str, ...]:
    """Options of one field: a list, an object by letter or number, or a list as text (in CSV)."""
    value = row[name]
    if isinstance(value, str):
        value = _parsed_list(value)
    if isinstance(value, dict):
        keys = [str(key).strip().upper() for key in value]
        orders = (LETTERS[: len(keys)], *(map(str, range(i, i + len(keys))) for i in (0, 1)))
        if keys not in [list(order) for order in orders]:
            raise RowError(f"{show(name)} has the keys {show(list(value))}, not A, B, ... in order")
        value = list(value.values())
    if not isinstance(value, list):
        raise RowError(f"{show(name)} is {show(row[name])}, not a list of texts")
    return tuple(_option(option, f"{name}[{i}]") for i, option in enumerate(value))


def _parsed_list(text: str) -> Any:
    """A list as JSON or Python writes it; None: neither."""
    for parse in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return parse(text.strip())
    return None


def _type(row: Row, name: str) -> str:
    value = row[name]
    if isinstance(value, float) and math.isnan(value):  # parquet's
        return rows.UNKNOWN
    if isinstance(value, int | float) and not isinstance(value, bool):
        return rows.id_field(row, name)
    return rows.type_field(row, name)


def _dialogue(row: Row, of: Mapping[str, str]) -> str:
    if "dialogue" not in of or row[of["dialogue"]] is None:
        return ""
    text = rows.text_field(row, of["dialogue"])
    return text if not text or text.startswith(" ") else f" {text}"


def feature_rows(row: Row, of: Mapping[str, str], frames_per_second: float) -> FeatureRows | None:
    """The rows of whole seconds round(start) to round(end), both included; halves to even.

    This is STAR's and TVQA's rule. None: no times.
    """
    times = [_seconds(row, of[name]) if name in of else None for name in ("start", "end")]
    start, end = times
    if start is None and end is None:
        return None
    if start is None or end is None:
        raise RowError("a start without an end, or an end without a start")
    if end < start:
        raise RowError(f"the clip ends at {end} s, before it starts at {start} s")
    first = round(round(start) * frames_per_second)
    return first, max(first + 1, round((round(end) + 1) * frames_per_second))


def _seconds(row: Row, name: str) -> float | None:
    value = row[name]
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, float) and math.isnan(value):  # parquet's
        return None
    return rows.seconds_field(row, name)


def clip_seconds(clip: FeatureRows, frames_per_second: float) -> tuple[float, float]:
    """(start, end) that `feature_rows` makes this clip of, where it can."""
    first, stop = clip
    return round(first / frames_per_second), round(stop / frames_per_second) - 1
