"""Which column of a table is which field of a question."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vico.data.readers.rows import RowError
from vico.data.readers.spec import FIELDS, Spec
from vico.errors import show

# Other names of a field, without case, with "_" for blanks and hyphens.
ALIASES = {
    "video": ("video_id", "vid", "vid_name", "video_name", "video_path"),
    "question": ("q",),
    "options": ("choices", "candidates"),
    "answer": ("answer_idx", "answer_index", "correct_answer"),
    "id": ("qid", "question_id"),
    "type": ("question_type", "category"),
    "start": ("start_time",),
    "end": ("end_time",),
    "dialogue": ("subtitles",),
}
# Columns of one option each: a0, option_1, choice_B, or b alone.
_NUMBERED = re.compile(r"(a|opt|option|choice|candidate)_?([0-9]{1,2})")
_LETTERED = re.compile(r"(?:(opt|option|choice|candidate)_?)?([a-z])")


@dataclass(frozen=True)
class Columns:
    """The columns of rows that have the same."""

    of: dict[str, str]  # field -> column; without the options where `options` names them
    options: tuple[str, ...]  # a column for each
    unread: tuple[str, ...]

    def describe(self) -> str:
        """Which fields were found under another name."""
        other = [f"{field} in {show(column)}" for field, column in self.of.items()]
        if self.options:
            other.append(f"options in {show(self.options[0])} to {show(self.options[-1])}")
        return ", ".join(other)


def find(names: Sequence[str], spec: Spec) -> Columns:
    """Raises RowError where a column is missing or could be two fields."""
    stated = {name: column for name, column in spec.columns.items() if isinstance(column, str)}
    of = {name: column for name, column in stated.items() if column in names}
    option_columns = spec.columns.get("options", ())
    options = option_columns if isinstance(option_columns, tuple) else ()
    taken = {*stated.values(), *options}
    plain = {name: re.sub(r"[\s-]+", "_", name.strip().lower()) for name in names}
    free = {name: text for name, text in plain.items() if name not in taken}
    for field in FIELDS:
        if field not in spec.columns and (column := _column(field, free)) is not None:
            of[field] = column
    if "options" not in spec.columns:
        rest = {name: text for name, text in free.items() if name not in of.values()}
        options = _option_columns(rest, spec)
        if options and "options" in of:
            raise RowError(
                f"options could be in {show(of['options'])} and in {_shown(options)}; "
                f"{_remedy('options', spec)}"
            )
    elif missing := [name for name in options if name not in names]:
        raise RowError(f"column {show(missing[0])} of the options is missing")
    for field in ("video", "question"):
        if field not in of:
            raise RowError(f"no '{field}' (has: {_shown(names)}); {_remedy(field, spec)}")
    if not options and "options" not in of:
        raise RowError(f"no 'options' (has: {_shown(names)}); {_remedy('options', spec)}")
    unread = [name for name in names if name not in of.values() and name not in options]
    return Columns(of, options, tuple(unread))


def _remedy(field: str, spec: Spec) -> str:
    return f"name the column in {spec.path} (columns: {field}: ...)"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(show(name) for name in names[:20])


def _column(field: str, free: dict[str, str]) -> str | None:
    """The column of the field's own name, else the one column of another name of it."""
    for wanted in ((field,), ALIASES.get(field, ())):
        found = [name for name, text in free.items() if text in wanted]
        if len(found) > 1:
            raise RowError(
                f"'{field}' could be {' or '.join(show(name) for name in found)}; "
                f"name one in dataset.yaml (columns: {field}: ...)"
            )
        if found:
            return found[0]
    return None


def _option_columns(free: dict[str, str], spec: Spec) -> tuple[str, ...]:
    families: dict[str, dict[int, str]] = {}
    for name, text in free.items():
        if match := _NUMBERED.fullmatch(text):
            family, number = match[1], int(match[2])
        elif match := _LETTERED.fullmatch(text):
            family, number = f"{match[1] or ''} letter", ord(match[2]) - ord("a")
        else:
            continue
        if number in families.setdefault(family, {}):
            raise RowError(f"columns {show(families[family][number])} and {show(name)} are one")
        families[family][number] = name
    several = [columns for columns in families.values() if len(columns) > 1]
    if len(several) > 1:
        both = " and in ".join(_shown(list(columns.values())) for columns in several)
        raise RowError(f"options could be in {both}; {_remedy('options', spec)}")
    if not several:
        return ()
    (columns,) = several
    first = 1 if 0 not in columns else 0
    if sorted(columns) != list(range(first, first + len(columns))):
        raise RowError(f"a column is missing between those of the options: {_shown(list(free))}")
    return tuple(columns[number] for number in sorted(columns))
