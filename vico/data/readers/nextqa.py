"""NExT-QA's CSV: five options a0..a4, the answer as an index, questions numbered per video."""

from pathlib import Path

from vico.data.readers import rows
from vico.data.readers.rows import Row
from vico.data.types import Question

# Question type -> group: causal, temporal, descriptive.
GROUPS = {
    **dict.fromkeys(("CW", "CH"), "C"),
    **dict.fromkeys(("TN", "TC", "TP"), "T"),
    **dict.fromkeys(("DL", "DC", "DO", "DB"), "D"),
}
_OPTIONS = ("a0", "a1", "a2", "a3", "a4")


def annotation_file(folder: Path, split: str) -> Path:
    return folder / f"{split}.csv"


def read(folder: Path, split: str) -> list[Question]:
    path = annotation_file(folder, split)
    required = ["video", "question", "qid", *_OPTIONS]
    if split != "test":
        required.append("answer")
    what = f"the CSV of the {split} questions"
    records = rows.read_csv(path, what, required, aliases={"video_id": "video"})

    def question(index: int, place: str, row: Row) -> Question:
        return Question(
            index=index,
            qid=rows.id_field(row, "qid"),
            video=rows.id_field(row, "video"),
            type=rows.type_field(row, "type"),
            question=rows.question_field(row, "question"),
            options=tuple(rows.text_field(row, key) for key in _OPTIONS),
            answer=rows.answer_field(row, "answer", len(_OPTIONS), split),
            place=place,
        )

    return rows.questions_from(path, records, question)
