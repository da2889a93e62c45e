"""`vico cognition` on two ranks under ZeRO-3: the numbers of one rank, bit for bit."""

import json
from pathlib import Path

from support.asked_world import AskedWorld
from support.processes import ROOT, succeeds
from support.toy_dataset import ToyData

TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 200


def test_two_ranks(toy: ToyData, tmp_path: Path) -> None:
    """Three batches of text, so one rank runs a dummy; and questions without their video."""
    asked, text = AskedWorld(tmp_path / "world", toy), tmp_path / "a.txt"
    text.write_text(TEXT)
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps(config))
    words = ["cognition", "--resume", asked.run, "--text", text, "--questions", "--deepspeed"]
    results = []
    for ranks, ds_config in ((1, "zero2"), (2, zero3)):
        run = succeeds(*map(str, [*words, ds_config]), ranks=ranks)
        results.append(json.loads(run.stdouts[0].splitlines()[-1]))
    assert results[0]["tokens"] > 2 * 2048
    assert results[1] == results[0]
