"""STAR's JSON: the answer is a text, the choices are unordered, the clip is in seconds."""

import re
import string
from collections import Counter
from pathlib import Path
from typing import Any

from vico.data.readers import rows
from vico.data.readers.rows import Row, RowError
from vico.data.types import FeatureRows, Question, Questions
from vico.errors import show

GROUPS = {name: name for name in ("Interaction", "Sequence", "Prediction", "Feasibility")}
MEAN_OF = tuple(GROUPS)  # published next to the total: the mean of these four accuracies
LETTERS = string.ascii_uppercase
# How an answer that is not the text of a choice was matched with one.
LOOSELY = "matched with a choice but for case, blanks and the full stop at the end"
BY_NAME = "the number or the letter of a choice, not its text"


def annotation_file(folder: Path, split: str) -> Path:
    return folder / f"STAR_{split}.json"


def read(folder: Path, split: str) -> Questions:
    path = annotation_file(folder, split)
    records = rows.read_json_items(path, f"the JSON list of the {split} questions", "question_id")
    how_matched = Counter[str]()

    def question(index: int, place: str, row: Row) -> Question:
        qid = rows.id_field(row, "question_id")
        kind, underscore, _ = qid.partition("_")  # "Interaction_T1_13"
        choices = _choices(rows.field(row, "choices"))
        answer, how = _answer(row, choices, split)
        how_matched[how] += 1
        return Question(
            index=index,
            qid=qid,
            video=rows.id_field(row, "video_id"),
            type=kind if underscore else rows.UNKNOWN,
            question=rows.question_field(row, "question"),
            options=tuple(choices.values()),
            answer=answer,
            feature_rows=_feature_rows(row),
            place=place,
        )

    questions = rows.questions_from(path, records, question)
    counts = ((how, how_matched[how]) for how in (LOOSELY, BY_NAME))
    questions.notes = tuple(f"{n} of {len(questions)} answers are {how}" for how, n in counts if n)
    return questions


def _choices(value: Any) -> dict[str, str]:
    """The texts of the choices by name, in the order of the names.

    `value`: a list of objects with choice_id and choice, an object from a number or letter to a
    text or such an object, or a list of texts, which are numbered from 0.
    """
    named = list(value.items()) if isinstance(value, dict) else []
    if isinstance(value, list):
        named = [(_choice_id(place, choice), choice) for place, choice in enumerate(value)]
    if not 2 <= len(named) <= len(LETTERS):
        expected = f"a list or an object of 2 to {len(LETTERS)} choices"
        raise RowError(f"'choices' is {show(value)}, not {expected}")
    choices: dict[str, str] = {}
    for key, choice in named:
        name = _name(key)
        if name in choices:
            raise RowError(f"choice_id {show(key)} appears twice")
        texts = choice if isinstance(choice, dict) else {"choice": choice}
        choices[name] = rows.text_field(texts, "choice")
    if len({name in LETTERS for name in choices}) > 1:
        raise RowError(f"the choices are called {show(list(choices))}, by numbers and by letters")
    numbers = {name: ord(name) if name in LETTERS else int(name) for name in choices}
    return {name: choices[name] for name in sorted(choices, key=numbers.__getitem__)}


def _choice_id(place: int, choice: Any) -> Any:
    """A text, which has none, is called by its place in the list."""
    return rows.field(choice, "choice_id") if isinstance(choice, dict) else place


def _name(key: Any) -> str:
    """Of a choice: "0", or "A"."""
    text = str(key).strip().upper()
    if isinstance(key, (int, str)) and not isinstance(key, bool):
        if len(text) == 1 and text in LETTERS:
            return text
        if re.fullmatch("-?[0-9]{1,9}", text):
            return str(int(text))
    raise RowError(f"choice_id {show(key)} is no integer and no letter")


def _answer(row: Row, choices: dict[str, str], split: str) -> tuple[int | None, str]:
    """(the first option with the answer's text, how it was matched; "": to the letter).

    Some questions have two equal options. Raises RowError where an answer that is no choice's text
    fits none, or choices with different texts.
    """
    value, options = row.get("answer"), list(choices.values())
    if split == "test" and value in (None, ""):
        return None, ""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    text = str(value) if is_number else rows.text_field(row, "answer")
    if text in options and not is_number:
        return options.index(text), ""
    plain, name = rows.plain(text), text.strip().upper()
    loosely = [i for i, option in enumerate(options) if plain and rows.plain(option) == plain]
    by_name = [i for i, names in enumerate(_names(choices)) if name in names]
    found = {options[i] for i in (*loosely, *by_name)}
    if len(found) == 1:
        return (loosely or by_name)[0], LOOSELY if loosely else BY_NAME
    fault = "fits more than one" if found else "not one"
    raise RowError(f"'answer' is {show(value)}, {fault} of the choices {show(options)}")


def _names(choices: dict[str, str]) -> list[tuple[str, str]]:
    """The number and the letter of each choice: those of the file, else by its place."""
    names = []
    for place, name in enumerate(choices):
        names.append((str(place), name) if name in LETTERS else (name, LETTERS[place]))
    return names


def _feature_rows(row: Row) -> FeatureRows:
    """STAR has one feature per second: rows round(start) to round(end), both included.

    As published: Python's round, which takes halves to the even number.
    """
    start, end = rows.seconds_field(row, "start"), rows.seconds_field(row, "end")
    if end < start:
        raise RowError(f"the clip ends at {end} s, before it starts at {start} s")
    return round(start), round(end) + 1
