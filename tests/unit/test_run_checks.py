"""What an evaluation looks at again, and what a run writes of an epoch, to the last number."""

import shutil
from pathlib import Path

import pytest

from faults.emulated_ranks import EmulatedWorld, Scorer
from support.toy_dataset import ToyData
from support.training_steps import config_of
from vico.distributed.world import World
from vico.errors import TrainingError
from vico.io import file_cache
from vico.io.file_cache import FileCache
from vico.train import start as starting
from vico.train.build import read_inputs
from vico.train.config import RunConfig
from vico.train.evaluate import evaluate
from vico.train.log_records import EpochResult, epoch_record, total_loss


@pytest.fixture
def own(toy: ToyData, tmp_path: Path) -> RunConfig:
    """The settings of an evaluation of data that a test may change."""
    shutil.copytree(toy.folder / "data", tmp_path / "data")
    return config_of(toy, "--data_path", str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["val.csv", "clipvitl14.pth"])
def test_an_evaluation_of_changed_files_is_refused(name: str, own: RunConfig, alone: World) -> None:
    """Scores of a file that was written since it was read belong to neither."""
    world = EmulatedWorld(0, 1, alone.device, None)
    inputs = read_inputs(own, ("val",), world)
    arguments = (Scorer(), inputs, "val", own, world)
    scores = evaluate(*arguments).scores  # type: ignore[arg-type]
    assert len(scores) == len(inputs.questions["val"])
    path = own.data_path / "nextqa" / name
    with path.open("ab") as file:
        file.write(b"\n")
    with pytest.raises(TrainingError, match=f"{name}: .*changed"):
        evaluate(*arguments)  # type: ignore[arg-type]


def test_what_was_measured_is_remembered(
    own: RunConfig, alone: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For the next start of an evaluation, once all ranks have compared their files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_cache, "SETTLED_SECONDS", -1.0)
    inputs = read_inputs(own, ("val",), alone)
    found = {*inputs.cache._new}
    assert found and not found & FileCache()._entries.keys()
    starting._fingerprints(own, inputs, ("val",), {}, alone)
    assert found <= FileCache()._entries.keys()
    again = read_inputs(own, ("val",), alone)
    assert again.cache._new.keys() < found, "the rest is not measured again"


def test_the_record_of_an_epoch_that_is_not_evaluated() -> None:
    """Each task's loss under its name, and their weighted sum; a task without targets has none."""
    config = RunConfig(vaq=True, cap=0.5)
    assert config.tasks == ("vqa", "cap", "vaq")
    assert total_loss(config, [1.0, 3.0, 0.25]) == 1.0 + 0.5 * 3.0 + 0.25
    assert total_loss(config, [1.0, None, 0.25]) == 1.25
    result = EpochResult(3, 12, 0.125, [1.0, None, 0.25], 7, None, None, 0.0, is_best=False)
    assert epoch_record(config, result) == {
        "train_loss": 1.25,
        "train_vqa_loss": 1.0,
        "train_cap_loss": None,
        "train_vaq_loss": 0.25,
        "train_n_without_caption": 7,
        "train_lr": 0.125,
        "epoch": 3,
        "step": 12,
    }
