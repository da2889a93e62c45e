"""A run on other ranks and at another stage: the memory that loading takes, and what a checkpoint becomes there."""

import hashlib
import itertools
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch

from reference import oracle_files
from support.processes import ROOT, start, succeeds
from support.toy_dataset import ToyData, records

FLAGS = [
    "--epochs",
    "5",
    "--warmup_epochs",
    "1",
    "--lr",
    "0.02",
    "--bias",
    "0.7",
    "--save_steps",
    "5",
]  # 3 steps of 8 an epoch
SETUPS = list(itertools.product((1, 2, 4), (2, 3)))  # ranks, stage
RESUMED_LOSS_RTOL = 1e-6  # sums in another order


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return ToyData(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = (
        0  # else nothing of a toy is partitioned
    )
    path.write_text(json.dumps(config))
    return str(path)


def test_loading_takes_a_ranks_share_and_a_tensor(tmp_path: Path, zero3: str) -> None:
    """370 MB of fp32 in two shards of fp16, on two ranks."""
    oracle_files.write_tiny_meta(
        tmp_path / "m", 30000, dim=768, n_layers=6, n_heads=12, multiple_of=256, shards=2
    )
    program = (str(ROOT / "tests" / "support" / "load_memory.py"),)
    ended = start(str(tmp_path / "m"), zero3, ranks=2, program=program)
    assert ended.wait() == [0, 0], ended.output
    for said in ended.stdouts:
        found = json.loads(said.splitlines()[-1])
        assert found["share"] > 170 and found["largest"] > 80
        assert 0.9 * found["share"] < found["growth"] <= found["share"] + 1.5 * found["largest"], (
            found
        )


class Runs:
    """The whole run of each setup, made once."""

    def __init__(self, toy: ToyData, zero3: str, folder: Path) -> None:
        self.toy, self._zero3, self._folder = toy, zero3, folder

    def flags(self, ranks: int, stage: int) -> list[str]:
        how = [
            "--batch_size",
            str(8 // ranks),
            "--deepspeed",
            self._zero3 if stage == 3 else "zero2",
        ]
        return [*self.toy.flags, *FLAGS, *how]

    def whole(self, ranks: int, stage: int) -> Path:
        folder = self._folder / f"{ranks}-{stage}"
        if not folder.exists():
            succeeds("train", *self.flags(ranks, stage), "--output_dir", str(folder), ranks=ranks)
        return folder

    def loaded(self, checkpoint: Path, ranks: int, stage: int) -> str:
        """sha256 of what an engine of that setup holds."""
        args = [*self.flags(ranks, stage), "--resume", str(checkpoint)]
        program = (str(ROOT / "tests" / "support" / "loaded_state.py"),)
        ended = start(*args, ranks=ranks, program=program)
        assert ended.wait() == [0] * ranks, ended.output
        return ended.stdouts[0].split("state ")[1].strip()


@pytest.fixture(scope="module")
def runs(toy: ToyData, zero3: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(toy, zero3, tmp_path_factory.mktemp("runs"))


def written(checkpoint: Path) -> str:
    """sha256 of a checkpoint's tensors, as loaded_state.py says it."""
    tensors = {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors |= safetensors.torch.load_file(checkpoint / name)
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def resumes(
    runs: Runs, saved_on: tuple[int, int], resumed_on: tuple[int, int], folder: Path
) -> None:
    """From step 5, in the middle of an epoch: the same bits at load, the same ten losses after it, the same end where nothing differs."""
    whole = runs.whole(*saved_on)
    assert runs.loaded(whole / "checkpoint-5", *resumed_on) == written(whole / "checkpoint-5")
    folder.mkdir()
    shutil.copy(whole / "args.json", folder)
    shutil.copytree(whole / "checkpoint-5", folder / "checkpoint-5")
    succeeds("train", *runs.flags(*resumed_on), "--output_dir", str(folder), ranks=resumed_on[0])
    expected = {line["step"]: line["loss"] for line in records(whole / "steps.jsonl")}
    losses = {line["step"]: line["loss"] for line in records(folder / "steps.jsonl")}
    assert list(losses) == list(range(6, 16))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=RESUMED_LOSS_RTOL), step
    if saved_on == resumed_on:
        assert written(folder / "checkpoint-15") == written(whole / "checkpoint-15")


@pytest.mark.parametrize(("saved_on", "resumed_on"), [((4, 3), (1, 2)), ((1, 2), (2, 3))])
def test_a_run_moves(
    runs: Runs, saved_on: tuple[int, int], resumed_on: tuple[int, int], tmp_path: Path
) -> None:
    resumes(runs, saved_on, resumed_on, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("saved_on", SETUPS, ids=str)
@pytest.mark.parametrize("resumed_on", SETUPS, ids=str)
def test_a_run_moves_anywhere(
    runs: Runs, saved_on: tuple[int, int], resumed_on: tuple[int, int], tmp_path: Path
) -> None:
    resumes(runs, saved_on, resumed_on, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("setup", [(1, 2), (2, 2), (2, 3)], ids=str)
def test_from_every_save_point_comes_the_same_end(
    runs: Runs, setup: tuple[int, int], tmp_path: Path
) -> None:
    """A checkpoint behind each step of two epochs: each of them, alone, leads to the bits of the run that never stopped."""
    flags = [*runs.flags(*setup), "--epochs", "2", "--save_steps", "1"]
    whole = tmp_path / "whole"
    succeeds("train", *flags, "--output_dir", str(whole), ranks=setup[0])
    last = written(whole / "checkpoint-6")
    for step in range(1, 6):
        folder = tmp_path / str(step)
        folder.mkdir()
        shutil.copy(whole / "args.json", folder)
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        assert (
            f"resuming from step {step}\n"
            in succeeds("train", *flags, "--output_dir", str(folder), ranks=setup[0]).output
        )
        assert written(folder / "checkpoint-6") == last, step
        assert (folder / "predictions_val.jsonl").read_bytes() == (
            whole / "predictions_val.jsonl"
        ).read_bytes()
