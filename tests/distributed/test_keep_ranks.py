"""--keep on two ranks under ZeRO-3: the update of one rank, up to the order of sums."""

import json
from pathlib import Path

import pytest
import torch

from support.processes import ROOT, succeeds
from support.toy_dataset import ToyData
from support.training import Run

TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 12
STEPS = "--epochs 1 --warmup_epochs 0 --lr 0.02 --bias 0.7 --no_eval --keep 3".split()


def test_two_ranks(toy: ToyData, tmp_path: Path) -> None:
    """Unequal shares: 7 questions a step in micro-batches of one; a rank runs a dummy."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text(encoding="utf-8"))
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    zero3 = tmp_path / "zero3.json"
    zero3.write_text(json.dumps(config), encoding="utf-8")
    runs = []
    for ranks, accumulation, ds_config in ((1, 6, "zero2"), (2, 3, zero3)):
        out = tmp_path / f"{ranks}"
        own = ["--accum_iter", accumulation, "--batch_size", 1, "--deepspeed", ds_config]
        words = ["train", *toy.flags, *STEPS, *own, "--text", tmp_path / "text.txt"]
        succeeds(*map(str, [*words, "--output_dir", out]), ranks=ranks)
        runs.append(Run(out))
    one, two = runs
    last = one.steps[-1]["step"]
    for record, same in zip(one.steps, two.steps, strict=True):
        assert record["keep_targets"] == same["keep_targets"] > 0
        assert record["keep_loss"] == pytest.approx(same["keep_loss"], rel=1e-4, abs=1e-6)
    assert one.steps[-1]["keep_loss"] > 1e-5
    for name, value in one.tensors(last).items():
        assert torch.allclose(two.tensors(last)[name], value, rtol=1e-3, atol=1e-4), name
