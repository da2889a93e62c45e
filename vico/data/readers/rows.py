"""Strict rows: every row of an annotation file arrives verbatim, or the run ends with one line.

The usual readers change data silently. pandas turns the option "None" into NaN and the id 007 into
7, and shifts all columns after one field too many; `json` accepts NaN and repeated keys. Here such
values are kept as text or refused.
"""

import contextlib
import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vico.data.types import Question, Questions
from vico.errors import fail, show
from vico.io.text import json_kind, parse_json, read_text

Row = Mapping[str, Any]


class Rows(list[tuple[str, Row]]):
    """(place such as "val.csv:17", the row's fields) of each row of a file."""

    num_blank = 0  # further rows, which hold nothing but blanks
    notes: tuple[str, ...] = ()  # what is not as it would be expected, and was read


# The type of a question whose file states none, and the group of types that no group lists.
UNKNOWN = "(unknown)"
MAX_EXAMPLES = 3  # in a message
MAX_EXACT = 1 << 53  # whole numbers below it are exact as floats
MAX_NAMES = 20  # columns or keys in a message
# The first of those that make equally many names.
DELIMITERS = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}


class RowError(ValueError):
    """What is wrong with one row. The caller, which walks the rows, adds the place."""


def refuse(path: Path, bad: Sequence[str], total: int) -> None:
    """Raise UserError with the number of bad rows and the first few, if there are any."""
    if not bad:
        return
    remedy = f"correct {path} or fetch it again"
    if len(bad) == 1:
        fail(f"{bad[0]}; {remedy}")
    examples = "; ".join(bad[:MAX_EXAMPLES])
    more = "; ..." if len(bad) > MAX_EXAMPLES else ""
    fail(f"{path.name}: {len(bad)} of {total} rows are bad: {examples}{more}; {remedy}")


# ---- files
# -----------------------------------------------------------------------------------------


def read_csv(path: Path, what: str, required: Sequence[str], aliases: Mapping[str, str]) -> Rows:
    """All rows, fields verbatim, each with the line it begins on.

    `what` names the content in messages. `aliases` maps other names of a column to its required
    one.
    """
    text = read_text(path, what)
    first_line = text.partition("\n")[0]
    if first_line.endswith("\r"):  # CRLF, which a spreadsheet also puts inside quotes
        text = text.replace("\r\n", "\n")
    delimiter = delimiter_of(text)
    records, num_blank = _csv_records(text, path, delimiter)
    header_line, names = records.pop(0)
    header = canonical_names(names, required, aliases)
    _check_header(f"{path.name}:{header_line}", header, required, path)
    if not records:
        fail(f"{path}: holds a header and no rows; fetch it again")
    # The last record, where the text does not end with a newline: a cut-off copy looks like that.
    unended_line = None if text.endswith(("\n", "\r")) else records[-1][0]
    rows, bad = Rows(), []
    rows.num_blank = num_blank
    if delimiter != ",":
        rows.notes = (f"{path.name} is separated by {DELIMITERS[delimiter]}",)
    for line, fields in records:
        place = f"{path.name}:{line}"
        count = f"{len(fields)} fields, header has {len(header)}"
        lost_value = header[-1] in required and not fields[-1]
        if line == unended_line and (len(fields) < len(header) or lost_value):
            bad.append(f"{place}: the last line is cut off ({count})")
        elif len(fields) != len(header):
            bad.append(f"{place}: {count}")
        rows.append((place, dict(zip(header, fields, strict=False))))
    refuse(path, bad, len(rows))
    return rows


def delimiter_of(text: str) -> str:
    """What separates the column names: that of DELIMITERS which makes the most of them."""
    line = re.sub('"[^"]*"', "name", text.lstrip().partition("\n")[0])

    def num_names(mark: str) -> int:
        return sum(bool(name.strip()) for name in line.split(mark)) if mark in line else 0

    return max(DELIMITERS, key=num_names)


