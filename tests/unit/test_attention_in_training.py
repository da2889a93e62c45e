"""--attention_shares in training: where attention goes, measured with each evaluation."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from support.toy_dataset import ToyData
from support.training import Run
from vico.cli.main import main
from vico.report.attention import PARTS, attention_charts
from vico.report.load import load_runs

STEPS = "--batch_size 10 --epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7".split()

pytestmark = pytest.mark.usefixtures("in_this_process")


def train(toy: ToyData, out: Path, *flags: str) -> int:
    return main(["train", *toy.flags, *STEPS, "--output_dir", str(out), *flags])


def last_line(capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(capfd.readouterr().out.splitlines()[-1])
    return result


def test_it_is_measured_and_changes_nothing(
    toy: ToyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of `vico cognition` and `vico eval`; in log.txt and as curves."""
    assert train(toy, tmp_path / "without") == 0
    assert train(toy, tmp_path / "with", "--attention_shares", "5") == 0
    without, run = Run(tmp_path / "without"), Run(tmp_path / "with")
    for name, value in without.tensors(4).items():
        assert torch.equal(run.tensors(4)[name], value), name
    assert run.epochs[-1].keys() - without.epochs[-1].keys() == {"attention"}

    checkpoint = ["--resume", str(run.folder / "checkpoint-4"), "--attention_shares", "5"]
    capfd.readouterr()
    assert main(["cognition", *checkpoint]) == 0
    expected = last_line(capfd)["attention"]
    assert main(["eval", *checkpoint]) == 0
    assert last_line(capfd)["attention"] == expected
    first, logged = (epoch["attention"] for epoch in run.epochs)
    assert {"split": "val", **logged} == expected
    (run.folder / "log.txt").rename(tmp_path / "log.txt")
    (layers,) = attention_charts(load_runs([run.folder]))
    assert "checkpoint-4, step 4:" in layers.caption, "as vico cognition has measured it"
    (tmp_path / "log.txt").rename(run.folder / "log.txt")
    assert logged["n"] == 5 and 0 < logged["prompt"] != first["prompt"]

    board = EventAccumulator(str(run.folder / "runs"))
    board.Reload()
    for part in PARTS:
        curve = board.Scalars(f"attention/{part}")
        assert [event.step for event in curve] == [2, 4]
        assert [event.value for event in curve] == pytest.approx([first[part], logged[part]])
        for row in logged["layers"]:
            of_layer = board.Scalars(f"attention/{part}/layer_{row['layer']:02}")
            assert of_layer[-1].value == pytest.approx(row[part])
    assert_charts(run, first, logged)


def assert_charts(run: Run, first: dict[str, Any], logged: dict[str, Any]) -> None:
    """Of the report: the shares over time, and those of each layer."""
    prompt, video, layers = attention_charts(load_runs([run.folder]))
    for chart, part in ((prompt, "prompt"), (video, "video")):
        (trace,) = chart.data
        percents = [100 * first[part], 100 * logged[part]]
        assert trace["x"] == [2, 4] and trace["y"] == pytest.approx(percents, rel=1e-4)
    assert "training, step 4:" in layers.caption
    for trace, part in zip(layers.data, PARTS, strict=True):
        assert trace["x"] == [0, 1, 2]
        percents = [100 * row[part] for row in logged["layers"]]
        assert trace["y"] == pytest.approx(percents, rel=1e-3)


def test_with_init_eval(toy: ToyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The untrained model's gates are closed; without a number 64 questions are asked."""
    words = ["--init_eval", "--max_steps", "2", "--attention_shares"]
    assert train(toy, tmp_path / "out", *words) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("{")]
    untrained = json.loads(lines[0])["attention"]
    assert untrained["prompt"] == 0 and 0 < untrained["video"] < 1
    logged = Run(tmp_path / "out").epochs[-1]["attention"]
    assert logged["prompt"] > 0 and logged["n"] == untrained["n"] <= 64


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--attention_shares", "0"], "--attention_shares 0: must be a whole number of at least 1"),
        (["--attention_shares", "--no_eval"], "--attention_shares 64: must be left out with"),
    ],
)
def test_what_is_refused(
    toy: ToyData,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    expected: str,
) -> None:
    assert train(toy, tmp_path / "out", *words) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"vico: error: {expected}") and error.count("\n") == 1


@pytest.mark.parametrize(
    "shares",
    [
        None,
        7,
        {},
        {"prompt": "much", "layers": 3},
        {"prompt": None, "layers": [{"prompt": 0.1, "video": 0.2}]},
        {"layers": [7]},
    ],
)
def test_a_damaged_log_has_no_chart(tmp_path: Path, shares: object) -> None:
    (tmp_path / "log.txt").write_text(json.dumps({"step": 2, "attention": shares}) + "\n")
    assert attention_charts(load_runs([tmp_path])) == []
