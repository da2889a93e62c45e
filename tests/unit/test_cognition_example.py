"""launch/examples/cognition.sh: its texts, and the table that it makes of runs."""

import json
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from support.asked_world import NUM_QUESTIONS, AskedWorld
from support.processes import ROOT
from support.toy_dataset import ToyData
from vico.cli.main import main

sys.path.insert(0, str(ROOT / "launch" / "examples"))
import cognition

SCRIPT = ROOT / "launch" / "examples" / "cognition.sh"


def test_no_page_is_kept_and_measured(tmp_path: Path) -> None:
    assert cognition.main(["texts", str(tmp_path / "texts")]) == 0
    kept, measured = (
        (tmp_path / "texts" / f"{name}.txt").read_text(encoding="utf-8")
        for name in ("kept", "manual")
    )
    assert len(kept) == cognition.KEPT and len(measured) == cognition.MANUAL
    for page in topics.values():
        assert not (page in kept and page in measured)
    assert sum(page in kept for page in topics.values()) >= 5
    assert sum(page in measured for page in topics.values()) >= 5


def test_other_kinds_of_text_are_measured(tmp_path: Path) -> None:
    assert cognition.main(["texts", str(tmp_path)]) == 0
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {"kept", *cognition.TEXTS}
    assert "class Fraction(" in (tmp_path / "code.txt").read_text(encoding="utf-8")
    assert "Apache License" in (tmp_path / "licence.txt").read_text(encoding="utf-8")


def test_every_row_is_trained() -> None:
    """The script trains the rows that the table names, in their order."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("row ")] == list(cognition.ROWS)


def test_the_table_of_what_the_commands_print(
    toy: ToyData,
    in_this_process: None,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Real measurements of one checkpoint, as those of every run: its figures, and its record."""
    asked = AskedWorld(tmp_path / "world", toy)
    texts = [tmp_path / f"{name}.txt" for name in cognition.TEXTS]
    for i, text in enumerate(texts):
        text.write_text("a man and a dog run. why does the man hold it?\n" * (i + 1))
    lines = {}
    for command, words in (("ablate", ()), ("cognition", ("--text", *map(str, texts)))):
        capsys.readouterr()
        assert main([command, "--resume", str(asked.run), *words]) == 0
        lines[command] = capsys.readouterr().out.splitlines()[-1]
    for name in cognition.ROWS:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "ablate.json").write_text(lines["ablate"])
        (run / "texts.json").write_text(lines["cognition"])
        steps = [{"step": step, "epoch": 0, "step_seconds": 30.0} for step in (1, 2)]
        (run / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "out").mkdir()
    assert cognition.main(["table", str(tmp_path / "runs"), str(tmp_path / "out")]) == 0
    table = capsys.readouterr().err.splitlines()
    (path,) = (tmp_path / "out").iterdir()
    record = json.loads(path.read_text(encoding="utf-8"))
    measured = json.loads(lines["cognition"])
    frozen, trained, *others = record["cases"]
    assert [frozen["name"], trained["name"]] == ["frozen", "trained"] and len(others) == 5
    assert frozen["questions"] == NUM_QUESTIONS
    for text in texts:
        of_text = measured["files"][str(text)]
        of_frozen, of_trained = (row["texts"][text.stem] for row in (frozen, trained))
        assert of_frozen["tokens"] == of_trained["tokens"] == of_text["tokens"]
        assert of_frozen["perplexity"] == of_text["perplexity_frozen"]
        assert of_trained["perplexity"] == of_text["perplexity_adapted"] != of_frozen["perplexity"]
        assert of_trained["kl_per_token"] == of_text["kl_per_token"] > 0
        assert of_frozen["kl_per_token"] == 0 and of_frozen["top1_agreement"] == 1
    assert trained["steps"] == 2 and trained["training_minutes"] == 1
    accuracies = json.loads(lines["ablate"])["conditions"]
    for key, condition in (
        ("accuracy", "as_trained"),
        ("video_swapped", "video_swapped"),
        ("without_video", "without_video"),
    ):
        assert trained[key] == accuracies[condition]["acc"]
    assert "accuracy" not in frozen, "of text alone: not to stand beside those with video"
    assert frozen["without_video"] == accuracies["without_both"]["acc"]
    assert [trained[key] for key in ("commit", "seconds", "settings")] == [None] * 3
    assert record["commits"] == ["unknown"] and record["seconds"] is None
    head = next(i for i, line in enumerate(table) if line.startswith("|  | accuracy"))
    rows = [line.strip("|").split("|") for line in table[head + 2 : head + 9]]
    assert len(rows) == 7 and {len(row) for row in rows} == {len(cognition.COLUMNS)}
    assert rows[0][0].strip() == "frozen LLaMA" and rows[0][1].strip() == rows[0][2].strip() == "-"
    assert rows[0][3].strip() != "-"
    code = measured["files"][str(texts[1])]
    assert rows[1][5].strip() == f"{code['perplexity_adapted']:.2f} ({code['kl_per_token']:.4f})"
