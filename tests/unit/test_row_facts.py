"""How the rows of the examples' tables were made: row.json, and what a record says of it."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import ROOT

sys.path.insert(0, str(ROOT / "launch" / "examples"))
import keep_demo

from launch.examples import row_facts


@pytest.fixture
def commit(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("VICO_COMMIT", "aaa")
    return monkeypatch


def measured(folder: Path, name: str, acc: float, made: bool = True) -> None:
    """A run as keep_demo.sh leaves it; those of earlier versions have no row.json."""
    run = folder / "runs" / name
    run.mkdir(parents=True)
    texts = {f"/x/{text}.txt": {"kl_per_token": 0.25} for text in keep_demo.TEXTS}
    (run / "eval.json").write_text(json.dumps({"acc": acc}))
    (run / "texts.json").write_text(json.dumps({"files": texts}))
    if made:
        (run / "args.json").write_text(json.dumps({"seed": 0, "keep": 1.0, "model": "/home/me"}))
        (run / "steps.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
        row_facts.write_facts(run, 70)


def table(folder: Path, capsys: pytest.CaptureFixture[str], seeds: str = "0") -> dict[str, Any]:
    assert keep_demo.main(["table", str(folder), "1", seeds]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(record, dict)
    return record


def test_a_record_is_of_the_code_that_made_its_rows(
    tmp_path: Path, commit: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by later code, and read again: it is the same record, in one file."""
    for name in ("without-0", "keep-1-0"):
        measured(tmp_path, name, 0.5)
    facts = json.loads((tmp_path / "runs/keep-1-0/row.json").read_text())
    assert facts == {"commit": "aaa", "seconds": 70, "steps": 2}
    commit.setenv("VICO_COMMIT", "bbb")
    record = table(tmp_path, capsys)
    assert (record["git_commit"], record["commits"]) == ("aaa", ["aaa"])
    assert record["seconds"] == 140 and record["command"].endswith("examples/keep_demo.sh")
    (run,) = record["cases"][1]["runs"]
    assert run["commit"] == "aaa" and run["seconds"] == 70 and run["seed"] == "0"
    assert run["settings"] == {"seed": 0, "keep": 1.0}, "no paths"
    assert table(tmp_path, capsys) == record
    assert len(list(tmp_path.glob("keep_demo-*.json"))) == 1


def test_rows_of_several_commits_are_said(
    tmp_path: Path, commit: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A new row makes a new record. What earlier versions did not write is unknown."""
    for name in ("without-0", "keep-1-0"):
        measured(tmp_path, name, 0.5)
    first = table(tmp_path, capsys)
    commit.setenv("VICO_COMMIT", "bbb")
    measured(tmp_path, "without-1", 0.5)
    measured(tmp_path, "keep-1-1", 0.75, made=False)
    second = table(tmp_path, capsys, "0 1")
    assert second["commits"] == ["aaa", "bbb", "unknown"] and second["seconds"] is None
    assert second["cases"][1]["runs"][1] == {
        "seed": "1",
        "commit": None,
        "seconds": None,
        "settings": None,
    }
    assert table(tmp_path, capsys) == first, "also behind one of more seeds"
