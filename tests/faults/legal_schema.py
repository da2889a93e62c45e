"""Tables of questions in the forms that people have: the same samples as their clean twin's."""

import csv
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from faults.damage import Damage, both, put
from support.run_fixture import FEATURES, NEXTQA, TRAIN, VAL, RunFixture

MY = "toy/data/my"
Row = dict[str, Any]
OPTIONS = (["clap", "None", "007"], ["a, b", "sit"], ["x", "nan", "1e3", "NA", "-"])


def _row(index: int, video: str) -> Row:
    named: Row = {"id": str(index), "video": video, "question": "why now", "type": "CW"}
    return {**named, "options": OPTIONS[index], "answer": index % 2}


SPLITS = {
    "train": [_row(i, f"00000{i}") for i in range(3)],
    "val": [_row(i, f"10000{i % 2}") for i in range(3)],
}
MY_FLAGS = ["--dataset", "my", "--cap", "0"]


def lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _with_features(fixture: RunFixture) -> None:
    shutil.copy(fixture.folder / FEATURES, fixture.folder / MY)


def _data_set(change: Callable[[Row], Row] = dict) -> Damage:
    """The data set `my`, its rows changed."""
    tables = {f"{split}.jsonl": rows for split, rows in SPLITS.items()}
    files = [put(f"{MY}/{name}", lines(list(map(change, rows)))) for name, rows in tables.items()]
    return both(*files, _with_features)


def _instead(suffix: str, write: Callable[[list[Row]], str]) -> Damage:
    """Tables of another kind in place of the clean ones."""

    def damage(fixture: RunFixture) -> None:
        for split, rows in SPLITS.items():
            folder = fixture.folder / MY
            (folder / f"{split}.jsonl").unlink()
            (folder / f"{split}{suffix}").write_text(write(rows), encoding="utf-8")

    return damage


def _each(change: Callable[[Row], Row], suffix: str = ".jsonl") -> Damage:
    return _instead(suffix, lambda rows: lines(list(map(change, rows))))


def _table(delimiter: str, suffix: str = ".csv", **names: str) -> Damage:
    """Options in a column each: a0, a1, ..., or under another `option`; fields by other names."""
    prefix = names.pop("option", "a")

    def write(rows: list[Row]) -> str:
        flat = []
        for row in rows:
            options = {f"{prefix}{i}": text for i, text in enumerate(row["options"])}
            others = {names.get(n, n): value for n, value in row.items() if n != "options"}
            flat.append({**others, **options})
        columns = list(dict.fromkeys(name for row in flat for name in row))
        out = io.StringIO()
        writer = csv.DictWriter(out, columns, delimiter=delimiter, lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        return out.getvalue()

    return _instead(suffix, write)


def _lettered(row: Row) -> list[str]:
    return [f"{'ABCDE'[i]}. {text}" for i, text in enumerate(row["options"])]


def _answer(row: Row, answer: Any) -> Row:
    return {**row, "answer": answer}


def _without(name: str) -> Callable[[Row], Row]:
    return lambda row: {key: value for key, value in row.items() if key != name}


TYPED = _data_set()
CAPITALS = {name: name.title() for name in ("id", "video", "question", "type", "answer")}
MAP = "columns: {video: clip, question: text, answer: right}\n"
SCHEMA_TWINS: dict[str, Damage] = {
    "schema, CSV": _table(","),
    "schema, tabs": _table("\t"),
    "schema, tabs in .tsv": _table("\t", ".tsv"),
    "schema, semicolons": _table(";"),
    "schema, vertical bars": _table("|"),
    "schema, JSON lines called JSON": _instead(".json", lines),
    "schema, capitals": _table(",", option="Option ", **CAPITALS),
    "schema, option_0": _table(",", option="option_", id="question_id", video="video_id"),
    "schema, a column map": both(
        _table(",", video="clip", question="text", answer="right"), put(f"{MY}/dataset.yaml", MAP)
    ),
    "schema, a JSON list": _instead(".json", json.dumps),
    "schema, JSON by id": _instead(".json", lambda rows: json.dumps({r["id"]: r for r in rows})),
    "schema, no ids": _each(_without("id")),
    "schema, options by letter": _each(
        lambda row: {**row, "options": dict(zip("ABCDE", row["options"], strict=False))}
    ),
    "schema, choices": _each(lambda row: {**_without("options")(row), "choices": row["options"]}),
    "schema, answers 0.0": _each(lambda row: _answer(row, f"{row['answer']}.0")),
    "schema, answers by letter": _each(lambda row: _answer(row, "AB"[row["answer"]])),
    "schema, answers as text": _each(lambda row: _answer(row, row["options"][row["answer"]])),
    "schema, answers from 1": both(
        _each(lambda row: _answer(row, row["answer"] + 1)),
        put(f"{MY}/dataset.yaml", "answer_base: 1"),
    ),
}


def _conversation(row: Row) -> Row:
    asked = "\n".join(["<video>", row["question"], *_lettered(row), "Answer with the letter."])
    turns = [("human", asked), ("gpt", "AB"[row["answer"]])]
    said = [{"from": who, "value": text} for who, text in turns]
    return {"id": row["id"], "video": row["video"], "conversations": said}


def _messages(row: Row) -> Row:
    asked = "\n".join([row["question"], "Options:", *_lettered(row)])
    turns = [("user", f"<video>{asked}"), ("assistant", _lettered(row)[row["answer"]])]
    said = [{"role": who, "content": text} for who, text in turns]
    return {"id": row["id"], "messages": said, "videos": [row["video"]]}


def _problem(row: Row) -> Row:
    solution = f"<answer>{'AB'[row['answer']]}</answer>"
    named = {"problem_id": row["id"], "problem": row["question"], "path": row["video"]}
    kind = {"data_type": "video", "problem_type": "multiple choice"}
    return {**named, **kind, "options": _lettered(row), "solution": solution}


UNTYPED = _data_set(_without("type"))
CONVERSATIONS: dict[str, Damage] = {
    "LLaVA's conversations": _instead(
        ".json", lambda rows: json.dumps(list(map(_conversation, rows)))
    ),
    "Qwen-VL's messages": _each(_messages),
    "Video-R1's problems": _instead(".json", lambda rows: json.dumps(list(map(_problem, rows)))),
}


# ---- NExT-QA ------------------------------------------------------------------------------------


def nextqa(write: Callable[[list[dict[str, str]], Path], object]) -> Damage:
    """NExT-QA's tables in another kind of file, without the CSV."""

    def damage(fixture: RunFixture) -> None:
        for name in (TRAIN, VAL):
            path = fixture.folder / name
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            path.unlink()
            write(rows, fixture.folder / NEXTQA / Path(name).stem)

    return damage


def _separated(delimiter: str) -> Damage:
    def write(rows: list[dict[str, str]], path: Path) -> None:
        with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)

    return nextqa(write)


def _dumped(suffix: str, dump: Callable[[list[dict[str, str]]], str]) -> Damage:
    return nextqa(lambda rows, path: path.with_suffix(suffix).write_text(dump(rows)))


NEXTQA_FORMATS: dict[str, Damage] = {
    "NExT-QA, tabs": _separated("\t"),
    "NExT-QA, semicolons": _separated(";"),
    "NExT-QA, JSON lines": _dumped(".jsonl", lines),
    "NExT-QA, a JSON list": _dumped(".json", json.dumps),
}
