"""Whole commands: training against the oracle, and runs that must be twins of each other."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reference import oracle, oracle_files
from support.processes import ROOT, succeeds, vico
from support.toy_dataset import ToyData, records, write_csv
from vico.train.resume import read_checkpoint

# The oracle sums in another order: fp32 rounding over six steps. Measured: losses 2e-7, norms 2e-6, scores 4e-6.
ORACLE_LOSS_RTOL, ORACLE_NORM_RTOL, ORACLE_SCORE_ATOL = 3e-6, 1e-4, 1e-4
# Twins divide the same sums differently over ranks and micro-batches. Measured: losses 1e-7, moments 8e-6 of the largest.
TWIN_LOSS_RTOL, TWIN_GRAD_RTOL, TWIN_SCORE_RTOL = 1e-6, 1e-5, 1e-6
# Half precision on a random tiny model, which does not average its rounding out.
HALF_LOSS_RTOL, HALF_NORM_RTOL = 1e-2, 0.1
HYPER = oracle.Hyper(
    bias=0.7, vaq=True, qav=True, lr=5e-3, warmup_epochs=1, epochs=2, weight_decay=0.1
)
FLAGS = [
    "--bias",
    "0.7",
    "--vaq",
    "--qav",
    "--lr",
    "5e-3",
    "--warmup_epochs",
    "1",
    "--epochs",
    "2",
    "--weight_decay",
    "0.1",
]
PLAIN = ["--no_shuffle", "--caption_crop", "none"]


@dataclass
class Run:
    folder: Path

    @property
    def steps(self) -> list[dict[str, Any]]:
        return records(self.folder / "steps.jsonl")

    @property
    def epochs(self) -> list[dict[str, Any]]:
        return records(self.folder / "log.txt")

    @property
    def predictions(self) -> list[dict[str, Any]]:
        return records(self.folder / "predictions_val.jsonl")

    def tensors(self, step: int) -> dict[str, Tensor]:
        folder = self.folder / f"checkpoint-{step}"
        return {
            **load_file(folder / "adapter_model.safetensors"),
            **load_file(folder / "optimizer.safetensors"),
        }


@pytest.fixture(scope="module")
def start(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lineage checkpoint with `model` alone, its gates non-zero so that every trainable matters."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    params, _ = oracle_files.load_meta(toy.llama / "tiny")
    oracle_files.save_lineage(
        path, oracle.init_trainables(params, HYPER, seed=5, random_gates=True)
    )
    return path


@pytest.fixture(scope="module")
def threshold_0(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The shipped configs, those of stage 3 with threshold 0: toy parameters would otherwise all stay whole."""
    folder, paths = tmp_path_factory.mktemp("ds"), {"zero2": "zero2"}
    for name in ("zero3", "zero3_nodes", "zero3_offload"):
        config = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        paths[name] = str(folder / f"{name}.json")
        Path(paths[name]).write_text(json.dumps(config))
    return paths


@pytest.fixture(scope="module")
def zero3(threshold_0: dict[str, str]) -> str:
    return threshold_0["zero3"]


def train(toy: ToyData, folder: Path, *flags: str, ranks: int = 1) -> Run:
    succeeds("train", *toy.flags, *FLAGS, *PLAIN, "--output_dir", str(folder), *flags, ranks=ranks)
    return Run(folder)


