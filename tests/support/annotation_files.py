"""Annotation files as the datasets publish them, written row by row by the readers' tests."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

HEADER = "video frame_count width height question answer qid type a0 a1 a2 a3 a4".split()
OPTIONS = ["clap", "None", "nan", "NA ", "007"]
# The files of a test's folder are overwritten by each example.
FILE_PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def csv_row(
    video: str = "007",
    qid: str = "1",
    answer: str = "0",
    question: str = "why",
    kind: str = "CW",
    **changes: str,
) -> list[str]:
    """A row of NExT-QA's CSV."""
    values = [video, "9", "4", "3", question, answer, qid, kind, *OPTIONS]
    row = dict(zip(HEADER, values, strict=True))
    return list((row | changes).values())


def csv_text(rows: list[list[str]], header: list[str] = HEADER, end: str = "\n") -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator=end).writerows([header, *rows])
    return out.getvalue()


def star_item(**changes: Any) -> dict[str, Any]:
    """An item of STAR's JSON list."""
    texts = {3: "d", 1: "b", 0: "a", 2: "b"}
    item = {
        "question_id": "Interaction_T1_13",
        "question": "Which?",
        "video_id": "V1",
        "start": 6.5,
        "end": 18.099999999999998,
        "answer": "b",
        "choices": [{"choice_id": key, "choice": text} for key, text in texts.items()],
    }
    return item | changes


def tvqa_row(**changes: Any) -> dict[str, Any]:
    """A line of TVQA's JSON lines."""
    row = {f"a{i}": text for i, text in enumerate(OPTIONS)} | {
        "answer_idx": 1,
        "q": "Why?",
        "qid": 5,
        "vid_name": "s01_clip",
        "show_name": "Castle",
        "ts": "48.62-60.02",
    }
    return row | changes


def put(path: Path, content: str | bytes | list[Any] | dict[str, Any]) -> Path:
    """Write a file: text or bytes as they are, a list as JSON or (.jsonl) one line per item."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" and isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    elif isinstance(content, (list, dict)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path
