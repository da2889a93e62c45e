"""What several whole-command tests share: an adapter to start from, and one run to compare with."""

import json
from pathlib import Path

import pytest

from reference import oracle, oracle_files
from support.processes import ROOT
from support.toy_dataset import ToyData
from support.training import HYPER, Run, train


@pytest.fixture(scope="session")
def start(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published checkpoint with `model` alone; gates are not 0, so that every trainable acts."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    params, _ = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(params, HYPER, seed=5, random_gates=True)
    oracle_files.save_published(path, trainables)
    return path


@pytest.fixture(scope="session")
def threshold_0(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shipped configs, those of stage 3 with threshold 0: toy tensors are partitioned too."""
    folder, paths = tmp_path_factory.mktemp("ds"), {"zero2": "zero2"}
    for name in ("zero3", "zero3_nodes", "zero3_offload"):
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        paths[name] = str(folder / f"{name}.json")
        Path(paths[name]).write_text(json.dumps(config), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def zero3(threshold_0: dict[str, str]) -> str:
    return threshold_0["zero3"]


@pytest.fixture(scope="session")
def reference(toy: ToyData, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, ZeRO-2, micro-batches of 8: 3 steps an epoch, the last of 4 questions."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    return train(toy, folder, "--resume", str(start), "--batch_size", "8")
