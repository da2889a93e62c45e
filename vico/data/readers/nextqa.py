"""NExT-QA's multiple-choice CSV: five options a0..a4, the answer as an index, questions numbered per video."""

from pathlib import Path

from vico.data.readers import rows as tables
from vico.data.readers.rows import Row
from vico.data.types import Question

GROUPS = {
    "CW": "C",
    "CH": "C",
    "TN": "T",
    "TC": "T",
    "TP": "T",
    "DL": "D",
    "DC": "D",
    "DO": "D",
    "DB": "D",
}
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def file_of(folder: Path, split: str) -> Path:
    return folder / f"{split}.csv"


def read(folder: Path, split: str) -> list[Question]:
    path = file_of(folder, split)
    required = ["video", "question", "qid", *_OPTIONS] + ([] if split == "test" else ["answer"])
    rows = tables.read_csv(
        path, f"the CSV of the {split} questions", required, aliases={"video_id": "video"}
    )

    def question(index: int, place: str, row: Row) -> Question:
        return Question(
            index=index,
            qid=tables.id_field(row, "qid"),
            video=tables.id_field(row, "video"),
            type=tables.type_field(row, "type"),
            question=tables.question_field(row, "question"),
            options=tuple(tables.text_field(row, key) for key in _OPTIONS),
            answer=tables.answer_field(row, "answer", len(_OPTIONS), split),
            place=place,
        )

    return tables.questions_from(path, rows, question)
