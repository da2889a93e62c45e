"""A folder of tables in the general schema, with faults."""

import json
from typing import Any

from faults.case import Case, refused
from faults.damage import both, put
from support.run_fixture import TRAIN

MY, LINE = "toy/data/my", "--dataset my --cap 0"
ROW: dict[str, Any] = {"video": "000000", "question": "why", "options": ["a", "b"], "answer": 1}
WITHOUT_ANSWER = {name: value for name, value in ROW.items() if name != "answer"}


def row(*parts: str, **changes: Any) -> Case:
    """A table of one row with these changes."""
    return table("train.jsonl", json.dumps({**ROW, **changes}) + "\n", *parts)


def table(name: str, content: str | bytes, *parts: str) -> Case:
    return refused(put(f"{MY}/{name}", content), *parts, line=LINE)


def described(text: str, *parts: str) -> Case:
    """dataset.yaml beside a good table."""
    good = put(f"{MY}/train.jsonl", json.dumps(ROW) + "\n")
    return refused(both(good, put(f"{MY}/dataset.yaml", text)), "dataset.yaml", *parts, line=LINE)


TWO = json.dumps({**ROW, "id": "2", "caption": "y"}) + "\n"
TOP = "video,question,a0,a1,answer\n"
SCHEMA: dict[str, Case] = {
    "schema, one option": row("train.jsonl:1: 1 options, not 2 to 26", options=["a"]),
    "schema, 27 options": row("train.jsonl:1: 27 options", options=["a"] * 27),
    "schema, options no list": row("train.jsonl:1: 'options' is 'a or b'", options="a or b"),
    "schema, an option null": row("train.jsonl:1: 'options[1]' is None", options=["a", None]),
    "schema, options by other letters": row("not A, B, ... in order", options={"B": "a", "A": "b"}),
    "schema, answer 2 of 2": row("'answer' is 2, not one of 0 to 1", "answer_base", answer=2),
    "schema, answer 0.5": row("'answer' is 0.5, not one of 0 to 1", answer=0.5),
    "schema, answer true": row("'answer' is True", answer=True),
    "schema, answer C": row("'answer' is 'C', not one of 0 to 1, A to B", answer="C"),
    "schema, answer of two meanings": row(
        "the index of option 1 and the text of option 0", options=["1", "0"], answer="1"
    ),
    "schema, no answer": table(
        "train.jsonl", json.dumps(WITHOUT_ANSWER), "train.jsonl:1: 'answer' is missing (has: "
    ),
    "schema, no question": table("train.csv", "video,a0,a1\nv,x,y\n", "no 'question' (has: "),
    "schema, a caption that is a number": row("train.jsonl:1: caption of video", caption=7),
    "schema, two captions of a video": refused(
        put(f"{MY}/train.jsonl", json.dumps({**ROW, "caption": "x"}) + "\n" + TWO),
        "train.jsonl:1 and train.jsonl:2: two captions of video '000000'",
        line="--dataset my --no_eval --features ../nextqa/clipvitl14.pth",
    ),
    "schema, no val": table(
        "train.jsonl",
        json.dumps(ROW) + "\n",
        "val.jsonl: no such file, and each epoch is evaluated on val",
        "(--no_eval) or on test (--split test)",
    ),
    "schema, test in the place of val without answers": refused(
        both(
            put(f"{MY}/train.jsonl", json.dumps(ROW) + "\n"),
            put(f"{MY}/test.jsonl", json.dumps(WITHOUT_ANSWER) + "\n"),
        ),
        "test.jsonl:1: the test questions have no answers",
        "--no_eval",
        line=f"{LINE} --split test",
    ),
    "schema, options in two places": row("options could be in 'options' and in", a0="x", a1="y"),
    "schema, a clip without an end": row("a start without an end", start=1),
    "schema, a clip backwards": row("ends at 1.0 s, before it starts", start=2, end=1),
    "schema, a3 without a2": table(
        "train.csv", "video,question,a0,a1,a3,answer\nv,q,x,y,z,0\n", "a column is missing between"
    ),
    "schema, an empty option before another": table(
        "train.csv", TOP + "v,q,,y,1\n", "train.csv:2: 'a0' is empty, and a later option is not"
    ),
    "schema, gzip": table("train.csv", b"\x1f\x8b\x08\x00x", "train.csv: ", "is gzip-compressed"),
    "schema, a workbook": table("train.csv", b"PK\x03\x04 xl/sheet", "is an Excel workbook"),
    "schema, parquet called CSV": table("train.csv", b"PAR1\0\0", "is a parquet file"),
    "schema, no parquet": table("train.parquet", b"hm", "no whole parquet file"),
    "schema, two tables": refused(
        both(put(f"{MY}/train.jsonl", "{}"), put(f"{MY}/train.csv", "x")),
        "holds train.jsonl and train.csv; keep one",
        line=LINE,
    ),
    "dataset.yaml, an unknown key": described("colums: {}", "did you mean 'columns'?"),
    "dataset.yaml, an unknown field": described("columns: {vidio: x}", "columns: 'vidio' is none"),
    "dataset.yaml, a file elsewhere": described("files: {train: ../x.csv}", "leads out of"),
    "dataset.yaml, a rate of 0": described("frames_per_second: 0", "frames_per_second: 0 is no"),
    "dataset.yaml, a type in two groups": described(
        "groups: {x: [t], y: [t]}", "groups: type 't' is in two groups"
    ),
    "NExT-QA, a column a5": refused(
        put(TRAIN, "video,question,qid,a0,a1,a2,a3,a4,a5,answer\n1,q,1,a,b,c,d,e,f,5\n"),
        "train.csv:2: column 'a5'",
    ),
}
