"""Rows of a table, whatever file holds them: JSON lines, CSV, JSON, parquet."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vico.data.readers import rows
from vico.data.readers.columns import ALIASES
from vico.data.readers.rows import Rows
from vico.errors import UserError, fail, show
from vico.io.paths import exists, open_to_read
from vico.io.text import parse_json

MAX_HEAD_BYTES = 1 << 20
ID_KEY = "id"  # of an object of objects by id
VIDEO_NAMES = ("video", *ALIASES["video"])


def _csv(path: Path, what: str) -> Rows:
    return rows.read_csv(path, what, (), {})


def _json(path: Path, what: str) -> Rows:
    return rows.read_json_items(path, what, ID_KEY, _in_lists)


def _in_lists(path: Path, content: dict[str, Any]) -> Rows | None:
    """The objects of the one list of a file ({"version": 1, "data": [...]}), or of a list for each
    video ({"v1": [...], "v2": [...]}). What else the file holds is noted.

    None: there are no lists. Raises UserError for several lists whose rows name a video.
    """
    lists = {key: value for key, value in content.items() if isinstance(value, list) and value}
    if not lists or any(isinstance(value, dict) for value in content.values()):
        return None
    records, names_video = Rows(), False
    for key, items in lists.items():
        for place, row in rows.objects_of(path, items):
            names_video |= any(name.strip().lower() in VIDEO_NAMES for name in row)
            by_video = {VIDEO_NAMES[0]: key, **row} if len(lists) > 1 else row
            records.append((f"{path.name}[{show(key)}]{place.removeprefix(path.name)}", by_video))
    shown = rows.shown(list(lists))
    if len(lists) > 1 and names_video:
        fail(
            f"{path}: holds {len(lists)} lists of rows that name their video, {shown}; write the "
            "one that is meant into a file of its own"
        )
    which = "a list for each video" if len(lists) > 1 else "the list"
    records.notes = (f"{path.name}: the rows are those of {which} {shown}",)
    if others := [key for key in content if key not in lists]:
        records.notes += (f"{path.name}: {len(others)} entries are not read: {rows.shown(others)}",)
    return records


def _parquet(path: Path, what: str) -> Rows:
    try:
        import pyarrow.lib  # an extra
        import pyarrow.parquet
    except ModuleNotFoundError:
        fail(
            f"{path}: parquet needs pyarrow: pip install -e '.[data]' (the extra 'data'), "
            "or save it as JSON lines"
        )
    try:
        with open_to_read(path) as file:
            content = pyarrow.parquet.read_table(file)
    except FileNotFoundError:
        fail(f"{path}: no such file; {what} should be there")
    except (OSError, ValueError, pyarrow.lib.ArrowException) as problem:
        reason = str(problem).strip().split("\n")[0]
        fail(f"{path}: {what} is no whole parquet file ({reason}); fetch or copy it again")
    names = content.column_names
    if len(set(names)) < len(names):
        fail(f"{path}: holds two columns of one name; rename or remove one")
    if not content.num_rows:
        fail(f"{path}: holds no rows; {what} should be there: fetch it again")
    records: list[dict[str, Any]] = content.to_pylist()
    return Rows((f"{path.name}[{i}]", record) for i, record in enumerate(records))


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".jsonl": rows.read_jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".json": _json,
    ".parquet": _parquet,
}


def find(folder: Path, split: str) -> Path:
    """The file of a split. SPLIT.jsonl where there is none.

    Raises UserError where there are several.
    """
    found = [path for suffix in READERS if exists(path := folder / f"{split}{suffix}")]
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        raise UserError(f"{folder}: holds {names}; keep one, or name it in dataset.yaml (files)")
    return found[0] if found else folder / f"{split}.jsonl"


def read(path: Path, what: str) -> Rows:
    """All rows. Raises UserError for a file with a fault, or of no kind that is read."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: must end with {', '.join(READERS)}; rename or convert it")
    return reader(path, what)


def first_names(path: Path) -> list[str]:
    """The columns of the first row, without reading the others of a CSV or of JSON lines.

    [] where they cannot be had at a glance.
    """
    if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
        return []
    with open_to_read(path) as file:
        head = file.read(MAX_HEAD_BYTES).decode("utf-8-sig", "replace").lstrip()
    line = head.partition("\n")[0]
    if path.suffix.lower() == ".jsonl":
        row = parse_json(line, path, 1)
        return list(row) if isinstance(row, dict) else []
    return next(csv.reader([line], delimiter=rows.delimiter_of(line)))
