"""Strict reading of UTF-8 text and JSON.

Python's json accepts NaN and repeated keys, and its errors do not name the file. Here every fault
is one line that names the file, the line and, for JSON, the column.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from vico.errors import UserError, fail, show
from vico.io.paths import read_bytes
from vico.io.safe_load import failed_download

T = TypeVar("T")

_TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[][{}]|-?Infinity|NaN')
_COLON = re.compile(r"\s*:")
_FORMATS = {
    b"\x1f\x8b": "gzip-compressed",
    b"BZh": "bzip2-compressed",
    b"\xfd7zXZ\x00": "xz-compressed",
    b"\x28\xb5\x2f\xfd": "zstd-compressed",
    b"PK\x03\x04": "a zip or workbook archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook",
    b"PAR1": "a parquet file",
    b"\x89HDF": "an HDF5 file",
    b"SQLite format 3": "an SQLite database",
    b"%PDF": "a PDF document",
}
_KINDS: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    type(None): "null",
}


def read_text(path: Path, what: str, error: type[UserError] = UserError) -> str:
    """The file as text, UTF-8 with or without a byte order mark. Raises `error`.

    `what` describes the expected content in messages.
    """
    data = _read_bytes(path, what, error)
    if description := failed_download(data, len(data)) or _other_format(data):
        fail(f"{path}: {what} is {description}", error)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        reason = "is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8"
        fail(f"{path}: {reason}", error)
    offset = data.find(b"\0")
    if offset >= 0:
        guess = ", so this is UTF-16 or UTF-32" if offset < 4 else ""
        fail(
            f"{path.name}:{_line_number(data, offset)}: a NUL byte at offset {offset}{guess}; "
            f"save {path} as UTF-8 text or fetch it again",
            error,
        )
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as problem:
        offset = mark + problem.start
        fail(
            f"{path.name}:{_line_number(data, offset)}: not UTF-8 "
            f"(byte 0x{data[offset]:02x} at offset {offset}); save {path} as UTF-8",
            error,
        )
    if not text.strip():
        fail(f"{path}: is empty; {what} should be there: fetch it again", error)
    return text


def _other_format(data: bytes) -> str | None:
    """What a file is that is no text, and what to do; None: no known kind."""
    for start, kind in _FORMATS.items():
        if not data.startswith(start):
            continue
        if start == b"PK\x03\x04" and b"xl/" in data:
            kind = "an Excel workbook"
        remedy = (
            "unpack it" if kind.endswith(("archive", "compressed")) else "save it as UTF-8 text"
        )
        return f"{kind} ({len(data):,} bytes), not text; {remedy}"
    return None


def _read_bytes(path: Path, what: str, error: type[UserError]) -> bytes:
    try:
        return read_bytes(path)
    except FileNotFoundError:
        fail(f"{path}: no such file; {what} should be there", error)
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        fail(f"{path}: {what} cannot be read ({reason})", error)


def _line_number(data: bytes, offset: int) -> int:
    return data.count(b"\n", 0, offset) + 1


def read_json_object(path: Path, what: str, error: type[UserError] = UserError) -> dict[str, Any]:
    """The file's JSON object; `what` describes it in messages. Raises `error`."""
    text = read_text(path, what, error)
    return as_object(parse_json(text, path, 1, error), path, error)


def read_json_lines(
    path: Path, what: str, parse: Callable[[str, int], T]
) -> tuple[list[T], list[UserError]]:
    """What `parse` makes of each line and its number, and an error for each that it refuses.

    Blank lines are passed over. Raises UserError where the file is no text at all.
    """
    records, faults = list[T](), list[UserError]()
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        if line.strip():
            try:
                records.append(parse(line, number))
            except UserError as error:
                faults.append(error)
    return records, faults


