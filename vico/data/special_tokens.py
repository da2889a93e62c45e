"""The begin and end tokens of a tokenizer.json, by the files beside it, else by known names."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vico.errors import UserError, show
from vico.io.paths import exists
from vico.io.text import read_json_object

# In the order in which they are asked. The first two name a token, the others its id.
NAMING = ("tokenizer_config.json", "special_tokens_map.json")
NUMBERING = ("config.json", "generation_config.json")
FILE_NAMES = NAMING + NUMBERING
KNOWN_NAMES = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
FindId = Callable[[str], int | None]


@dataclass(frozen=True)
class SpecialIds:
    """Ids of BOS and EOS; -1: there is none."""

    bos: int
    eos: int


def by_known_names(find_id: FindId) -> SpecialIds:
    """The first pair of names that the vocabulary holds."""
    for begin, end in KNOWN_NAMES:
        bos, eos = find_id(begin), find_id(end)
        if bos is not None and eos is not None:
            return SpecialIds(bos, eos)
    return SpecialIds(-1, -1)


def by_files(folder: Path, num_ids: int, find_id: FindId) -> SpecialIds:
    """Each by the first file in `folder` that says it, else as `by_known_names`.

    `num_ids`: of the tokenizer. Raises UserError for a file that names none of its tokens.
    """
    known = by_known_names(find_id)
    bos = _by_files(folder, "bos_token", num_ids, find_id)
    eos = _by_files(folder, "eos_token", num_ids, find_id)
    return SpecialIds(known.bos if bos is None else bos, known.eos if eos is None else eos)


def _by_files(folder: Path, key: str, num_ids: int, find_id: FindId) -> int | None:
    for name in FILE_NAMES:
        if exists(folder / name):
            content = read_json_object(folder / name, "the file beside tokenizer.json")
            if name in NAMING:
                found = _named(content.get(key), key, folder / name, find_id)
            else:
                found = _numbered(content.get(f"{key}_id"), f"{key}_id", folder / name, num_ids)
            if found is not None:
                return found
    return None


def _named(value: Any, key: str, path: Path, find_id: FindId) -> int | None:
    """`value`: a text, or an object with it in `content`. Absent, null and "" say nothing."""
    text = value.get("content") if isinstance(value, dict) else value
    if text is None or text == "":
        return None
    found = find_id(text) if isinstance(text, str) else None
    if found is None:
        raise UserError(
            f"{path}: '{key}' is {show(text)}, which is no piece of tokenizer.json beside it; "
            "both must be of one model, copy them again"
        )
    return found


def _numbered(value: Any, key: str, path: Path, num_ids: int) -> int | None:
    """`value`: a number, or a list of several of which the first is taken."""
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_ids:
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be an id of the tokenizer.json beside it, "
            f"from 0 to {num_ids - 1}; both must be of one model, copy them again"
        )
    return value
