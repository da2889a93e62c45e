"""Reads what ranks tell each other through the store.

Between hosts the store's port is open to the network, without a password. So a word from it is read
like a file of unknown origin: whatever it holds, it becomes the expected record or nothing.
"""

import json
import typing
from dataclasses import fields
from typing import Any, TypeVar

MAX_WORD_BYTES = 1 << 16
MAX_NUMBER = 1 << 63
Record = TypeVar("Record")


def read_word(kind: type[Record], word: bytes | str) -> Record | None:
    """The record of this dataclass that a word holds as JSON; None where it holds anything else.

    Fields are of plain types. Numbers must not be negative, huge or NaN, texts must be
    printable. A dataclass refuses more by a ValueError in its __post_init__.
    """
    if len(word) > MAX_WORD_BYTES:
        return None
    try:
        values = json.loads(word)
        if not isinstance(values, dict):
            return None
        types = typing.get_type_hints(kind)
        names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
        if values.keys() != names or not all(_is_of(values[name], types[name]) for name in names):
            return None
        return kind(**values)
    except (ValueError, RecursionError):  # of json.loads or of the dataclass
        return None


def _is_of(value: Any, expected: Any) -> bool:
    if type(value) not in (typing.get_args(expected) or (expected,)):
        return False
    if isinstance(value, str):
        return value.isprintable()
    if isinstance(value, int | float):
        return 0 <= value < MAX_NUMBER
    return True