@pytest.fixture(scope="module")
def reference(toy: ToyData, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One rank, ZeRO-2, micro-batches of 8: 3 steps an epoch, the last of 4 questions."""
    return train(
        toy,
        tmp_path_factory.mktemp("reference") / "out",
        "--resume",
        str(start),
        "--batch_size",
        "8",
    )


def test_six_steps_of_the_oracle(toy: ToyData, start: Path, reference: Run) -> None:
    model = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(model[0], HYPER, seed=5, random_gates=True)
    items = toy.items("train")
    batches = [items[first : first + 8] for first in (0, 8, 16)] * 2
    reports = oracle.train_steps(
        model, toy.tokenizer, trainables, batches, HYPER, steps_per_epoch=3
    )
    for ours, theirs in zip(reference.steps, reports, strict=True):
        for task, name in (("vqa", "vqa"), ("cap", "caption"), ("vaq", "vaq"), ("qav", "qav")):
            assert ours[f"{task}_loss"] == pytest.approx(theirs.losses[name], rel=ORACLE_LOSS_RTOL)
            assert ours[f"{task}_targets"] == theirs.targets[name]
        assert ours["loss"] == pytest.approx(theirs.total, rel=ORACLE_LOSS_RTOL)
        assert ours["lr"] == pytest.approx(theirs.lr, rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs.grad_norm, rel=ORACLE_NORM_RTOL)
    with torch.no_grad():
        expected = [
            oracle.score_options(model, toy.tokenizer, trainables, item, HYPER)
            for item in toy.items("val")
        ]
    for line, scores, row in zip(reference.predictions, expected, toy.rows["val"], strict=True):
        assert line["scores"] == pytest.approx(scores, abs=ORACLE_SCORE_ATOL)
        assert line["prediction"] == min(range(5), key=scores.__getitem__) and line[
            "answer"
        ] == int(row["answer"])
        assert (line["qid"], line["video"], line["type"]) == (row["qid"], row["video"], row["type"])
    assert [line["index"] for line in reference.predictions] == list(range(10))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("ranks", "batch", "accumulation", "zero", "checkpointed", "attention"),
    [
        (2, 4, 1, "zero2", "none", "auto"),
        (1, 2, 4, "zero2", "2", "sdpa"),
        (1, 1, 8, "zero3_offload", "none", "sdpa"),
        (2, 2, 2, "zero3", "full", "sdpa"),
        (4, 1, 2, "zero3", "2", "auto"),
        pytest.param(2, 4, 1, "zero3", "none", "auto", marks=SLOW),
        pytest.param(4, 2, 1, "zero3", "none", "sdpa", marks=SLOW),
        pytest.param(4, 2, 1, "zero3", "full", "auto", marks=SLOW),
        pytest.param(2, 1, 4, "zero3_offload", "2", "auto", marks=SLOW),
        pytest.param(4, 2, 1, "zero3_nodes", "none", "sdpa", marks=SLOW),
    ],
)
def test_twins(
    toy: ToyData,
    start: Path,
    reference: Run,
    threshold_0: dict[str, str],
    tmp_path: Path,
    ranks: int,
    batch: int,
    accumulation: int,
    zero: str,
    checkpointed: str,
    attention: str,
) -> None:
    """`sdpa` is packed attention, whose blocks are one Function each, as on a GPU."""
    how = [
        "--batch_size",
        str(batch),
        "--accum_iter",
        str(accumulation),
        "--deepspeed",
        threshold_0[zero],
    ]
    how += ["--checkpoint_activations", checkpointed, "--attention", attention]
    twin = train(toy, tmp_path / "out", "--resume", str(start), *how, ranks=ranks)
    for a, b in zip(reference.steps, twin.steps, strict=True):
        for key in a:
            if key.endswith("loss"):
                assert b[key] == pytest.approx(a[key], rel=TWIN_LOSS_RTOL), key
            elif key == "grad_norm":
                assert b[key] == pytest.approx(a[key], rel=TWIN_GRAD_RTOL)
            elif key != "step_seconds":
                assert b[key] == a[key], key
    # After the first update Adam's first moment is a tenth of the gradient: this compares every trainable's gradient.
    for name, value in reference.tensors(3).items():
        assert (twin.tensors(3)[name] - value).abs().max() <= TWIN_GRAD_RTOL * value.abs().max(), (
            name
        )
    for a, b in zip(reference.predictions, twin.predictions, strict=True):
        assert (
            b["scores"] == pytest.approx(a["scores"], rel=TWIN_SCORE_RTOL, abs=1e-5)
            and b["prediction"] == a["prediction"]
        )


def test_only_the_declared_trainables_move(toy: ToyData, start: Path, reference: Run) -> None:
    """After an evaluation and three steps; the frozen tensors are checked in the process itself (test_engine)."""
    before = torch.load(start, weights_only=True)["model"]
    after = load_file(reference.folder / "checkpoint-3" / "adapter_model.safetensors")
    assert set(after) == set(before)
    for name, value in after.items():
        assert not torch.equal(value, before[name]), f"{name} has not moved"


def test_outputs(toy: ToyData, reference: Run) -> None:
    names = {path.name for path in reference.folder.iterdir()}
    assert names == {
        "args.json",
        "log.txt",
        "steps.jsonl",
        "predictions_val.jsonl",
        "runs",
        "checkpoint-3",
        "checkpoint-6",
        "checkpoint_best",
        "latest.json",
        ".vico-lock",
    }
    keys = "step epoch loss vqa_loss cap_loss vaq_loss qav_loss lr grad_norm vqa_targets cap_targets vaq_targets qav_targets"
    assert [set(line) for line in reference.steps] == [
        {*keys.split(), "real_tokens", "step_seconds"}
    ] * 6
    assert [line["step"] for line in reference.steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in reference.epochs] == [0, 1]
    epoch = reference.epochs[1]
    assert {
        "train_loss",
        "train_vqa_loss",
        "train_cap_loss",
        "train_lr",
        "val_acc",
        "val_C",
        "val_T",
        "val_D",
    } <= set(epoch)
    assert (
        epoch["val_acc"]
        == sum(line["prediction"] == line["answer"] for line in reference.predictions) / 10
    )
    steps = reference.steps[3:]
    mean = sum(s["cap_loss"] * s["cap_targets"] for s in steps) / sum(
        s["cap_targets"] for s in steps
    )
    assert epoch["train_cap_loss"] == pytest.approx(mean, rel=1e-12)
    args = json.loads((reference.folder / "args.json").read_text())
    assert (
        args["batch_size"] == 8
        and args["world_size"] == 1
        and args["data_path"] == str(toy.folder / "data")
    )
    assert any(reference.folder.joinpath("runs").iterdir())


def test_best_checkpoint_is_what_init_eval_finds(
    toy: ToyData, reference: Run, tmp_path: Path
) -> None:
    """The training command with --resume and --init_eval evaluates and stops; `vico eval` needs no flags but --resume."""
    best = reference.folder / "checkpoint_best"
    again = [
        "--resume",
        str(best),
        "--init_eval",
        "--output_dir",
        str(tmp_path / "a"),
        "--batch_size",
        "8",
    ]
    said = succeeds("train", *toy.flags, *FLAGS, *PLAIN, *again).stdouts[0].splitlines()
    expected = max(line["val_acc"] for line in reference.epochs)
    assert json.loads(said[-1])["acc"] == expected
    assert not (tmp_path / "a" / "steps.jsonl").exists()
    said = (
        succeeds(
            "eval",
            "--resume",
            str(best),
            "--output_dir",
            str(tmp_path / "b"),
            ranks=2,
            cwd=tmp_path,
        )
        .stdouts[0]
        .splitlines()
    )
    assert json.loads(said[-1])["acc"] == expected
    assert (tmp_path / "a" / "predictions_val.jsonl").read_bytes() == (
        tmp_path / "b" / "predictions_val.jsonl"
    ).read_bytes()


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 2, marks=SLOW), (2, 3)])
def test_a_run_cut_in_two_is_the_run(
    toy: ToyData, zero3: str, tmp_path: Path, ranks: int, stage: int
) -> None:
    """Stopped in mid-epoch and started again by the same command: the same bits, shuffled, with random crops."""
    flags = [
        *toy.flags,
        *FLAGS,
        "--batch_size",
        str(8 // ranks),
        "--num_workers",
        "1",
        "--deepspeed",
        zero3 if stage == 3 else "zero2",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    succeeds("train", *flags, "--output_dir", str(whole), ranks=ranks)
    saving = [
        "--save_steps",
        "1",
        "--save_total_limit",
        "2",
        "--save_legacy",
    ]  # which changes nothing else
    succeeds("train", *flags, *saving, "--output_dir", str(cut), "--max_steps", "4", ranks=ranks)
    said = succeeds("train", *flags, *saving, "--output_dir", str(cut), ranks=ranks).stdouts[0]
    assert "resuming from step 4" in said
    for name, value in Run(whole).tensors(6).items():
        assert torch.equal(Run(cut).tensors(6)[name], value), name
    without_time = [
        [{k: v for k, v in line.items() if k != "step_seconds"} for line in Run(f).steps]
        for f in (whole, cut)
    ]
    assert without_time[0] == without_time[1]
    assert (whole / "predictions_val.jsonl").read_bytes() == (
        cut / "predictions_val.jsonl"
    ).read_bytes()
    assert Run(cut).epochs[-1] == Run(whole).epochs[-1]
    assert sorted(path.name for path in cut.glob("checkpoint*")) == [
        "checkpoint-5",
        "checkpoint-6",
        "checkpoint_best",
        "checkpoint_best.pth",
    ]
    best, legacy = (
        load_file(cut / "checkpoint_best" / "adapter_model.safetensors"),
        read_checkpoint(cut / "checkpoint_best.pth"),
    )
    assert legacy.weights.keys() == best.keys() and all(
        torch.equal(legacy.weights[name], value) for name, value in best.items()
    )
    assert (
        legacy.moments is None
        and legacy.settings["max_seq_len"] == 256
        and not (whole / "checkpoint_best.pth").exists()
    )
    assert (
        "complete at step 6"
        in succeeds("train", *flags, "--output_dir", str(cut), ranks=ranks).stdouts[0]
    )


def test_another_start_on_a_used_folder_is_refused_and_another_division_is_not(
    toy: ToyData, start: Path, tmp_path: Path
) -> None:
    flags = [*toy.flags, *FLAGS, "--cap", "0", "--output_dir", str(tmp_path / "out"), "--max_steps"]
    first = ["--resume", str(start), "--batch_size", "8"]
    succeeds("train", *flags, "1", *first)
    again = tmp_path / "again.pth"
    again.write_bytes(start.read_bytes())
    ended = vico("train", *flags, "2", "--resume", str(again), "--batch_size", "8")
    assert ended.codes == [2] and "did not start from --resume" in ended.stderrs[0]
    succeeds("train", *flags, "2", *first)
    succeeds("train", *flags, "3", "--batch_size", "4", ranks=2)
    assert [line["step"] for line in Run(tmp_path / "out").steps] == [1, 2, 3]
    assert all(
        line["cap_loss"] is None and line["cap_targets"] == 0
        for line in Run(tmp_path / "out").steps
    )


def test_a_lineage_checkpoint_goes_on_after_its_epoch(toy: ToyData, tmp_path: Path) -> None:
    """One epoch by the oracle, written as the lineage writes it, then the second epoch here and there."""
    model = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(model[0], HYPER, seed=5, random_gates=True)
    optimizer = oracle.make_optimizer(trainables, HYPER)
    items = toy.items("train")
    batches = [items[first : first + 8] for first in (0, 8, 16)]
    oracle.train_steps(model, toy.tokenizer, trainables, batches, HYPER, 3, optimizer=optimizer)
    path = tmp_path / "lineage.pth"
    oracle_files.save_lineage(
        path,
        trainables,
        optimizer=optimizer,
        epoch=0,
        args=argparse.Namespace(bias=0.7, dataset="nextqa"),
    )
    run = train(toy, tmp_path / "out", "--resume", str(path), "--batch_size", "8")
    reports = oracle.train_steps(
        model, toy.tokenizer, trainables, batches, HYPER, 3, steps_done=3, optimizer=optimizer
    )
    assert [line["step"] for line in run.steps] == [4, 5, 6]
    for ours, theirs in zip(run.steps, reports, strict=True):
        assert ours["loss"] == pytest.approx(theirs.total, rel=ORACLE_LOSS_RTOL)
        assert ours["lr"] == pytest.approx(theirs.lr, rel=1e-12)


@pytest.mark.parametrize(
    "num", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(64, marks=pytest.mark.slow)]
)
def test_every_question_counts_once(
    toy: ToyData, start: Path, zero3: str, tmp_path: Path, num: int
) -> None:
    rows = [{**toy.rows["val"][i % 10], "qid": str(i)} for i in range(num)]
    write_csv(tmp_path / "val.csv", rows)
    data = tmp_path / "data" / "nextqa"
    data.mkdir(parents=True)
    (tmp_path / "val.csv").rename(data / "val.csv")
    (data / "clipvitl14.pth").symlink_to(toy.data / "clipvitl14.pth")
    where = [
        "--llama_model_path",
        str(toy.llama),
        "--model",
        "tiny",
        "--data_path",
        str(tmp_path / "data"),
        "--precision",
        "fp32",
    ]
    said = []
    for ranks in (1, 2):
        flags = [
            "--resume",
            str(start),
            "--output_dir",
            str(tmp_path / f"out{ranks}"),
            "--num_workers",
            "0",
            "--deepspeed",
            zero3,
        ]
        said.append(
            json.loads(succeeds("eval", *where, *flags, ranks=ranks).stdouts[0].splitlines()[-1])
        )
    assert said[0] == said[1] and said[0]["n"] == num
    assert (tmp_path / "out1/predictions_val.jsonl").read_bytes() == (
        tmp_path / "out2/predictions_val.jsonl"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 3])
def test_fewer_questions_than_a_step_takes(
    start: Path, zero3: str, tmp_path: Path, num: int
) -> None:
    """They are an epoch of one step, on ranks of which some have none too."""
    small = ToyData(tmp_path / "world", num_train=num)
    one = train(small, tmp_path / "one", "--resume", str(start), "--batch_size", "8")
    four = train(
        small,
        tmp_path / "four",
        "--resume",
        str(start),
        "--batch_size",
        "2",
        "--deepspeed",
        zero3,
        ranks=4,
    )
    assert [line["step"] for line in one.steps] == [line["step"] for line in four.steps] == [1, 2]
    for a, b in zip(one.steps, four.steps, strict=True):
        assert b["vqa_targets"] == a["vqa_targets"] > 0 and b["loss"] == pytest.approx(
            a["loss"], rel=TWIN_LOSS_RTOL
        )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [2, 3])
def test_half_precision_stays_near_fp32(
    toy: ToyData,
    start: Path,
    reference: Run,
    zero3: str,
    tmp_path: Path,
    precision: str,
    stage: int,
) -> None:
    how = [
        "--precision",
        precision,
        "--deepspeed",
        zero3 if stage == 3 else "zero2",
        "--batch_size",
        "4",
        "--max_steps",
        "3",
    ]
    half = train(toy, tmp_path / "out", "--resume", str(start), *how, ranks=2)
    for a, b in zip(reference.steps[:3], half.steps, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=HALF_LOSS_RTOL) and b[
            "grad_norm"
        ] == pytest.approx(a["grad_norm"], rel=HALF_NORM_RTOL)
    assert all(v.dtype == torch.float32 for v in half.tensors(3).values())
