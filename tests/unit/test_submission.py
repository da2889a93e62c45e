"""Submission files: the layouts that the servers' code reads, and every question exactly once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from support.errors import refusal
from support.processes import run_command
from vico.cli.submission import main

STAR_IDS = ("Interaction_T1_1", "Sequence_T2_5", "Prediction_T3_8", "Feasibility_T4_2")


def record(index: int, **changes: Any) -> dict[str, Any]:
    """A line of predictions_val.jsonl."""
    values = {"index": index, "qid": str(index), "video": "007", "type": "CW", "answer": None}
    return {**values, "scores": [0.5, 0.25, 1.0], "prediction": index % 3, **changes}


def written(tmp_path: Path, records: list[Any], *flags: str) -> Any:
    """What the command writes for these records."""
    source, target = tmp_path / "predictions_test.jsonl", tmp_path / "out.json"
    source.write_text("".join(json.dumps(line) + "\n" for line in records))
    target.unlink(missing_ok=True)
    assert main([str(source), "--output", str(target), *flags]) == 0
    return json.loads(target.read_text())


def test_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [record(0), record(1, answer=2)]
    assert written(tmp_path, records, "--format", "nextqa") == {
        "007_0": {"prediction": 0},
        "007_1": {"prediction": 1, "answer": 2},
    }
    assert written(tmp_path, records, "--format", "tvqa") == {"0": 0, "1": 1}
    assert "out.json: 2 used of 2 total questions; --data_path also" in capsys.readouterr().out
    star = [record(i, qid=qid) for i, qid in enumerate(STAR_IDS)]
    assert written(tmp_path, star, "--format", "star") == {
        "Interaction": [{"question_id": "Interaction_T1_1", "answer": 0}],
        "Sequence": [{"question_id": "Sequence_T2_5", "answer": 1}],
        "Prediction": [{"question_id": "Prediction_T3_8", "answer": 2}],
        "Feasibility": [{"question_id": "Feasibility_T4_2", "answer": 0}],
    }


def test_missing_questions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused, or counted with --partial; --data_path knows those behind the last."""
    source, target = tmp_path / "predictions_test.jsonl", tmp_path / "out.json"
    flags = ["--format", "nextqa"]
    command = [str(source), "--output", str(target), *flags]
    some = [record(0), record(2)]
    written(tmp_path, some, *flags, "--partial")
    assert "2 used of 3 total questions" in capsys.readouterr().out
    target.unlink()
    error = refusal(main, command)
    assert "2 used of 3 total questions, 'number 1' is the first that is missing; eval" in error
    folder = tmp_path / "data" / "nextqa"
    folder.mkdir(parents=True)
    head = "video,qid,type,question,answer,a0,a1,a2,a3,a4\n"
    rows = "".join(f"007,{i},CW,why,0,a,b,c,d,e\n" for i in range(4))
    (folder / "val.csv").write_text(head + rows)
    data = ["--data_path", str(tmp_path / "data"), "--split", "val"]
    error = refusal(main, [*command, *data])
    assert "2 used of 4 total questions, '007_1' is the first that is missing" in error
    written(tmp_path, [record(i) for i in range(4)], *flags, *data)
    assert capsys.readouterr().out.endswith("4 used of 4 total questions\n")
    target.unlink()
    source.write_text(json.dumps(record(0, video="008")) + "\n")
    assert "question '008_0' is none of the 4 of the data" in refusal(main, [*command, *data])


FAULTS: list[tuple[Any, str]] = [
    (7, "predictions_test.jsonl:2: a number where an object is expected"),
    (record(1, prediction=3), ":2: 'prediction' is 3 and must be a whole number from 0 to 2"),
    (record(1, prediction=True), ":2: 'prediction' is True and must be"),
    (record(1, prediction=None), ":2: 'prediction' is None and must be"),
    (record(1, answer=-1), ":2: 'answer' is -1 and must be a whole number from 0 to 2"),
    (record(-1), ":2: 'index' is -1 and must be a whole number at least 0"),
    (record(1, scores=[]), ":2: 'scores' is [] and must be a list"),
    (record(1, qid=1), ":2: 'qid' is 1 and must be a text; name the predictions_SPLIT.jsonl"),
    (record(1, qid="0"), "question '0' appears twice; evaluate again, or keep one line"),
]


@pytest.mark.parametrize(("line", "message"), FAULTS)
def test_faults(tmp_path: Path, line: Any, message: str) -> None:
    source, target = tmp_path / "predictions_test.jsonl", tmp_path / "out.json"
    source.write_text(f"{json.dumps(record(0))}\n{json.dumps(line)}\n")
    command = [str(source), "--output", str(target), "--format", "tvqa"]
    assert message in refusal(main, command)
    assert not target.exists()


def test_what_is_no_submission(tmp_path: Path) -> None:
    source, target = tmp_path / "predictions_test.jsonl", tmp_path / "out.json"
    command = [str(source), "--output", str(target), "--format", "star"]
    assert "no such file; the file of predictions should be there" in refusal(main, command)
    source.write_text(json.dumps(record(0, qid="Why_1")) + "\n")
    message = "question 'Why_1' is none of STAR's: its id begins with none of Interaction, Seq"
    assert message in refusal(main, command)
    source.write_text('{"index": 0\n')
    assert "predictions_test.jsonl:1: column" in refusal(main, command)
    target.touch()
    assert "already exists; name another file, or remove it" in refusal(main, command)


def test_it_is_a_module_too() -> None:
    """The command's own name stands in its help."""
    run = run_command([sys.executable, "-m", "vico.cli.submission", "--help"], seconds=60)
    assert run.codes == [0] and run.stdouts[0].startswith("usage: vico submission ")
