"""Strict text tables: every row of an annotation file arrives verbatim, or the run ends with the file, line and remedy.

The usual readers change data in silence: pandas makes NaN of the option "None" and 7 of the id 007 and shifts all
columns after one field too many; `json` takes NaN and repeated keys. Here such things are kept as text or refused.
"""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, one_line
from vico.records import Question
from vico.safeload import disguise

Row = Mapping[str, Any]
Rows = list[tuple[str, Row]]  # (place such as "val.csv:17", the row's fields)

UNKNOWN = "(unknown)"  # the type of questions whose file states none, and the group of types nobody knows
NUM_SHOWN = 3  # examples in a message


class BadRow(ValueError):
    """What is wrong with one row; whoever walks the rows adds the place."""


def show(value: object) -> str:
    """A value from a file, quoted, escaped and short enough for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fail(message: str) -> NoReturn:
    raise UserError(one_line(message))


def refuse(path: Path, bad: Sequence[str], total: int, remedy: str = "") -> None:
    """End with one line when there are bad rows: how many, and the first few."""
    if not bad:
        return
    remedy = remedy or f"correct {path} or fetch it again"
    if len(bad) == 1:
        fail(f"{bad[0]}; {remedy}")
    more = "; ..." if len(bad) > NUM_SHOWN else ""
    fail(f"{path.name}: {len(bad)} of {total} rows are bad: {'; '.join(bad[:NUM_SHOWN])}{more}; {remedy}")


# ---- files -----------------------------------------------------------------------------------------------------------


def read_text(path: Path, what: str) -> str:
    """The file as text, UTF-8 with or without a byte order mark. `what` says in messages what should be there."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        fail(f"{path}: no such file; {what} should be there")
    except (OSError, ValueError) as problem:
        fail(f"{path}: {what} cannot be read ({getattr(problem, 'strerror', None) or problem})")
    if found := disguise(data[:512], len(data)):
        fail(f"{path}: {what} is {found}")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fail(f"{path}: is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8")
    if (at := data.find(b"\0")) >= 0:
        guess = ", so this is UTF-16 or UTF-32" if at < 4 else ""
        fail(f"{path.name}:{_line(data, at)}: a NUL byte at offset {at}{guess}; save {path} as UTF-8 text or fetch it again")
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as problem:
        at = mark + problem.start
        fail(f"{path.name}:{_line(data, at)}: not UTF-8 (byte 0x{data[at]:02x} at offset {at}); save {path} as UTF-8")
    if not text.strip():
        fail(f"{path}: is empty; {what} should be there: fetch it again")
    return text


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def read_csv(path: Path, what: str, required: Sequence[str], aliases: Mapping[str, str]) -> Rows:
    """All rows, fields verbatim, with the physical line each begins on. `aliases`: other names of required columns."""
    text = read_text(path, what)
    if text.partition("\n")[0].endswith("\r"):  # line ends inside quotes were converted along with the others
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
        fault = "a quote that opens in this row is never closed" if never else f"broken quotes in this row ({problem})"
        fail(f"{path.name}:{line}: {fault}; correct {path} or fetch it again")
    header_line, header = records[0][0], [name.strip() for name in records[0][1]]
    header = [aliases[name] if name in aliases and aliases[name] not in header else name for name in header]
    _check_header(f"{path.name}:{header_line}", header, required, path)
    if len(records) == 1:
        fail(f"{path}: holds a header and no rows; fetch it again")
    rows: Rows = []
    bad = []
    unended = None if text.endswith(("\n", "\r")) else records[-1][0]  # the line that a cut-off copy would have lost the rest of
    for line, fields in records[1:]:
        count = f"{len(fields)} fields, header has {len(header)}"
        if line == unended and (len(fields) < len(header) or (header[-1] in required and not fields[-1])):
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
        fail(f"{place}: column{'s' if len(missing) > 1 else ''} {names} missing ({has}); add what is missing to {path}")
    if twice := sorted({name for name in header if name and header.count(name) > 1}):
        fail(f"{place}: column {show(twice[0])} stands there twice ({has}); rename or remove one in {path}")


def read_jsonl(path: Path, what: str) -> Rows:
    """One JSON object per line."""
    rows: Rows = []
    for line, text in enumerate(read_text(path, what).split("\n"), 1):
        if not text.strip():
            continue
        row = _parse(text, path, line)
        if not isinstance(row, dict):
            fail(f"{path.name}:{line}: column 1: {_kind(row)} where one JSON object per line is expected; correct {path}")
        rows.append((f"{path.name}:{line}", row))
    return rows


