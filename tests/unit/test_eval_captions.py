"""--eval_captions: captions with each evaluation, and a training that they do not change."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.toy_dataset import ToyData, records
from support.training import Run
from vico.cli.main import main
from vico.distributed import world as dist
from vico.distributed.world import World
from vico.generation.caption_metrics import caption_metrics
from vico.io.atomic import write_json
from vico.io.text import read_json_object
from vico.planner.estimate import SHIPPED_CONFIGS

STEPS = "--batch_size 10 --epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7".split()
METRICS = {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}


@pytest.fixture(autouse=True)
def in_this_process(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)


def train(toy: ToyData, out: Path, *flags: str) -> int:
    return main(["train", *toy.flags, *STEPS, "--output_dir", str(out), *flags])


def zero3(folder: Path) -> str:
    """A ds_config of ZeRO-3 that divides even the smallest tensor."""
    config = read_json_object(SHIPPED_CONFIGS / "zero3.json", "ds_configs/zero3.json")
    config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    write_json(folder / "zero3.json", config)
    return str(folder / "zero3.json")


@pytest.mark.parametrize("stage", [2, 3])
def test_training_is_the_same_and_captions_are_logged(
    toy: ToyData, tmp_path: Path, stage: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Three videos, of the four that val has; the metrics are those of what is written."""
    deepspeed = ("--deepspeed", "zero2" if stage == 2 else zero3(tmp_path))
    assert train(toy, tmp_path / "without", *deepspeed) == 0
    capfd.readouterr()
    assert train(toy, tmp_path / "with", *deepspeed, "--eval_captions", "3") == 0
    assert (
        "captions of 3 val videos with each evaluation; they begin with " in capfd.readouterr().out
    )
    without, run = Run(tmp_path / "without"), Run(tmp_path / "with")
    for name, value in without.tensors(4).items():
        assert torch.equal(run.tensors(4)[name], value), name

    last = run.epochs[-1]
    new = {name.removeprefix("val_") for name in last.keys() - without.epochs[-1].keys()}
    assert new == {*METRICS, "n_captions"} and last["val_n_captions"] == 3
    written = records(run.folder / "captions_val.jsonl")
    videos = [row["video"] for row in toy.rows["val"]][:3]
    assert [row["video"] for row in written] == videos
    assert [row["references"] for row in written] == [[toy.captions[video]] for video in videos]
    texts = {row["video"]: row["caption"] for row in written}
    references = {row["video"]: row["references"] for row in written}
    metrics = caption_metrics(texts, references, meteor=False)
    assert {name: last[f"val_{name}"] for name in METRICS} == {
        name: metrics[name] for name in METRICS
    }
    board = EventAccumulator(str(run.folder / "runs"))
    board.Reload()
    for name in METRICS:
        assert [event.step for event in board.Scalars(f"eval/{name}")] == [2, 4]


def refused(capfd: pytest.CaptureFixture[str]) -> str:
    error = capfd.readouterr().err
    assert error.startswith("vico: error: ") and error.count("\n") == 1
    return error


def test_what_is_refused(
    toy: ToyData,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for flags in (["--cap", "0"], ["--no_eval"]):
        assert train(toy, tmp_path / "out", "--eval_captions", "3", *flags) == 2
        assert "--eval_captions 3: must be left out with" in refused(capfd)
    of_train: dict[str, Any] = {v: c for v, c in toy.captions.items() if v.startswith("v")}
    (tmp_path / "captions.json").write_text(json.dumps(of_train))
    captions = ("--captions", str(tmp_path / "captions.json"))
    assert train(toy, tmp_path / "out", "--eval_captions", "3", *captions) == 2
    assert "--eval_captions 3: no video of val has a caption to compare with" in refused(capfd)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    assert train(toy, tmp_path / "out", "--eval_captions", "3") == 2
    assert "pip install -e '.[captions]'" in refused(capfd)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.txt"))
