"""What a run logs, prints and saves, number by number; and small rules of a run, as tables."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from support.errors import refusal
from support.toy_dataset import ToyData
from support.training import Run
from vico.cli.main import main
from vico.data.dataloader import _Worker
from vico.data.evaluation_batches import share_of
from vico.model.weights.meta import _are_close
from vico.model.weights.validate import require_heads
from vico.planner.request import PlanRequest
from vico.train import bounds, ds_config, loop, rank_consistency, zero_stage
from vico.train.config import RunConfig
from vico.train.evaluate import Evaluation, evaluate
from vico.train.optim import learning_rate

SETTINGS = "--batch_size 5 --accum_iter 2 --epochs 2 --warmup_epochs 1 --lr 0.02 --vaq".split()


@pytest.mark.usefixtures("in_this_process")
def test_a_run_and_its_end(toy: ToyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two epochs of two steps: what is in the logs, and what a start of the whole run says."""
    out = tmp_path / "out"
    command = ["train", *toy.flags, *SETTINGS, "--output_dir", str(out), "--save_steps", "1"]
    assert main([*command, "--max_steps", "3"]) == 0
    said = capfd.readouterr().out
    assert "steps: 1 to 3, 2 per epoch, 10 questions each" in " ".join(said.split())
    assert f"done: {out}; curves: tensorboard --logdir {out / 'runs'}" in said
    run = Run(out)
    assert [(r["step"], r["epoch"]) for r in run.steps] == [(1, 0), (2, 0), (3, 1)]
    assert [r["lr"] for r in run.steps] == pytest.approx([0.0, 0.01, 0.02])
    assert [(r["step"], r["epoch"], r["train_lr"]) for r in run.epochs] == [
        (2, 0, 0.01),
        (3, 1, 0.02),
    ]
    for record in run.steps:
        total = record["vqa_loss"] + 0.5 * record["cap_loss"] + record["vaq_loss"]
        assert record["loss"] == pytest.approx(total), "captions count half"
    whole = {**run.epochs[0]}
    shown = next(line for line in said.splitlines() if "epoch 0: {" in line)
    in_files = {"epoch", "gates"}  # said before the object, or too long for a terminal
    assert whole.keys() >= in_files
    assert json.loads(shown[shown.index("{") :]) == {
        key: value for key, value in whole.items() if key not in in_files
    }
    args = json.loads((out / "args.json").read_text())
    assert (args["world_size"], args["steps_per_epoch"], args["peak_lr"]) == (1, 2, 0.02)
    capfd.readouterr()
    assert main([*command, "--max_steps", "3"]) == 0
    said = capfd.readouterr().out
    assert f"{out}: this run is complete at step 3 of 3; nothing to train, and a larger" in said
    assert "--max_steps trains on" in said
    assert main(command) == 0
    said = capfd.readouterr().out
    assert "resuming from step 3\n" in said, "no step to redo"
    assert "steps: 4 to 4, 2 per epoch" in " ".join(said.split())
    assert [(r["step"], r["epoch"]) for r in Run(out).steps][-1] == (4, 1)
    assert main(command) == 0
    assert "complete at step 4 of 4; nothing to train, and a larger --epochs trains on" in (
        capfd.readouterr().out
    )


# ---- rules


def test_learning_rates_at_the_edges() -> None:
    """The warm-up's end is the peak; without a decay the rate is the least one from there on."""
    assert learning_rate(10, 10, 1.0, 0.1, warmup_epochs=1, epochs=1) == pytest.approx(0.1)
    assert learning_rate(10, 10, 1.0, 0.1, warmup_epochs=1, epochs=3) == 1.0
    assert learning_rate(20, 10, 1.0, 0.1, warmup_epochs=1, epochs=3) == pytest.approx(0.55)
    assert learning_rate(40, 10, 1.0, 0.1, warmup_epochs=1, epochs=3) == pytest.approx(0.1)


def test_layers_that_run_again() -> None:
    counts = {"full": None, "none": 0, "7": 7}
    for text, number in counts.items():
        assert RunConfig(checkpoint_activations=text).num_checkpointed == number


def test_bounds_of_settings() -> None:
    """Whole numbers of at least 1, unless a table says otherwise; torch's seeds."""
    assert bounds.COUNT[:2] == (1, 10**9) and bounds.BOUNDS["save_steps"][:2] == (0, 10**9)
    assert bounds.BOUNDS["seed"][1] == 2**63 - 1
    torch.Generator().manual_seed(bounds.MAX_SEED)
    assert bounds.value_type(int | None) == (int, None)
    assert bounds.value_type(str) == (str, None)


def test_long_values_are_cut() -> None:
    for length, shown in ((58, 60), (59, 60)):
        text = ds_config._brief("x" * length)
        assert len(text) == shown
        assert text.endswith("...") == (length == 59)
    assert ds_config._brief("x" * 500) == '"' + "x" * 56 + "..."


@pytest.mark.parametrize(("num_chunks", "size"), [(5, 2), (4, 2), (1, 4), (7, 3)])
def test_every_rank_runs_as_many_chunks(num_chunks: int, size: int) -> None:
    """The last ones may be empty."""
    chunks = [[i] for i in range(num_chunks)]
    shares = [share_of(chunks, rank, size) for rank in range(size)]
    assert {len(share) for share in shares} == {math.ceil(num_chunks / size)}
    for rank, share in enumerate(shares):
        own = chunks[rank::size]
        assert share == own + [[]] * (len(share) - len(own))


