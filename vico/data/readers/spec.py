"""dataset.yaml: what a data set's files do not say themselves."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vico.data.readers.answers import FORMS
from vico.errors import UserError, nearest, show
from vico.io.paths import exists
from vico.io.text import read_yaml_object

FILE_NAME = "dataset.yaml"
SPLITS = ("train", "val", "test")
FIELDS = (
    "video",
    "question",
    "options",
    "answer",
    "id",
    "type",
    "start",
    "end",
    "dialogue",
    "caption",
)


@dataclass(frozen=True)
class Spec:
    """Defaults: a folder without dataset.yaml."""

    path: Path
    # Field -> the file's column of it; of the options, a column for each or one that holds all.
    columns: Mapping[str, str | tuple[str, ...]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)  # split -> file name
    frames_per_second: float = 1.0  # of the features
    answer: str | None = None  # one of FORMS
    answer_base: int = 0  # the number of the first option
    groups: Mapping[str, str] | None = None  # type -> group
    mean_of: tuple[str, ...] = ()  # groups
    dialogue: bool | None = None  # None: where the first row has the field


def read(folder: Path) -> Spec:
    """Raises UserError that names the key."""
    path = folder / FILE_NAME
    if not exists(path):
        return Spec(path)
    content = read_yaml_object(path, "the description of the data set")
    checks: dict[str, Callable[[Any], Any]] = {
        "columns": _columns,
        "files": _files,
        "frames_per_second": _frames_per_second,
        "answer": _answer,
        "answer_base": _answer_base,
        "groups": _groups,
        "mean_of": _mean_of,
        "dialogue": _dialogue,
    }
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in checks:
            known = ", ".join(checks)
            raise UserError(f"{path}: unknown key {show(key)}{nearest(str(key), checks)}; {known}")
        try:
            values[key] = checks[key](value)
        except ValueError as problem:
            raise UserError(f"{path}: {key}: {problem}") from None
    groups = set((values.get("groups") or {}).values())
    if unknown := [name for name in values.get("mean_of", ()) if name not in groups]:
        raise UserError(f"{path}: mean_of: {show(unknown[0])} is none of the groups")
    return Spec(path, **values)


def _object(value: Any, of: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ValueError(f"{show(value)} is no list of lines '{of}'")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise ValueError(f"{show(value)} is no text; put it into quotes")
    return str(value).strip()


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{show(value)} is no list")
    return tuple(_text(item) for item in value)


def _known(names: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            hint = nearest(str(name), known)
            raise ValueError(f"{show(name)} is none of {', '.join(known)}{hint}")


def _columns(value: Any) -> dict[str, str | tuple[str, ...]]:
    columns = _object(value, "FIELD: COLUMN")
    _known(columns, FIELDS)
    names: dict[str, str | tuple[str, ...]] = {}
    for name, column in columns.items():
        is_several = name == "options" and isinstance(column, list)
        names[name] = _texts(column) if is_several else _text(column)
    return names


def _files(value: Any) -> dict[str, str]:
    files = _object(value, "SPLIT: FILE")
    _known(files, SPLITS)
    names = {split: _text(name) for split, name in files.items()}
    for name in names.values():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{show(name)} leads out of the data set's folder")
    return names


def _frames_per_second(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1e-3 <= value <= 1e3:
        raise ValueError(f"{show(value)} is no number from 0.001 to 1000")
    return float(value)


def _answer(value: Any) -> str:
    if value not in FORMS:
        raise ValueError(f"{show(value)} is none of {', '.join(FORMS)}")
    return str(value)


def _answer_base(value: Any) -> int:
    if isinstance(value, bool) or value not in (0, 1):
        raise ValueError(f"{show(value)} is neither 0 nor 1")
    return int(value)


def _groups(value: Any) -> dict[str, str]:
    groups: dict[str, str] = {}
    for group, types in _object(value, "GROUP: [TYPE, ...]").items():
        for name in _texts(types):
            if name in groups:
                raise ValueError(f"type {show(name)} is in two groups")
            groups[name] = _text(group)
    return groups


def _mean_of(value: Any) -> tuple[str, ...]:
    return _texts(value)


def _dialogue(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{show(value)} is neither true nor false")
    return value
