"""Strict text tables: every row of an annotation file arrives verbatim, or the run ends with the file, line and remedy.

The usual readers change data in silence: pandas makes NaN of the option "None" and 7 of the id 007 and shifts all
columns after one field too many; `json` takes NaN and repeated keys. Here such things are kept as text or refused.
"""

import csv
import io
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vico.data.types import Question
from vico.errors import fail, show
from vico.io.text import json_kind, parse_json, read_text

Row = Mapping[str, Any]
Rows = list[tuple[str, Row]]  # (place such as "val.csv:17", the row's fields)

UNKNOWN = (
    "(unknown)"  # the type of questions whose file states none, and the group of types nobody knows
)
NUM_SHOWN = 3  # examples in a message


class RowError(ValueError):
    """What is wrong with one row; whoever walks the rows adds the place."""


def refuse(path: Path, bad: Sequence[str], total: int, remedy: str = "") -> None:
    """End with one line when there are bad rows: how many, and the first few."""
    if not bad:
        return
    remedy = remedy or f"correct {path} or fetch it again"
    if len(bad) == 1:
        fail(f"{bad[0]}; {remedy}")
    more = "; ..." if len(bad) > NUM_SHOWN else ""
    fail(
        f"{path.name}: {len(bad)} of {total} rows are bad: {'; '.join(bad[:NUM_SHOWN])}{more}; {remedy}"
    )


# ---- files -----------------------------------------------------------------------------------------------------------


def read_csv(path: Path, what: str, required: Sequence[str], aliases: Mapping[str, str]) -> Rows:
    """All rows, fields verbatim, with the physical line each begins on. `aliases`: other names of required columns."""
    text = read_text(path, what)
    if text.partition("\n")[0].endswith(
        "\r"
    ):  # line ends inside quotes were converted along with the others
        text = text.replace("\r\n", "\n")
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records: list[tuple[int, list[str]]] = []
    line = 1  # where the record being read begins; the reader's own count is where it ends
    try:
        for fields in reader:
            if any(field.strip() for field in fields):
                records.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as problem:
        never = "unexpected end" in str(problem) or "field limit" in str(problem)
        fault = (
            "a quote that opens in this row is never closed"
            if never
            else f"broken quotes in this row ({problem})"
        )
        fail(f"{path.name}:{line}: {fault}; correct {path} or fetch it again")
    header_line, header = records[0][0], [name.strip() for name in records[0][1]]
    header = [
        aliases[name] if name in aliases and aliases[name] not in header else name
        for name in header
    ]
    _check_header(f"{path.name}:{header_line}", header, required, path)
    if len(records) == 1:
        fail(f"{path}: holds a header and no rows; fetch it again")
    rows: Rows = []
    bad = []
    unended = (
        None if text.endswith(("\n", "\r")) else records[-1][0]
    )  # the line that a cut-off copy would have lost the rest of
    for line, fields in records[1:]:
        count = f"{len(fields)} fields, header has {len(header)}"
        if line == unended and (
            len(fields) < len(header) or (header[-1] in required and not fields[-1])
        ):
            bad.append(f"{path.name}:{line}: the last line is cut off ({count})")
        elif len(fields) != len(header):
            bad.append(f"{path.name}:{line}: {count}")
        rows.append((f"{path.name}:{line}", dict(zip(header, fields, strict=False))))
    refuse(path, bad, len(rows))
    return rows


def _check_header(place: str, header: Sequence[str], required: Sequence[str], path: Path) -> None:
    has = f"has: {', '.join(show(name) for name in header[:20])}"
    if missing := [name for name in required if name not in header]:
        names = ", ".join(f"'{name}'" for name in missing)
        fail(
            f"{place}: column{'s' if len(missing) > 1 else ''} {names} missing ({has}); add what is missing to {path}"
        )
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        fail(
            f"{place}: column {show(twice[0])} stands there twice ({has}); rename or remove one in {path}"
        )


def read_jsonl(path: Path, what: str) -> Rows:
    """One JSON object per line."""
    rows: Rows = []
    for line, text in enumerate(read_text(path, what).split("\n"), 1):
        if not text.strip():
            continue
        row = parse_json(text, path, line)
        if not isinstance(row, dict):
            fail(
                f"{path.name}:{line}: column 1: {json_kind(row)} where one JSON object per line is expected; correct {path}"
            )
        rows.append((f"{path.name}:{line}", row))
    return rows


