"""Tables whose options stand in a text or behind a letter: LLaVA's, Qwen-VL's and Video-R1's JSON.

They become rows of the general schema, whose reader judges them.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from vico.data.readers import rows
from vico.data.readers.answers import LETTERS
from vico.data.readers.rows import Row, RowError, Rows
from vico.errors import UserError, show

_MARKS = re.compile(r"<(?:video|image)>[ \t]*\n?|<\|vision_start\|>.*?<\|vision_end\|>", re.DOTALL)
_OPTION = re.compile(r"\s*\(?([A-Z])(?:\)|\.|:|\)\.)\s+(\S.*?)\s*")
_HEADS = re.compile(r"\s*(?:options|choices)\s*:?\s*", re.IGNORECASE)
_ANSWER = re.compile(r"\s*<answer>\s*(.*?)\s*</answer>\s*", re.DOTALL)
_SAYS = re.compile(
    r"\s*(?:the\s+)?(?:correct\s+|best\s+)?(?:answer|option|choice)(?:\s+is)?"
    r"\s*:?\s+(?=\(?[A-Z]\b)",
    re.I,
)
_TURNS = ("conversations", "messages")
_ASKS, _ANSWERS = ("human", "user"), ("gpt", "assistant")
_VIDEO_R1 = {"problem", "options", "solution"}
_VIDEO_R1_NAMES = {"problem": "question", "solution": "answer", "path": "video"}
_VIDEO_R1_NAMES |= {"problem_id": "id", "data_source": "type"}
_VIDEOS = ("video", "videos")


def as_rows(path: Path, records: Rows) -> Rows:
    """`records` itself where they are rows of the general schema already. Raises UserError."""
    names = {*records[0][1]}
    if any(name in names for name in _TURNS):
        convert, what = _of_conversation, "a question with options about one video"
    elif names >= _VIDEO_R1:
        convert, what = _of_problem, "a multiple-choice question about a video"
    else:
        return records
    made, bad = Rows(), []
    passed_over, left_out = Counter[str](), Counter[str]()
    for place, row in records:
        try:
            for question, rest in convert(row):
                made.append((place, question))
                left_out[rest] += bool(rest)
        except _OtherTaskError as problem:
            passed_over[str(problem)] += 1
        except RowError as problem:
            bad.append(f"{place}: {problem}")
    rows.refuse(path, bad, len(records))
    if not made:
        reason = next(iter(passed_over)).removesuffix(":")
        raise UserError(
            f"{path}: no row is {what}: {reason}; an option is a line such as 'A. a dog'"
        )
    made.num_blank = records.num_blank
    made.notes = (*records.notes, *_notes(len(records), passed_over, left_out, what))
    return made


class _OtherTaskError(Exception):
    """The row is whole, and not what this program trains on."""


def _notes(total: int, passed_over: Counter[str], left_out: Counter[str], what: str) -> list[str]:
    notes = []
    if passed_over:
        counts = ", ".join(f"{reason} {n}" for reason, n in passed_over.most_common())
        count = sum(passed_over.values())
        notes.append(
            f"warning: {count} of {total} rows are not {what}, and are passed over: {counts}"
        )
    texts = {text: n for text, n in left_out.items() if n}
    if texts:
        example = show(next(iter(texts)))
        notes.append(f"{sum(texts.values())} texts around the options are left out, as {example}")
    return notes


# ---- conversations
# -------------------------------------------------------------------------------------


def _of_conversation(row: Row) -> list[tuple[dict[str, Any], str]]:
    """(row of the schema, text that is left out) of each question and answer."""
    key = next((name for name in _TURNS if name in row), None)
    if key is None:
        raise RowError(f"no 'conversations' (has: {', '.join(show(name) for name in row)})")
    turns = row[key]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"'{key}' is {show(turns)}, not a list of objects")
    said = [_speaker_and_text(turn, key) for turn in turns]
    system = " ".join(text for who, text in said if who == "system")
    pairs = [entry for entry in said if entry[0] != "system"]
    if not pairs or len(pairs) % 2:
        raise RowError(f"'{key}' holds {len(pairs)} texts, not questions with an answer each")
    others = {name: value for name, value in row.items() if name not in (key, *_VIDEOS)}
    made: list[tuple[dict[str, Any], str]] = []
    for (asker, asked), (answerer, answer) in zip(pairs[::2], pairs[1::2], strict=True):
        if asker not in _ASKS or answerer not in _ANSWERS:
            raise RowError(f"'{key}' goes from {show(asker)} to {show(answerer)}")
        question, options, rest = split_options(asked)
        rest = " ".join(text for text in (system, rest) if text)
        fields = {"video": _video(row, turns), "question": question, "options": options}
        if made and "id" in row:  # further questions of one conversation
            fields["id"] = f"{row['id']}#{len(made)}"
        made.append(({**others, **fields, "answer": _answer(answer)}, rest))
    return made


def _speaker_and_text(turn: Row, key: str) -> tuple[str, str]:
    who, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if isinstance(text, list):  # Qwen-VL's: pieces, each of a type
        pieces = [piece for piece in text if isinstance(piece, dict) and "text" in piece]
        text = "\n".join(str(piece["text"]) for piece in pieces)
    if not isinstance(who, str) or not isinstance(text, str):
        raise RowError(f"a turn of '{key}' is {show(dict(turn))}, not who speaks and a text")
    return who, text


def _answer(text: str) -> str:
    """Without the tags or the words around it: "<answer>B</answer>", "The answer is B"."""
    match = _ANSWER.fullmatch(text)
    return _SAYS.sub("", match[1] if match else text, count=1)


def _video(row: Row, turns: list[Any]) -> Any:
    videos = row.get("video", row.get("videos"))
    if videos is None:  # Qwen-VL's: a piece of what is asked
        contents = [turn.get("content", turn.get("value")) for turn in turns]
        pieces = [piece for pieces in contents if isinstance(pieces, list) for piece in pieces]
        videos = [p["video"] for p in pieces if isinstance(p, dict) and "video" in p] or None
    if videos is None and ("image" in row or "images" in row):
        raise _OtherTaskError("about an image:")
    if videos is None:
        raise RowError(f"no 'video' (has: {', '.join(show(name) for name in row)})")
    if isinstance(videos, list):
        if len(videos) != 1:
            raise _OtherTaskError("about several videos:")
        (videos,) = videos
    return videos


def split_options(text: str) -> tuple[str, list[str], str]:
    """(question, options, what else is left out) of a text that lists its options by letter.

    A line such as "A. a dog" is an option; a second line of it is not told from an instruction.
    """
    lines = _MARKS.sub("", text).strip().split("\n")
    matches = [_OPTION.fullmatch(line) for line in lines]
    first = next((i for i, match in enumerate(matches) if match and match[1] == "A"), None)
    if first is None:
        raise _OtherTaskError("without options by letter:")
    options: list[str] = []
    for match in matches[first:]:
        if match is None or match[1] != LETTERS[len(options)]:
            break
        options.append(match[2])
        if len(options) == len(LETTERS):
            break
    stop = first + len(options)
    if further := [match[1] for match in matches[stop:] if match]:
        raise RowError(f"option {further[0]} is not in the row of letters: {show(text)}")
    before = lines[:first]
    heads = [line for line in before if _HEADS.fullmatch(line) and line.strip()]
    question = "\n".join(line for line in before if line not in heads).strip()
    rest = "\n".join(line for line in lines[stop:] if line.strip()).strip()
    return question, options, rest


# ---- Video-R1
# -------------------------------------------------------------------------------------


def _of_problem(row: Row) -> list[tuple[dict[str, Any], str]]:
    if row.get("data_type", "video") != "video":
        raise _OtherTaskError(f"data_type {show(row['data_type'])}:")
    if row.get("problem_type", "multiple choice") != "multiple choice":
        raise _OtherTaskError(f"problem_type {show(row['problem_type'])}:")
    solution = rows.text_field(row, "solution")
    question = {_VIDEO_R1_NAMES.get(name, name): value for name, value in row.items()}
    question["options"] = _without_letters(rows.field(row, "options"))
    question["answer"] = _answer(solution)
    return [(question, "")]


def _without_letters(options: Any) -> Any:
    """Texts without "A. " where each has its own letter before it."""
    if not isinstance(options, list) or not all(isinstance(text, str) for text in options):
        return options
    matches = [_OPTION.fullmatch(text) for text in options]
    letters = [match[1] for match in matches if match]
    if letters != list(LETTERS[: len(options)]):
        return options
    return [match[2] for match in matches if match]
