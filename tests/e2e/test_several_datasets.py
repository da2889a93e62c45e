"""Whole commands over several data sets."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from support.mixed_datasets import NUM_VAL, mixed
from support.processes import ROOT, base_environment, run_command, succeeds
from support.toy_dataset import ToyData, records
from support.training import FLAGS, Run

MIXTURE = ["--dataset", "nextqa,star:0.5,tvqa:2.5", "--sub"]
# Commands in one process, separated by a word; each prints its name and its exit code.
PROGRAM = """
import sys
from vico.cli.main import main

if __name__ == "__main__":
    for line in " ".join(sys.argv[1:]).split(" THEN "):
        print("code", main(line.split()), flush=True)
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return mixed(tmp_path_factory.mktemp("mixed"))


def run_all(folder: Path, *commands: list[str]) -> list[str]:
    """What each command prints."""
    script, words = folder / "commands.py", []
    script.write_text(PROGRAM)
    for command in commands:
        words += [*command, "THEN"]
    run = run_command([sys.executable, str(script), *words[:-1]], ROOT, base_environment())
    *outputs, rest = run.stdouts[0].split("code 0\n")
    assert not rest and len(outputs) == len(commands), run.output
    return outputs


def result_of(output: str) -> dict[str, float | str]:
    result: dict[str, float | str] = json.loads(output.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def outputs(toy: ToyData, folder: Path) -> dict[str, str]:
    """What each command prints. All run in one process, because a start takes seconds."""
    train = ["train", *toy.flags, *FLAGS, "--batch_size", "8", "--output_dir"]
    whole, cut, one = (str(folder / name) for name in ("whole", "cut", "one"))
    of_whole = ["eval", "--resume", f"{whole}/checkpoint-10"]
    of_one = ["eval", "--resume", f"{one}/checkpoint-2", "--dataset"]
    commands = {
        "whole": [*train, whole, *MIXTURE],
        "cut": [*train, cut, *MIXTURE, "--max_steps", "7"],
        "resumed": [*train, cut, *MIXTURE],
        "evaluated": of_whole,
        "part": [*of_whole, "--dataset", "star"],
        "one": [*train, one, "--max_steps", "2"],
        "same": [*of_one, "nextqa:1"],
        "others": [*of_one, "star,tvqa", "--sub"],
    }
    return dict(zip(commands, run_all(folder, *commands.values()), strict=True))


def test_a_mixture_is_one_stream(outputs: dict[str, str], folder: Path) -> None:
    """The counts of an epoch are said, and the same bits result when the run is cut in two."""
    counts = "train: an epoch holds 20 of 20 nextqa, 4 of 9 star, 15 of 6 tvqa questions"
    assert counts in outputs["whole"].splitlines()
    assert "resuming from step 7" in outputs["resumed"]
    whole, cut = Run(folder / "whole"), Run(folder / "cut")
    for name, value in whole.tensors(10).items():
        assert torch.equal(cut.tensors(10)[name], value), name
    assert whole.predictions_text == cut.predictions_text


def test_each_data_set_has_its_accuracy(outputs: dict[str, str], folder: Path) -> None:
    """`acc` is over all questions, and chooses the best checkpoint."""
    whole = Run(folder / "whole")
    last, now = whole.epochs[-1], result_of(outputs["evaluated"])
    right = Counter(p["dataset"] for p in whole.predictions if p["prediction"] == p["answer"])
    assert Counter(p["dataset"] for p in whole.predictions) == NUM_VAL
    assert last["val_acc"] == now["acc"] == right.total() / 19
    for name, total in NUM_VAL.items():
        assert last[f"val_{name}_acc"] == now[f"{name}_acc"] == right[name] / total
        assert now[f"{name}_n"] == total
    assert last["val_star_Mean"] == (last["val_star_Interaction"] + last["val_star_Sequence"]) / 2
    part = result_of(outputs["part"])
    assert part["acc"] == last["val_star_acc"] and part["dataset"] == "star"
    assert "another data set" not in outputs["part"], "it was trained on that one"
    alone = records(whole.folder / "predictions_star_val.jsonl")
    own = [p for p in whole.predictions if p["dataset"] == "star"]
    for one, other in zip(alone, own, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-5)


def test_evaluation_on_another_data_set_says_so(outputs: dict[str, str], folder: Path) -> None:
    """In a line and in the result; and the run's own predictions stay."""
    run = Run(folder / "one")
    assert "another data set" not in outputs["same"]
    assert result_of(outputs["same"]).keys().isdisjoint(("dataset", "trained_on"))
    says = "was trained on nextqa, and is evaluated on star, tvqa: another data set"
    assert f"note: {run.folder}/checkpoint-2: {says}" in outputs["others"].splitlines()
    expected = {"split": "val", "dataset": "star,tvqa", "trained_on": "nextqa", "n": 9}
    assert result_of(outputs["others"]).items() >= expected.items()
    assert len(run.predictions) == 10 and "dataset" not in run.predictions[0]
    rows = records(run.folder / "predictions_star+tvqa_val.jsonl")
    assert Counter(row["dataset"] for row in rows) == {"star": 5, "tvqa": 4}


@pytest.mark.slow
def test_a_mixture_cut_in_two_on_two_ranks(toy: ToyData, tmp_path: Path) -> None:
    flags = ["train", *toy.flags, *FLAGS, *MIXTURE, "--batch_size", "4", "--num_workers", "1"]
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    succeeds(*flags, "--output_dir", str(whole.folder), ranks=2)
    in_two = [*flags, "--output_dir", str(cut.folder)]
    succeeds(*in_two, "--max_steps", "7", ranks=2)
    assert "resuming from step 7" in succeeds(*in_two, ranks=2).stdouts[0]
    for name, value in whole.tensors(10).items():
        assert torch.equal(cut.tensors(10)[name], value), name
