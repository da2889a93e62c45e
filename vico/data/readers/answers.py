"""The right option, as files state it: its index, its letter or its text.

A text like "2" can be the index of one option and the text of another. What a row leaves open, the
file decides: a form that fits every row is the form of all.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError, plain
from vico.errors import show

FORMS = ("index", "letter", "text")
LETTERS = string.ascii_uppercase
LOOSELY = "matched with an option but for case, blanks and the full stop at the end"
_INDEX = re.compile(r"(-?[0-9]{1,9})(?:\.0*)?")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|\.|:|\)\.)?(?:\s+(.*))?", re.DOTALL)
MIN_ROWS_TO_DOUBT = 20  # in so many rows of one base, one that counts from 0 has a 0


class Reading(NamedTuple):
    """What an answer can mean: form -> index of the option."""

    by_form: dict[str, int]
    is_loose: bool = False  # the text is an option's but for what `plain` removes


def read(row: Row, key: str, options: Sequence[str], base: int, split: str) -> Reading | None:
    """None: no answer, in a test split. Raises RowError for one that is no option's.

    `base`: the number of the first option.
    """
    value = row.get(key)
    if split == "test" and str("" if value is None else value).strip() in ("", "-1"):
        return None
    reading = _reading(rows.field(row, key), options, base)
    if not reading.by_form:
        last = base + len(options) - 1
        hint = ""
        if isinstance(value, int | str) and str(value).strip() == str(last + 1) and base == 0:
            hint = "; do answers count from 1? Then put 'answer_base: 1' into dataset.yaml"
        choices = f"{base} to {last}, A to {LETTERS[len(options) - 1]}, or an option's text"
        raise RowError(f"'{key}' is {show(value)}, not one of {choices}{hint}")
    return reading


def _reading(value: Any, options: Sequence[str], base: int) -> Reading:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return Reading({})
    if isinstance(value, int | float):
        index = value - base
        is_option = 0 <= index < len(options) and index == int(index)
        return Reading({"index": int(index)} if is_option else {})
    text, forms = value.strip(), dict[str, int]()
    number = _INDEX.fullmatch(text)
    if number and 0 <= int(number[1]) - base < len(options):
        forms["index"] = int(number[1]) - base
    if letter := _LETTER.fullmatch(text):
        index = LETTERS.index(letter[1].upper())
        rest = letter[2] or ""
        if index < len(options) and (not rest or plain(rest) == plain(options[index])):
            forms["letter"] = index
    if value in options:
        return Reading({**forms, "text": options.index(value)})
    wanted = plain(text)
    loosely = {i for i, option in enumerate(options) if wanted and plain(option) == wanted}
    if len({options[i] for i in loosely}) == 1:
        return Reading({**forms, "text": min(loosely)}, is_loose=True)
    return Reading(forms)


class Answers:
    """The answers of a file, once all of them have been read."""

    def __init__(self, readings: Sequence[Reading], form: str | None) -> None:
        """`form`: the one that dataset.yaml states."""
        counts = Counter(form for reading in readings for form in reading.by_form)
        common = [form for form in FORMS if counts[form] == len(readings)]
        self._stated = form
        self._forms = [form] if form else common
        self._counts = Counter[str]()
        self._num_loose = 0

    def index(self, reading: Reading, key: str, value: Any) -> int:
        """Raises RowError where the file leaves it open."""
        forms = {f: i for f, i in reading.by_form.items() if f in self._forms or not self._forms}
        if not forms:
            raise RowError(f"'{key}' is {show(value)}, and dataset.yaml says {self._stated}")
        if len(set(forms.values())) > 1:
            meanings = " and ".join(f"the {f} of option {i}" for f, i in forms.items())
            raise RowError(
                f"'{key}' is {show(value)}, {meanings} (counted from 0); put "
                f"'answer: {' or '.join(forms)}' into dataset.yaml"
            )
        form = next(iter(forms))
        self._counts[form] += 1
        self._num_loose += reading.is_loose and form == "text"
        return forms[form]

    def notes(self) -> list[str]:
        if not self._counts:
            return []
        counts = ", ".join(f"{n} by {form}" for form, n in self._counts.most_common())
        notes = [f"answers: {counts}"]
        if self._num_loose:
            notes.append(f"{self._num_loose} answers are {LOOSELY}")
        return notes


def base_notes(indices: Sequence[int], readings: Sequence[Reading], base: int) -> list[str]:
    """A warning where answers seem to count from 1."""
    by_index = all("index" in reading.by_form for reading in readings)
    if base == 0 and by_index and len(indices) >= MIN_ROWS_TO_DOUBT and 0 not in indices:
        hint = "if answers count from 1, put 'answer_base: 1' into dataset.yaml"
        return [f"warning: no answer of {len(indices)} is 0; {hint}"]
    return []
