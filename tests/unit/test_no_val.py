"""Training without a val split: --no_eval, or --split test in its place."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from support.annotation_files import put
from support.toy_dataset import ToyData, records
from support.training import Run
from vico.cli.main import main
from vico.distributed import world as dist
from vico.distributed.world import World

STEPS = "--dataset my --batch_size 10 --epochs 2 --warmup_epochs 1 --lr 0.02 --cap 0".split()


@pytest.fixture(autouse=True)
def in_this_process(alone: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "connect", lambda *_: alone)
    monkeypatch.setattr(dist, "disconnect", lambda *_: None)


@pytest.fixture
def my(toy: ToyData, tmp_path: Path) -> Path:
    """A data set with train alone."""
    folder = tmp_path / "data" / "my"
    folder.mkdir(parents=True)
    shutil.copy(toy.data / "clipvitl14.pth", folder)
    put(folder / "train.jsonl", [dict(row) for row in toy.rows["train"]])
    return folder


@pytest.fixture
def flags(toy: ToyData, my: Path) -> list[str]:
    return [*toy.flags, *STEPS, "--data_path", str(my.parent)]


def out(folder: Path, name: str) -> list[str]:
    return ["--output_dir", str(folder / name)]


def put_split(toy: ToyData, my: Path, split: str, answered: bool = True) -> None:
    rows = [dict(row) for row in toy.rows["val"]]
    for row in rows if not answered else ():
        del row["answer"]
    put(my / f"{split}.jsonl", rows)


def test_one_line_names_both_remedies(
    toy: ToyData, my: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    says = (
        f"{my}/val.jsonl: no such file, and each epoch is evaluated on val; put it there, or "
        "train without evaluation (--no_eval) or on test (--split test)\n"
    )
    for command in ("train", "check"):
        assert main([command, *flags, *out(tmp_path, "out")]) == 2
        assert capfd.readouterr().err == f"vico: error: {says}"
    put_split(toy, my, "test", answered=False)
    assert main(["train", *flags, "--split", "test", *out(tmp_path, "out")]) == 2
    assert "test.jsonl:1: the test questions have no answers, so no" in capfd.readouterr().err


def test_training_without_evaluation(
    toy: ToyData, my: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """It trains as with evaluation, bit for bit, resumes exactly, and keeps no best checkpoint."""
    no_eval = [*flags, "--no_eval"]
    assert main(["train", *no_eval, *out(tmp_path, "cut"), "--max_steps", "1"]) == 0
    printed = capfd.readouterr().out
    assert printed.count("--no_eval: no epoch is evaluated, so no checkpoint_best is kept") == 1
    assert "best" not in printed.replace("checkpoint_best is kept", "")
    assert main(["check", *no_eval, *out(tmp_path, "cut")]) == 0
    assert "continues from step 1" in capfd.readouterr().out
    assert main(["train", *no_eval, *out(tmp_path, "cut")]) == 0
    assert main(["train", *no_eval, *out(tmp_path, "cut")]) == 0
    assert "this run is complete at step 4 of 4" in capfd.readouterr().out
    cut = Run(tmp_path / "cut")
    assert not [p.name for p in cut.folder.iterdir() if "best" in p.name or "predict" in p.name]
    assert [record["step"] for record in cut.epochs] == [1, 2, 4]
    assert not [key for record in cut.epochs for key in record if key.startswith(("val", "None"))]

    put_split(toy, my, "val")
    assert main(["train", *flags, *out(tmp_path, "whole")]) == 0
    whole = Run(tmp_path / "whole")
    for name, value in whole.tensors(4).items():
        assert torch.equal(cut.tensors(4)[name], value), name
    capfd.readouterr()
    assert main(["eval", "--resume", str(cut.folder)]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert result["acc"] == whole.epochs[-1]["val_acc"] and result["split"] == "val"
    target = str(tmp_path / "export")
    assert main(["export", str(cut.folder), target]) == 0
    assert "None are recorded" in (tmp_path / "export" / "README.md").read_text()


def test_evaluation_begins_and_ends(
    toy: ToyData, my: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A run goes on with evaluation, and without again; its best checkpoint stays."""
    run = [*flags, *out(tmp_path, "out")]
    assert main(["train", *run, "--no_eval", "--max_steps", "1"]) == 0
    put_split(toy, my, "val")
    assert main(["train", *run, "--max_steps", "2"]) == 0
    printed = capfd.readouterr().out
    assert "epochs were evaluated on no split, and are on val now: of the data, " in printed
    best = (tmp_path / "out" / "checkpoint_best" / "state.json").read_text()
    assert main(["train", *run, "--no_eval"]) == 0
    assert (tmp_path / "out" / "checkpoint_best" / "state.json").read_text() == best
    rows = [dict(row, question="another") for row in toy.rows["train"]]
    put(my / "train.jsonl", rows)
    assert main(["train", *run, "--no_eval", "--epochs", "3"]) == 2
    assert "data train questions" in capfd.readouterr().err


def test_test_in_the_place_of_val(
    toy: ToyData, my: Path, flags: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Epochs are evaluated on it, under its name; where there is a val, that stays the split."""
    put_split(toy, my, "test")
    run = [*flags, "--split", "test", *out(tmp_path, "out")]
    assert main(["train", *run, "--max_steps", "2"]) == 0
    assert "--split test: there is no val, so epochs are evaluated" in capfd.readouterr().out
    (record,) = records(tmp_path / "out" / "log.txt")
    assert record["test_acc"] >= 0 and "val_acc" not in record
    assert len(records(tmp_path / "out" / "predictions_test.jsonl")) == 10
    assert main(["eval", "--resume", str(tmp_path / "out")]) == 2
    says = f"{my}/val.jsonl: no such file; put it there, or evaluate on test (--split test)"
    assert says in capfd.readouterr().err
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "export")]) == 0
    assert "my test, 10 used of 10 questions" in (tmp_path / "export" / "README.md").read_text()
    put_split(toy, my, "val")
    assert main(["train", *run]) == 0
    printed = capfd.readouterr().out
    assert "--split test: epochs are evaluated on val; " in printed
    assert "epochs were evaluated on test, and are on val now" in printed
    assert records(tmp_path / "out" / "log.txt")[-1]["val_acc"] >= 0
