"""--keep on other ranks and ZeRO stages: the update of one rank, up to the order of sums."""

import json
from pathlib import Path

import pytest
import torch

from support.processes import ROOT, succeeds
from support.toy_dataset import ToyData
from support.training import Run

TEXT = "a man and a dog run. the cat smiles? why does the man hold it.\n" * 12
STEPS = "--epochs 1 --warmup_epochs 0 --lr 0.02 --bias 0.7 --no_eval --keep 3".split()
MICRO_BATCHES = 6  # of one question each, in a step


def train(toy: ToyData, folder: Path, ranks: int, ds_config: Path | str) -> Run:
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    own = ["--accum_iter", MICRO_BATCHES // ranks, "--batch_size", 1, "--deepspeed", ds_config]
    words = ["train", *toy.flags, *STEPS, *own, "--text", folder / "text.txt"]
    succeeds(*map(str, [*words, "--output_dir", folder / "out"]), ranks=ranks)
    return Run(folder / "out")


@pytest.fixture(scope="module")
def one(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(toy, tmp_path_factory.mktemp("one"), 1, "zero2")


@pytest.mark.parametrize(
    ("ranks", "stage"),
    [
        (2, "zero3"),
        pytest.param(2, "zero2", marks=pytest.mark.slow),
        pytest.param(1, "zero3", marks=pytest.mark.slow),
    ],
)
def test_twins_of_one_rank(toy: ToyData, tmp_path: Path, one: Run, ranks: int, stage: str) -> None:
    """Unequal shares: the last step has 2 questions of 20. Under ZeRO-3 all is partitioned."""
    config = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text(encoding="utf-8"))
    if stage == "zero3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps(config), encoding="utf-8")
    other = train(toy, tmp_path, ranks, ds_config)
    last = one.steps[-1]["step"]
    for record, same in zip(one.steps, other.steps, strict=True):
        assert record["keep_targets"] == same["keep_targets"] > 0
        assert record["keep_loss"] == pytest.approx(same["keep_loss"], rel=1e-4, abs=1e-6)
    assert one.steps[-1]["keep_loss"] > 1e-5
    for name, value in one.tensors(last).items():
        assert torch.allclose(other.tensors(last)[name], value, rtol=1e-3, atol=1e-4), name