def _csv_records(text: str, path: Path, delimiter: str) -> tuple[list[tuple[int, list[str]]], int]:
    """((line it begins on, fields) of each record, the number of blank ones, which are left out).

    The header is the first record. An empty line is no record.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    records, num_blank = [], 0
    line = 1  # where the record begins; reader.line_num is where it ends
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append((line, fields))
            else:
                num_blank += bool(fields)
            line = reader.line_num + 1
    except csv.Error as problem:
        fault = f"broken quotes in this row ({problem})"
        if "unexpected end" in str(problem) or "field limit" in str(problem):
            fault = "a quote that opens in this row is never closed"
        fail(f"{path.name}:{line}: {fault}; correct {path} or fetch it again")
    if not records:
        fail(f"{path}: holds no header and no rows; fetch it again")
    return records, num_blank


def canonical_names(
    names: Sequence[str], required: Sequence[str], aliases: Mapping[str, str]
) -> list[str]:
    """Column names, stripped. An alias becomes the name it stands for, unless that exists too.

    A required name or an alias may be written in capitals.
    """
    stripped = [name.strip() for name in names]
    known = set(stripped)
    header = []
    for name in stripped:
        lower = name.lower() if name.lower() in (*required, *aliases) else name
        canonical = aliases.get(lower, lower)
        header.append(name if canonical in known else canonical)
    return header


def _check_header(place: str, header: Sequence[str], required: Sequence[str], path: Path) -> None:
    """Raise UserError if a required column is missing, or if a column exists twice."""
    has = f"has: {shown(header)}"
    missing = [f"'{name}'" for name in required if name not in header]
    if missing:
        plural = "s" if len(missing) > 1 else ""
        fail(
            f"{place}: column{plural} {', '.join(missing)} missing ({has}); "
            f"add what is missing to {path}"
        )
    repeated = sorted(name for name, count in Counter(header).items() if name and count > 1)
    if repeated:
        fail(
            f"{place}: column {show(repeated[0])} appears twice ({has}); "
            f"rename or remove one in {path}"
        )


def shown(names: Sequence[str]) -> str:
    """The first of them, for a message."""
    return ", ".join(show(name) for name in names[:MAX_NAMES])


def read_jsonl(path: Path, what: str) -> Rows:
    """One JSON object per line."""
    rows = Rows()
    for line, text in enumerate(read_text(path, what).split("\n"), 1):
        if not text.strip():
            rows.num_blank += bool(text.strip("\r"))
            continue
        place = f"{path.name}:{line}"
        row = parse_json(text, path, line)
        if not isinstance(row, dict):
            fail(
                f"{place}: column 1: {json_kind(row)} where one JSON object per line is expected; "
                f"correct {path}"
            )
        rows.append((place, row))
    return rows


def is_jsonl(text: str) -> bool:
    """Whether the first of several lines is JSON for itself."""
    first, _, more = text.strip().partition("\n")
    with contextlib.suppress(ValueError, RecursionError):
        return bool(more) and isinstance(json.loads(first), dict)
    return False


def read_json_items(
    path: Path,
    what: str,
    id_key: str,
    lists_of: Callable[[Path, dict[str, Any]], Rows | None] = lambda *_: None,
) -> Rows:
    """A JSON list of objects, or an object of objects by id, which becomes their `id_key`.

    JSON lines under the name of JSON, too. Places are indices or ids (`jq '.[16]'`): the file may
    be one huge line. `lists_of`: finds the rows of an object that is neither.
    """
    text = read_text(path, what)
    if is_jsonl(text):
        return read_jsonl(path, what)
    content = parse_json(text, path, 1)
    if not isinstance(content, (list, dict)):
        fail(
            f"{path.name}:1: column 1: {json_kind(content)} "
            f"where a JSON list or object of questions is expected; correct {path}"
        )
    if not content:
        found = f"is {json_kind(content)} without entries"
        fail(f"{path}: {found}; {what} should be there: fetch it again")
    rows = lists_of(path, content) if isinstance(content, dict) else None
    return objects_of(path, content, id_key) if rows is None else rows


def objects_of(path: Path, content: list[Any] | dict[str, Any], id_key: str = "") -> Rows:
    """The objects of a JSON list, or of an object that holds them by id. Raises UserError."""
    items = enumerate(content) if isinstance(content, list) else content.items()
    rows, bad = Rows(), []
    for key, item in items:
        place = f"{path.name}[{show(key)}]"
        if not isinstance(item, dict):
            bad.append(f"{place}: {json_kind(item)} where an object is expected")
        elif isinstance(content, list):
            rows.append((place, item))
        elif str(item.get(id_key, key)).strip() != str(key).strip():
            bad.append(f"{place}: '{id_key}' is {show(item[id_key])}, unlike the key")
        else:
            rows.append((place, {id_key: key, **item}))
    refuse(path, bad, len(content))
    return rows


# ---- fields of a row
# -------------------------------------------------------------------------------


def plain(text: str) -> str:
    """Without what a writer changes without thought: case, blanks, the full stop at the end."""
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def field(row: Row, key: str) -> Any:
    if key not in row:
        raise RowError(f"'{key}' is missing (has: {shown(list(row))})")
    return row[key]


def text_field(row: Row, key: str) -> str:
    """A text, verbatim."""
    value = field(row, key)
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {show(value)}, not a text")
    # JSON escapes can spell both of these; no tokenizer takes them.
    if re.search("[\0\ud800-\udfff]", value):
        raise RowError(f"'{key}' holds a NUL or half a character: {show(value)}")
    return value


def question_field(row: Row, key: str) -> str:
    """A text that is not blank, verbatim."""
    value = text_field(row, key)
    if not value.strip():
        raise RowError(f"'{key}' is empty")
    return value


def id_field(row: Row, key: str) -> str:
    """An id as text, without blanks around it; 007 stays 007, and 4010.0 of numbers is 4010."""
    value = field(row, key)
    if isinstance(value, float) and value.is_integer() and abs(value) < MAX_EXACT:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text_field(row, key).strip()
    if not name:
        raise RowError(f"'{key}' is empty")
    return name


def strip_ids(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file holds by id, with stripped ids (see `id_field`)."""
    stripped = {name.strip(): value for name, value in entries.items()}
    if len(stripped) < len(entries):
        counts = Counter(name.strip() for name in entries)
        most_frequent = max(counts, key=lambda name: counts[name])
        fail(
            f"{path}: two entries are called {show(most_frequent)} "
            "but for blanks around it; keep one"
        )
    return stripped


