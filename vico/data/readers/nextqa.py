"""NExT-QA's table: five options a0..a4, the answer as an index, questions numbered per video.

CSV as published, or the same fields as JSON lines, JSON or parquet.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from vico.data.readers import rows, table_files
from vico.data.readers.rows import Row, RowError, Rows
from vico.data.types import Question, Questions
from vico.io.paths import exists

# Question type -> group: causal, temporal, descriptive.
GROUPS = {
    **dict.fromkeys(("CW", "CH"), "C"),
    **dict.fromkeys(("TN", "TC", "TP"), "T"),
    **dict.fromkeys(("DL", "DC", "DO", "DB"), "D"),
}
OPTIONS = ("a0", "a1", "a2", "a3", "a4")
_OTHER_NAMES = {"video_id": "video", "question_id": "qid", "type": "type"}


def annotation_file(folder: Path, split: str) -> Path:
    """The CSV; where there is none, the table of another kind."""
    path = folder / f"{split}.csv"
    found = table_files.find(folder, split) if not exists(path) else path
    return found if exists(found) else path


def read(folder: Path, split: str) -> Questions:
    path = annotation_file(folder, split)
    required = ["video", "question", "qid", *OPTIONS]
    if split != "test":
        required.append("answer")
    what = f"the table of the {split} questions"
    if path.suffix == ".csv":
        what = f"the CSV of the {split} questions"
        records = rows.read_csv(path, what, required, _OTHER_NAMES)
    else:
        records = table_files.read(path, what)
        names = (*required, *_OTHER_NAMES)
        records[:] = [(place, _named(row, names)) for place, row in records]
    answer = _answers(records, split, may_be_texts=path.suffix != ".csv")

    def question(index: int, place: str, row: Row) -> Question:
        rows.refuse_further_options(row, OPTIONS)
        return Question(
            index=index,
            qid=rows.id_field(row, "qid"),
            video=rows.id_field(row, "video"),
            type=rows.type_field(row, "type"),
            question=rows.question_field(row, "question"),
            options=_options(row),
            answer=answer(row),
            place=place,
        )

    return rows.questions_from(path, records, question)


def _named(row: Row, names: Sequence[str]) -> Row:
    """The fields by our names, and whole numbers (as parquet's 0.0) as such."""
    header = rows.canonical_names(list(row), names, _OTHER_NAMES)
    named = dict(zip(header, row.values(), strict=True))
    answer = named.get("answer")
    if isinstance(answer, float) and answer.is_integer():
        named["answer"] = int(answer)
    return named


def _options(row: Row) -> tuple[str, ...]:
    return tuple(rows.text_field(row, key) for key in OPTIONS)


def _answers(records: Rows, split: str, may_be_texts: bool) -> Callable[[Row], int | None]:
    """What finds a row's answer: by index as published, or by text where not all have one.

    Not in CSV, where "nan" is a lost answer.
    """

    def by_index(row: Row) -> int | None:
        return rows.answer_field(row, "answer", len(OPTIONS), split)

    def by_text(row: Row) -> int | None:
        return _options(row).index(rows.text_field(row, "answer"))

    are_texts = all(row.get("answer") in map(row.get, OPTIONS) for _, row in records)
    if not (may_be_texts and are_texts):
        return by_index
    for _, row in records:
        try:
            by_index(row)
        except RowError:
            return by_text
    return by_index
