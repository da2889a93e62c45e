"""A checkpoint on other numbers of ranks and ZeRO stages, and the memory that loading takes."""

import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch

from reference import oracle_files
from support.processes import ROOT, start, succeeds
from support.toy_dataset import ToyData, records

pytestmark = pytest.mark.xdist_group("scale")  # each setup trains once
# 3 steps of 8 questions an epoch.
FLAGS = "--epochs 5 --warmup_epochs 1 --lr 0.02 --bias 0.7 --save_steps 5".split()
LOAD_MEMORY = (str(ROOT / "tests" / "support" / "load_memory.py"),)
LOADED_STATE = (str(ROOT / "tests" / "support" / "loaded_state.py"),)
RESUMED_LOSS_RTOL = 1e-6  # the ranks' sums are added in another order


@dataclass(frozen=True)
class Setup:
    ranks: int
    stage: int
    nodes: int = 1

    def __str__(self) -> str:
        return f"{self.ranks}-ranks-on-{self.nodes}-zero{self.stage}"

    def succeeds(self, *arguments: str) -> None:
        run = start(*arguments, ranks=self.ranks, environment=self.environment)
        assert run.wait() == [0] * self.ranks, run.output

    @property
    def environment(self) -> dict[str, str]:
        """Under ZeRO-3 each node holds all frozen weights."""
        return {"LOCAL_WORLD_SIZE": str(self.ranks // self.nodes)}


SETUPS = [Setup(ranks, stage) for ranks, stage in itertools.product((1, 2, 4), (2, 3))]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return ToyData(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ds_config that partitions even the small tensors of a toy model."""
    path = tmp_path_factory.mktemp("ds") / "zero3.json"
    config = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(config))
    return str(path)


def test_memory_of_loading(tmp_path: Path, zero3: str) -> None:
    """A rank needs its share and about one tensor: 370 MB of fp32 in two shards, on two ranks."""
    oracle_files.write_tiny_meta(
        tmp_path / "m", 30000, dim=768, n_layers=6, n_heads=12, multiple_of=256, shards=2
    )
    run = start(str(tmp_path / "m"), zero3, ranks=2, program=LOAD_MEMORY, forks=False)
    assert run.wait() == [0, 0], run.output
    for stdout in run.stdouts:
        mib = json.loads(stdout.splitlines()[-1])
        assert mib["share"] > 170 and mib["largest"] > 80
        assert mib["growth"] > 0.9 * mib["share"], mib
        assert mib["growth"] <= mib["share"] + 1.5 * mib["largest"], mib


class Runs:
    """Whole runs, one of each setup, made when first needed."""

    def __init__(self, toy: ToyData, zero3: str, folder: Path) -> None:
        self.toy, self._zero3, self._folder = toy, zero3, folder

    def flags(self, setup: Setup) -> list[str]:
        ds_config = self._zero3 if setup.stage == 3 else "zero2"
        batch_size = str(8 // setup.ranks)
        return [*self.toy.flags, *FLAGS, "--batch_size", batch_size, "--deepspeed", ds_config]

    def whole(self, setup: Setup) -> Path:
        """The output folder of the run of this setup."""
        folder = self._folder / str(setup)
        if not folder.exists():
            flags = [*self.flags(setup), "--output_dir", str(folder)]
            setup.succeeds("train", *flags)
        return folder

    def loaded_digest(self, checkpoint: Path, setup: Setup) -> str:
        """sha256 of the tensors that an engine of this setup holds after loading the checkpoint."""
        flags = [*self.flags(setup), "--resume", str(checkpoint)]
        where = setup.environment
        run = start(*flags, ranks=setup.ranks, program=LOADED_STATE, environment=where)
        assert run.wait() == [0] * setup.ranks, run.output
        return run.stdouts[0].split("state ")[1].strip()


@pytest.fixture(scope="module")
def runs(toy: ToyData, zero3: str, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(toy, zero3, tmp_path_factory.mktemp("runs"))


def written_digest(checkpoint: Path) -> str:
    """sha256 of a checkpoint's tensors, in the way of support/loaded_state.py."""
    tensors = {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors |= safetensors.torch.load_file(checkpoint / name)
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def copy_run_at(step: int, source: Path, target: Path) -> None:
    """The output folder as it was when this step had just been saved, without its logs."""
    target.mkdir()
    shutil.copy(source / "args.json", target)
    shutil.copytree(source / f"checkpoint-{step}", target / f"checkpoint-{step}")


def losses_by_step(folder: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(folder / "steps.jsonl")}


def check_resume(runs: Runs, saved_on: Setup, resumed_on: Setup, folder: Path) -> None:
    """From step 5, in the middle of an epoch.

    The engine loads the bits that were saved, the ten losses after it are the same, and on the same
    setup the end is the same to the bit.
    """
    whole = runs.whole(saved_on)
    saved_digest = written_digest(whole / "checkpoint-5")
    assert runs.loaded_digest(whole / "checkpoint-5", resumed_on) == saved_digest
    copy_run_at(5, whole, folder)
    flags = [*runs.flags(resumed_on), "--output_dir", str(folder)]
    resumed_on.succeeds("train", *flags)
    expected, losses = losses_by_step(whole), losses_by_step(folder)
    assert list(losses) == list(range(6, 16))
    for step, loss in losses.items():
        assert loss == pytest.approx(expected[step], rel=RESUMED_LOSS_RTOL), step
    if saved_on == resumed_on:
        assert written_digest(folder / "checkpoint-15") == written_digest(whole / "checkpoint-15")


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        pytest.param(Setup(4, 3), Setup(1, 2), marks=pytest.mark.slow),
        pytest.param(Setup(4, 3, nodes=2), Setup(1, 2), marks=pytest.mark.slow),
        pytest.param(Setup(4, 3, nodes=2), Setup(4, 3, nodes=2), marks=pytest.mark.slow),
        pytest.param(Setup(1, 2), Setup(4, 3, nodes=2), marks=pytest.mark.slow),
        pytest.param(Setup(4, 3, nodes=2), Setup(4, 3), marks=pytest.mark.slow),
        (Setup(1, 2), Setup(2, 3)),
    ],
    ids=str,
)
def test_resume_elsewhere(runs: Runs, saved_on: Setup, resumed_on: Setup, tmp_path: Path) -> None:
    check_resume(runs, saved_on, resumed_on, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("saved_on", SETUPS, ids=str)
@pytest.mark.parametrize("resumed_on", SETUPS, ids=str)
def test_resume_anywhere(runs: Runs, saved_on: Setup, resumed_on: Setup, tmp_path: Path) -> None:
    check_resume(runs, saved_on, resumed_on, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("setup", [Setup(1, 2), Setup(2, 2), Setup(2, 3)], ids=str)
def test_resume_from_every_step(runs: Runs, setup: Setup, tmp_path: Path) -> None:
    """Each checkpoint of two epochs leads, alone, to the bits of the run that never stopped."""
    flags = [*runs.flags(setup), "--epochs", "2", "--save_steps", "1"]
    whole = tmp_path / "whole"
    succeeds("train", *flags, "--output_dir", str(whole), ranks=setup.ranks)
    last_digest = written_digest(whole / "checkpoint-6")
    predictions = (whole / "predictions_val.jsonl").read_bytes()
    for step in range(1, 6):
        folder = tmp_path / str(step)
        copy_run_at(step, whole, folder)
        run = succeeds("train", *flags, "--output_dir", str(folder), ranks=setup.ranks)
        assert f"resuming from step {step}\n" in run.output
        assert written_digest(folder / "checkpoint-6") == last_digest, step
        assert (folder / "predictions_val.jsonl").read_bytes() == predictions