def as_object(value: object, path: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """`value`, the whole content of `path`, if it is a JSON object. Raises `error`."""
    if not isinstance(value, dict):
        fail(
            f"{path.name}:1: column 1: {json_kind(value)} where a JSON object is expected; "
            f"correct {path}",
            error,
        )
    return value


def json_kind(value: object) -> str:
    """What a parsed JSON value is, for messages: "a list", "null"."""
    return _KINDS.get(type(value), "a number")


class _RejectedError(ValueError):
    """JSON that Python's parser accepts although it is ambiguous or not JSON."""


def _reject_constant(name: str) -> NoReturn:
    raise _RejectedError


def _require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        raise _RejectedError
    return unique


def parse_json(text: str, path: Path, first_line: int, error: type[UserError] = UserError) -> Any:
    """The value of JSON text that begins on line `first_line` of `path`. Raises `error`."""
    try:
        return json.loads(
            text, parse_constant=_reject_constant, object_pairs_hook=_require_unique_keys
        )
    except json.JSONDecodeError as problem:
        offset, fault = problem.pos, problem.msg
        if not text[offset:].strip() or fault.startswith("Unterminated string"):
            fault += ", the text is cut off here"
    except _RejectedError:
        offset, fault = _find_rejected(text)
    except (ValueError, RecursionError) as problem:
        # A number of thousands of digits, or thousands of nested brackets.
        offset, fault = 0, str(problem)
    line = first_line + text.count("\n", 0, offset)
    column = offset - text.rfind("\n", 0, offset)
    fail(
        f"{path.name}:{line}: column {column}: {fault}; correct {path} or fetch it again",
        error,
    )


def _find_rejected(text: str) -> tuple[int, str]:
    """(offset, fault) of the first constant or repeated key: the parser's hooks get no offset."""
    keys: list[set[str]] = [set()]
    for token in _TOKEN.finditer(text):
        word = token[0]
        if word in "[{":
            keys.append(set())
        elif word in "]}":
            keys.pop()
        elif not word.startswith('"'):
            return token.start(), f"{word} is not JSON"
        elif _COLON.match(text, token.end()):
            key = json.loads(word)
            if key in keys[-1]:
                return token.start(), f"key {show(key)} appears twice in one object"
            keys[-1].add(key)
    raise AssertionError("the parser rejected the text, but no cause was found")


# ---- YAML
# -------------------------------------------------------------------------------------------

MAX_YAML_CHARACTERS = 1 << 15  # YAML is read at some 50,000 characters a second


def read_yaml_object(path: Path, what: str, place: str = "", unit: str = "key") -> dict[str, Any]:
    """The file's mapping. Raises UserError for all that YAML allows and nobody means.

    `what` describes the content in messages; `place` is what they begin with, if not `path`;
    `unit` is what they call a key.
    """
    import yaml  # few files need it

    place = place or str(path)
    text = read_text(path, what)
    if len(text) > MAX_YAML_CHARACTERS:
        fail(
            f"{place}: {len(text):,} characters, where at most {MAX_YAML_CHARACTERS:,} are "
            f"expected; keep the lines '{unit}: value' alone"
        )
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        fault = _yaml_fault(tree, unit)
        content = None if fault else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as problem:
        fail(f"{place}: not valid YAML: {' '.join(str(problem).split())}")
    if fault:
        fail(f"{place}: {fault}")
    if not isinstance(content, dict):
        fail(f"{place}: must hold lines '{unit}: value'")
    return content


def yaml_text(values: Mapping[str, Any], width: int | None = None) -> str:
    """`values` in their order, a key per line. What is read back is equal, whatever texts hold."""
    import yaml  # few files need it

    # PyYAML 6.0.3 reads U+0085 back as a blank, unless it is escaped.
    is_readable = "\\x85" not in repr(values)
    options = {"sort_keys": False, "allow_unicode": is_readable, "width": width}
    text: str = yaml.safe_dump(values, **options)
    return text


def _yaml_fault(tree: Any, unit: str) -> str | None:
    """A merge key, since merges of merges multiply; or a key that appears twice in a mapping.

    `tree`: of yaml.compose. Each node is visited once, however many aliases it has.
    """
    pending, visited = [tree], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in visited or not isinstance(getattr(node, "value", None), list):
            continue
        visited.add(id(node))
        keys = Counter[str]()
        for item in node.value:
            pair = item if isinstance(item, tuple) else (item,)
            if len(pair) == 2:
                if pair[0].tag == "tag:yaml.org,2002:merge":
                    return f"holds a merge ('<<'); write its {unit}s out"
                keys[str(pair[0].value)] += 1
            pending += pair
        for key, count in keys.items():
            if count > 1:
                return f"{show(key)} appears twice; keep one"
    return None