def read_json_list(path: Path, what: str) -> Rows:
    """A JSON list of objects; the place is the item's index, as in `jq '.[16]'`, for such files may be one huge line."""
    items = parse_json(read_text(path, what), path, 1)
    if not isinstance(items, list):
        fail(
            f"{path.name}:1: column 1: {json_kind(items)} where a JSON list of questions is expected; correct {path}"
        )
    if not items:
        fail(f"{path}: is an empty list; {what} should be there: fetch it again")
    bad = [
        f"{path.name}[{i}]: {json_kind(item)} where an object is expected"
        for i, item in enumerate(items)
        if not isinstance(item, dict)
    ]
    refuse(path, bad, len(items))
    return [(f"{path.name}[{i}]", item) for i, item in enumerate(items)]


# ---- rows ------------------------------------------------------------------------------------------------------------


def field(row: Row, key: str) -> Any:
    if key not in row:
        raise RowError(
            f"'{key}' is missing (has: {', '.join(show(name) for name in list(row)[:20])})"
        )
    return row[key]


def text_field(row: Row, key: str) -> str:
    """A text, verbatim."""
    value = field(row, key)
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {show(value)}, not a text")
    if re.search(
        "[\0\ud800-\udfff]", value
    ):  # JSON escapes can spell both; no tokenizer takes them
        raise RowError(f"'{key}' holds a NUL or half a character: {show(value)}")
    return value


def question_field(row: Row, key: str) -> str:
    value = text_field(row, key)
    if not value.strip():
        raise RowError(f"'{key}' is empty")
    return value


def id_field(row: Row, key: str) -> str:
    """An id as text, without blanks around it; 007 stays 007."""
    value = field(row, key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text_field(row, key).strip()
    if not name:
        raise RowError(f"'{key}' is empty")
    return name


def strip_ids(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What a file holds by id, the ids without blanks around them, as those of the questions are."""
    found = {name.strip(): value for name, value in entries.items()}
    if len(found) < len(entries):
        times = Counter(name.strip() for name in entries)
        fail(
            f"{path}: two entries are called {show(max(times, key=lambda name: times[name]))} but for blanks around it; keep one"
        )
    return found


def type_field(row: Row, key: str) -> str:
    """What the question is grouped by; files that say nothing are legal."""
    return UNKNOWN if row.get(key) is None else text_field(row, key).strip() or UNKNOWN


def answer_field(row: Row, key: str, num_options: int, split: str) -> int | None:
    """The right option's index, which only test questions may lack (no such field, an empty one, or -1)."""
    text = "" if row.get(key) is None else str(row[key]).strip()
    allowed = [str(i) for i in range(num_options)]
    if text in allowed:
        return int(text)
    if split == "test" and text in ("", "-1"):
        return None
    raise RowError(
        f"'{key}' is {show(row[key]) if key in row else 'missing'}, not one of {', '.join(allowed)}"
    )


def questions_from(
    path: Path, rows: Rows, make: Callable[[int, str, Row], Question]
) -> list[Question]:
    """A `Question` per row by `make(index, place, row)`; all bad rows are counted before the run ends."""
    questions, bad = [], []
    for index, (place, row) in enumerate(rows):
        try:
            questions.append(make(index, place, row))
        except RowError as problem:
            bad.append(f"{place}: {problem}")
    refuse(path, bad, len(rows))
    first: dict[tuple[str, str], str] = {}
    for q in questions:
        if (earlier := first.setdefault((q.video, q.qid), q.place)) != q.place:
            bad.append(
                f"{q.place}: video {show(q.video)} qid {show(q.qid)} stands already at {earlier} and would count twice"
            )
    refuse(path, bad, len(rows))
    unanswered = [q for q in questions if q.answer is None]
    if 0 < len(unanswered) < len(questions):
        fail(
            f"{unanswered[0].place}: {len(unanswered)} of {len(questions)} questions have no answer and the others have one; "
            f"give every question of {path} an answer, or none"
        )
    return questions
