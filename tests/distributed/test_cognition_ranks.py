"""`vico cognition` on two ranks under ZeRO-3: the numbers of one rank, bit for bit.

Texts, questions and tasks of lm-evaluation-harness.
"""

import json
from pathlib import Path

import pytest

from support.asked_world import AskedWorld
from support.language_tasks import OPENINGS, write_tasks
from support.processes import ROOT, succeeds
from support.toy_dataset import ToyData

TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 200


def test_two_ranks(toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three batches of text, so one rank runs a dummy; and questions without their video."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hugging_face"))
    asked, text = AskedWorld(tmp_path / "world", toy), tmp_path / "a.txt"
    text.write_text(TEXT)
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps(config))
    names = write_tasks(tmp_path / "tasks", ["the dog"] * len(OPENINGS))
    words = ["cognition", "--resume", asked.run, "--text", text, "--questions"]
    words += ["--attention_shares", 60]  # all of them: batches of unequal numbers
    words += ["--tasks", *names, "--include_path", tmp_path / "tasks", "--deepspeed"]
    results = []
    for ranks, ds_config in ((1, "zero2"), (2, zero3)):
        run = succeeds(*map(str, [*words, ds_config]), ranks=ranks)
        results.append(json.loads(run.stdouts[0].splitlines()[-1]))
    assert results[0]["tokens"] > 2 * 2048
    assert len(results[0]["tasks"]) == len(names)
    assert results[1] == results[0]
