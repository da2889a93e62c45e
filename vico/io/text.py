"""Reading text that a person or another program wrote: UTF-8 and strict JSON, or one line that says where it is not.

`json` takes NaN and repeated keys, and says neither the file nor what became of a failed download. Here such things are
refused with file, line and column.
"""

import codecs
import json
import re
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, fail, show
from vico.io.atomic import read_bytes
from vico.io.safe_load import disguise


def read_text(path: Path, what: str, error: type[UserError] = UserError) -> str:
    """The file as text, UTF-8 with or without a byte order mark. `what` says in messages what should be there."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        fail(f"{path}: no such file; {what} should be there", error)
    except (OSError, ValueError) as problem:
        fail(
            f"{path}: {what} cannot be read ({getattr(problem, 'strerror', None) or problem})",
            error,
        )
    if found := disguise(data[:512], len(data)):
        fail(f"{path}: {what} is {found}", error)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fail(
            f"{path}: is UTF-16 (byte offset 0 holds its mark), not UTF-8; save it as UTF-8", error
        )
    if (at := data.find(b"\0")) >= 0:
        guess = ", so this is UTF-16 or UTF-32" if at < 4 else ""
        fail(
            f"{path.name}:{_line(data, at)}: a NUL byte at offset {at}{guess}; save {path} as UTF-8 text or fetch it again",
            error,
        )
    mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
    try:
        text = data[mark:].decode("utf-8")
    except UnicodeDecodeError as problem:
        at = mark + problem.start
        fail(
            f"{path.name}:{_line(data, at)}: not UTF-8 (byte 0x{data[at]:02x} at offset {at}); save {path} as UTF-8",
            error,
        )
    if not text.strip():
        fail(f"{path}: is empty; {what} should be there: fetch it again", error)
    return text


def _line(data: bytes, at: int) -> int:
    return data.count(b"\n", 0, at) + 1


def read_json_object(path: Path, what: str, error: type[UserError] = UserError) -> dict[str, Any]:
    return as_object(parse_json(read_text(path, what, error), path, 1, error), path, error)


def as_object(value: object, path: Path, error: type[UserError] = UserError) -> dict[str, Any]:
    """`value`, which is all of `path`, if it is a JSON object."""
    if not isinstance(value, dict):
        fail(
            f"{path.name}:1: column 1: {json_kind(value)} where a JSON object is expected; correct {path}",
            error,
        )
    return value


def json_kind(value: object) -> str:
    return {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a truth value",
        type(None): "null",
    }.get(type(value), "a number")


class _Refused(ValueError):
    """JSON that Python's parser would take, and that is ambiguous or no JSON."""


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise _Refused
    return found


def parse_json(text: str, path: Path, first_line: int, error: type[UserError] = UserError) -> Any:
    """JSON whose text begins on `first_line` of `path`."""
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as problem:
        at, fault = problem.pos, problem.msg
        if not text[at:].strip() or fault.startswith("Unterminated string"):
            fault += ", the text is cut off here"
    except _Refused:
        at, fault = _find_refused(text)
    except (
        ValueError,
        RecursionError,
    ) as problem:  # a number of thousands of digits, thousands of brackets
        at, fault = 0, str(problem)
    line = first_line + text.count("\n", 0, at)
    fail(
        f"{path.name}:{line}: column {at - text.rfind(chr(10), 0, at)}: {fault}; correct {path} or fetch it again",
        error,
    )


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