def read_json_list(path: Path, what: str) -> Rows:
    """A JSON list of objects; the place is the item's index, as in `jq '.[16]'`, for such files may be one huge line."""
    items = _parse(read_text(path, what), path, 1)
    if not isinstance(items, list):
        fail(f"{path.name}:1: column 1: {_kind(items)} where a JSON list of questions is expected; correct {path}")
    if not items:
        fail(f"{path}: is an empty list; {what} should be there: fetch it again")
    bad = [f"{path.name}[{i}]: {_kind(item)} where an object is expected" for i, item in enumerate(items) if not isinstance(item, dict)]
    refuse(path, bad, len(items))
    return [(f"{path.name}[{i}]", item) for i, item in enumerate(items)]


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    value = _parse(read_text(path, what), path, 1)
    if not isinstance(value, dict):
        fail(f"{path.name}:1: column 1: {_kind(value)} where a JSON object is expected; correct {path}")
    return value


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}.get(type(value), "a number")


class _Refused(ValueError):
    """JSON that Python's parser would take, and that is ambiguous or no JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused
    return found


def _parse(text: str, path: Path, first_line: int) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as problem:
        at, fault = problem.pos, problem.msg
        if not text[at:].strip() or fault.startswith("Unterminated string"):
            fault += ", the text is cut off here"
    except _Refused:
        at, fault = _find_refused(text)
    except (ValueError, RecursionError) as problem:  # a number of thousands of digits, thousands of brackets
        at, fault = 0, str(problem)
    line = first_line + text.count("\n", 0, at)
    fail(f"{path.name}:{line}: column {at - text.rfind(chr(10), 0, at)}: {fault}; correct {path} or fetch it again")


def _find_refused(text: str) -> tuple[int, str]:
    """Where the refused constant or the repeated key stands: the parser's hooks are not told."""
    keys: list[set[str]] = [set()]
    for token in re.finditer(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]|-?Infinity|NaN', text):
        word = token[0]
        if word in "[{":
            keys.append(set())
        elif word in "]}":
            keys.pop()
        elif not word.startswith('"'):
            return token.start(), f"{word} is not JSON"
        elif re.compile(r"\s*:").match(text, token.end()):
            key = json.loads(word)
            if key in keys[-1]:
                return token.start(), f"key {show(key)} stands twice in one object"
            keys[-1].add(key)
    raise AssertionError("the parser refused what cannot be found")


# ---- rows ------------------------------------------------------------------------------------------------------------


def field(row: Row, key: str) -> Any:
    if key not in row:
        raise BadRow(f"'{key}' is missing (has: {', '.join(show(name) for name in list(row)[:20])})")
    return row[key]


def text_field(row: Row, key: str) -> str:
    """A text, verbatim."""
    value = field(row, key)
    if not isinstance(value, str):
        raise BadRow(f"'{key}' is {show(value)}, not a text")
    if re.search("[\0\ud800-\udfff]", value):  # JSON escapes can spell both; no tokenizer takes them
        raise BadRow(f"'{key}' holds a NUL or half a character: {show(value)}")
    return value


def question_field(row: Row, key: str) -> str:
    value = text_field(row, key)
    if not value.strip():
        raise BadRow(f"'{key}' is empty")
    return value


def id_field(row: Row, key: str) -> str:
    """An id as text, without blanks around it; 007 stays 007."""
    value = field(row, key)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    name = text_field(row, key).strip()
    if not name:
        raise BadRow(f"'{key}' is empty")
    return name


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
    raise BadRow(f"'{key}' is {show(row[key]) if key in row else 'missing'}, not one of {', '.join(allowed)}")


def questions_from(path: Path, rows: Rows, make: Callable[[int, str, Row], Question]) -> list[Question]:
    """A `Question` per row by `make(index, place, row)`; all bad rows are counted before the run ends."""
    questions, bad = [], []
    for index, (place, row) in enumerate(rows):
        try:
            questions.append(make(index, place, row))
        except BadRow as problem:
            bad.append(f"{place}: {problem}")
    refuse(path, bad, len(rows))
    first: dict[tuple[str, str], str] = {}
    for q in questions:
        if (earlier := first.setdefault((q.video, q.qid), q.place)) != q.place:
            bad.append(f"{q.place}: video {show(q.video)} qid {show(q.qid)} stands already at {earlier} and would count twice")
    refuse(path, bad, len(rows))
    unanswered = [q for q in questions if q.answer is None]
    if 0 < len(unanswered) < len(questions):
        fail(
            f"{unanswered[0].place}: {len(unanswered)} of {len(questions)} questions have no answer and the others have one; "
            f"give every question of {path} an answer, or none"
        )
    return questions