def test_widths_of_heads(tmp_path: Path) -> None:
    """None where it is dim / n_heads; an even whole number otherwise."""
    keys = ("dim", "n_heads", "n_kv_heads")

    def width(dim: int, n_heads: int, kv_heads: int, head_dim: int | None) -> int | None:
        return require_heads(dim, n_heads, kv_heads, head_dim, keys, tmp_path)

    assert (width(32, 4, 4, None), width(32, 4, 2, 8), width(32, 4, 1, 16)) == (None, None, 16)
    assert width(30, 4, 4, 6) == 6
    assert "dim 30 over n_heads 4 is not an even" in refusal(width, 30, 4, 4, None)
    assert "dim 12 over n_heads 4 is not an even" in refusal(width, 12, 4, 4, None)
    assert "head_dim 7 must be even" in refusal(width, 28, 4, 4, 7)
    assert "n_heads 4 over n_kv_heads 3 is not a whole" in refusal(width, 32, 4, 3, None)


def test_replicas_may_have_drifted() -> None:
    """By a tenth, and by a hundredth where they are near 0."""
    for one, other, close in (
        (1.0, 1.109, True),
        (1.0, 1.12, False),
        (100.0, 110.0, True),
        (100.0, 110.1, False),
        (0.0, 0.0099, True),
        (0.0, 0.0101, False),
        (math.nan, math.nan, True),
    ):
        assert _are_close(torch.tensor([other]), torch.tensor([one])) == close, other


def test_a_run_asks_for_its_questions(toy: ToyData) -> None:
    """The planner is asked with the mean lengths and the number of questions of an epoch."""
    from vico.model.config import LLAMA_CONFIGS
    from vico.planner.gpu_specs import GPUS, Hardware

    def request(**flags: Any) -> PlanRequest:
        config = RunConfig(model="7B", **flags)
        return zero_stage._request(config, LLAMA_CONFIGS["7B"], Hardware(GPUS["H100"]), True)

    published = request(max_seq_len=160, max_cap_len=384, batch_size=8).lengths
    assert (published.question, published.caption, published.questions) == (96, 194, 34132)
    assert published.longest == 160 + 384
    both = request(max_seq_len=160, max_cap_len=384, vaq=True, cap=0, dataset="star").lengths
    assert (both.question, both.caption, both.longest) == (2 * 98, 0, 2 * 160)
    assert both.questions == 45731
    assert request(batch_size=8).max_tokens is None
    assert request(batch_size=8, max_tokens=0).max_tokens == 8 * (96 + 194)
    assert request(batch_size=8, max_tokens=999).max_tokens == 999


@pytest.fixture
def resumed(toy: ToyData, tmp_path: Path) -> Iterator[RunConfig]:
    yield RunConfig(
        data_path=toy.data.parent,
        llama_model_path=toy.llama,
        model="tiny",
        output_dir=tmp_path / "out",
    )


def test_files_that_ranks_compare(resumed: RunConfig, tmp_path: Path) -> None:
    """What a rank sees of a run, and which of the paths only some ranks see."""
    out = resumed.output_dir
    assert rank_consistency._visible_outputs(resumed) == [-1, False, False]
    (out / "checkpoint-7").mkdir(parents=True)
    (out / "checkpoint-30").mkdir()
    (out / "args.json").write_text("{}")
    assert rank_consistency._visible_outputs(resumed) == [30, True, False]
    for rows, late in (
        ([[30, 1, 0], [30, 1, 0]], []),
        ([[30, 1, 0], [7, 1, 0]], [str(out / "checkpoint-30")]),
        ([[-1, 0, 0], [5, 1, 0]], [str(out / "checkpoint-5"), str(out / "args.json")]),
    ):
        assert rank_consistency._late_outputs(resumed, torch.tensor(rows)) == late


def test_files_that_training_reads(resumed: RunConfig) -> None:
    """No folder, and nothing of the data set's folder but tables."""
    folder = resumed.data_path / "nextqa"
    (folder / "old.csv").mkdir(exist_ok=True)
    (folder / "notes.txt").write_text("x")
    try:
        names = [path.name for path in rank_consistency._input_files(resumed)]
    finally:
        (folder / "old.csv").rmdir()
        (folder / "notes.txt").unlink()
    assert {"train.csv", "val.csv", "params.json", "consolidated.00.pth"} <= {*names}
    assert not {"old.csv", "notes.txt"} & {*names} and "clipvitl14.pth" in names


def train_two_epochs(toy: ToyData, out: Path, num_workers: int) -> None:
    flags = [*toy.flags, *SETTINGS, "--num_workers", str(num_workers), "--output_dir", str(out)]
    assert main(["train", *flags]) == 0
    assert len(Run(out).epochs) == 2


@pytest.mark.usefixtures("in_this_process")
def test_every_epoch_has_the_same_loader(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaders: list[Any] = []

    def noted(*arguments: Any) -> Evaluation:
        loaders.append(arguments[5])
        return evaluate(*arguments)

    monkeypatch.setattr(loop, "evaluate", noted)
    train_two_epochs(toy, tmp_path / "out", num_workers=0)
    assert len(loaders) == 2 and loaders[0] is loaders[1]


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_workers_of_the_evaluation_stay(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one epoch to the next, and no longer than the run."""
    started: list[_Worker] = []
    start = _Worker.start

    def noted(worker: _Worker) -> None:
        started.append(worker)
        start(worker)

    monkeypatch.setattr(_Worker, "start", noted)
    train_two_epochs(toy, tmp_path / "out", num_workers=1)
    assert len(started) == 2, "one trains, one evaluates"
    assert not any(worker.is_alive() for worker in started)