def type_field(row: Row, key: str) -> str:
    """What the question is grouped by. The field may be missing or empty."""
    if row.get(key) is None:
        return UNKNOWN
    return text_field(row, key).strip() or UNKNOWN


def seconds_field(row: Row, key: str) -> float:
    """A time, as a number or as its text."""
    value = field(row, key)
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RowError(f"'{key}' is {show(value)}, not a time in seconds")
    return seconds


def answer_field(row: Row, key: str, num_options: int, split: str) -> int | None:
    """The right option's index. Test questions may lack it: no such field, an empty one, or -1."""
    text = "" if row.get(key) is None else str(row[key]).strip()
    allowed = [str(i) for i in range(num_options)]
    if text in allowed:
        return int(text)
    if split == "test" and text in ("", "-1"):
        return None
    found = show(row[key]) if key in row else "missing"
    raise RowError(f"'{key}' is {found}, not one of {', '.join(allowed)}")


def refuse_further_options(row: Row, options: Sequence[str]) -> None:
    """Raise RowError for an option that the format does not have: it must not be dropped."""
    for name in row:
        if name[:1] == "a" and name[1:].isdecimal() and name not in options:
            raise RowError(
                f"column {show(name)}: this format has the options {', '.join(options)}; "
                "a table in a folder of another name may have 2 to 26 (--dataset NAME)"
            )


# ---- questions
# -------------------------------------------------------------------------------------


def questions_from(path: Path, rows: Rows, make: Callable[[int, str, Row], Question]) -> Questions:
    """A `Question` per row by `make(index, place, row)`, which raises RowError for a bad one.

    All bad rows are counted before this raises UserError. Questions must be unique, and all or
    none of them answered.
    """
    questions, bad = Questions(), []
    questions.num_blank_rows, questions.notes = rows.num_blank, rows.notes
    for index, (place, row) in enumerate(rows):
        try:
            questions.append(make(index, place, row))
        except RowError as problem:
            bad.append(f"{place}: {problem}")
    refuse(path, bad, len(rows))
    refuse(path, _repeated(questions), len(rows))
    unanswered = [q for q in questions if q.answer is None]
    if 0 < len(unanswered) < len(questions):
        fail(
            f"{unanswered[0].place}: {len(unanswered)} of {len(questions)} questions "
            "have no answer and the others have one; "
            f"give every question of {path} an answer, or none"
        )
    return questions


def _repeated(questions: Sequence[Question]) -> list[str]:
    """A message for each question that has the video and qid of an earlier one."""
    first_places: dict[tuple[str, str], str] = {}
    messages = []
    for q in questions:
        first_place = first_places.setdefault((q.video, q.qid), q.place)
        if first_place != q.place:
            messages.append(
                f"{q.place}: video {show(q.video)} qid {show(q.qid)} is already at "
                f"{first_place} and would count twice"
            )
    return messages
