"""Whole training commands against the oracle, and runs that must be twins of each other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from reference import oracle, oracle_files
from support.toy_dataset import ToyData
from support.training import HYPER, Run, train

# The oracle sums in another order: fp32 rounding over six steps.
# Measured: losses 2e-7, norms 2e-6, scores 4e-6.
ORACLE_LOSS_RTOL, ORACLE_NORM_RTOL, ORACLE_SCORE_ATOL = 3e-6, 1e-4, 1e-4
# Twins divide the same sums differently over ranks and micro-batches.
# Measured: losses 1e-7, moments 8e-6 of the largest.
TWIN_LOSS_RTOL, TWIN_GRAD_RTOL, TWIN_SCORE_RTOL = 1e-6, 1e-5, 1e-6
# Half precision on a random tiny model, which does not average its rounding out.
HALF_LOSS_RTOL, HALF_NORM_RTOL = 1e-2, 0.1
TASKS = {"vqa": "vqa", "cap": "caption", "vaq": "vaq", "qav": "qav"}
OUTPUTS = """
    args.json log.txt steps.jsonl predictions_val.jsonl runs checkpoint-3 checkpoint-6
    checkpoint_best latest.json .vico-lock
"""
STEP_KEYS = """
    step epoch loss vqa_loss cap_loss vaq_loss qav_loss lr grad_norm vqa_targets cap_targets
    vaq_targets qav_targets real_tokens step_seconds
"""
EPOCH_KEYS = "train_loss train_vqa_loss train_cap_loss train_lr val_acc val_C val_T val_D"
SLOW = pytest.mark.slow
TWO_WORKERS = "--batch_size 4 --num_workers 2 --max_steps 4".split()


@pytest.fixture(scope="module")
def features_on_two_ranks(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """From the .pth file, without workers."""
    folder = tmp_path_factory.mktemp("pth") / "out"
    return train(toy, folder, *TWO_WORKERS, "--num_workers", "0", ranks=2)


def test_six_steps_of_the_oracle(toy: ToyData, start: Path, reference: Run) -> None:
    model = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(model[0], HYPER, seed=5, random_gates=True)
    items = toy.items("train")
    batches = [items[first : first + 8] for first in (0, 8, 16)] * 2
    reports = oracle.train_steps(
        model, toy.tokenizer, trainables, batches, HYPER, steps_per_epoch=3
    )
    for ours, theirs in zip(reference.steps, reports, strict=True):
        for task, name in TASKS.items():
            assert ours[f"{task}_loss"] == pytest.approx(theirs.losses[name], rel=ORACLE_LOSS_RTOL)
            assert ours[f"{task}_targets"] == theirs.targets[name]
        assert ours["loss"] == pytest.approx(theirs.total, rel=ORACLE_LOSS_RTOL)
        assert ours["lr"] == pytest.approx(theirs.lr, rel=1e-12)
        assert ours["grad_norm"] == pytest.approx(theirs.grad_norm, rel=ORACLE_NORM_RTOL)
    expected = []
    with torch.no_grad():
        for item in toy.items("val"):
            expected.append(oracle.score_options(model, toy.tokenizer, trainables, item, HYPER))
    for line, scores, row in zip(reference.predictions, expected, toy.rows["val"], strict=True):
        assert line["scores"] == pytest.approx(scores, abs=ORACLE_SCORE_ATOL)
        assert line["prediction"] == min(range(5), key=scores.__getitem__)
        assert line["answer"] == int(row["answer"])
        assert (line["qid"], line["video"], line["type"]) == (row["qid"], row["video"], row["type"])
    assert [line["index"] for line in reference.predictions] == list(range(10))


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
    """`sdpa` is packed attention, whose blocks are one autograd Function each, as on a GPU."""
    flags = ["--resume", str(start), "--batch_size", str(batch), "--accum_iter", str(accumulation)]
    flags += ["--deepspeed", threshold_0[zero], "--checkpoint_activations", checkpointed]
    twin = train(toy, tmp_path / "out", *flags, "--attention", attention, ranks=ranks)
    for a, b in zip(reference.steps, twin.steps, strict=True):
        for key in a:
            if key.endswith("loss"):
                assert b[key] == pytest.approx(a[key], rel=TWIN_LOSS_RTOL), key
            elif key == "grad_norm":
                assert b[key] == pytest.approx(a[key], rel=TWIN_GRAD_RTOL)
            elif key != "step_seconds":
                assert b[key] == a[key], key
    # After the first update Adam's first moment is a tenth of the gradient: this compares every
    # trainable's gradient.
    own = twin.tensors(3)
    for name, value in reference.tensors(3).items():
        bound = TWIN_GRAD_RTOL * value.abs().max()
        assert (own[name] - value).abs().max() <= bound, name
    for a, b in zip(reference.predictions, twin.predictions, strict=True):
        assert b["scores"] == pytest.approx(a["scores"], rel=TWIN_SCORE_RTOL, abs=1e-5)
        assert b["prediction"] == a["prediction"]


def test_only_the_declared_trainables_move(start: Path, reference: Run) -> None:
    """After an evaluation and three steps. test_engine checks the frozen tensors in the process."""
    before = torch.load(start, weights_only=True)["model"]
    after = load_file(reference.folder / "checkpoint-3" / "adapter_model.safetensors")
    assert set(after) == set(before)
    for name, value in after.items():
        assert not torch.equal(value, before[name]), f"{name} has not moved"


def test_outputs(toy: ToyData, reference: Run) -> None:
    assert {path.name for path in reference.folder.iterdir()} == set(OUTPUTS.split())
    assert [set(line) for line in reference.steps] == [set(STEP_KEYS.split())] * 6
    assert [line["step"] for line in reference.steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in reference.epochs] == [0, 1]
    epoch = reference.epochs[1]
    assert set(EPOCH_KEYS.split()) <= set(epoch)
    right = sum(line["prediction"] == line["answer"] for line in reference.predictions)
    assert epoch["val_acc"] == right / 10
    steps = reference.steps[3:]
    loss_sum = sum(step["cap_loss"] * step["cap_targets"] for step in steps)
    mean = loss_sum / sum(step["cap_targets"] for step in steps)
    assert epoch["train_cap_loss"] == pytest.approx(mean, rel=1e-12)
    args = json.loads((reference.folder / "args.json").read_text())
    assert args["batch_size"] == 8 and args["world_size"] == 1
    assert args["data_path"] == str(toy.folder / "data")
    assert any(reference.folder.joinpath("runs").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 3])
def test_fewer_questions_than_a_step_takes(
    start: Path, zero3: str, tmp_path: Path, num: int
) -> None:
    """They are an epoch of one step, on ranks of which some have none too."""
    small = ToyData(tmp_path / "world", num_train=num)
    flags = ["--resume", str(start), "--batch_size"]
    one = train(small, tmp_path / "one", *flags, "8")
    four = train(small, tmp_path / "four", *flags, "2", "--deepspeed", zero3, ranks=4)
    assert [line["step"] for line in one.steps] == [line["step"] for line in four.steps] == [1, 2]
    for a, b in zip(one.steps, four.steps, strict=True):
        assert b["vqa_targets"] == a["vqa_targets"] > 0
        assert b["loss"] == pytest.approx(a["loss"], rel=TWIN_LOSS_RTOL)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
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
    flags = ["--resume", str(start), "--precision", precision, "--batch_size", "4"]
    flags += ["--deepspeed", zero3 if stage == 3 else "zero2", "--max_steps", "3"]
    half = train(toy, tmp_path / "out", *flags, ranks=2)
    for a, b in zip(reference.steps[:3], half.steps, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=HALF_LOSS_RTOL)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=HALF_NORM_RTOL)
    assert all(v.dtype == torch.float32 for v in half.tensors(3).values())


@SLOW
@pytest.mark.parametrize("kind", ["npy", "mapped.h5", "packed.h5"])
def test_features_of_any_container_train_alike(
    toy: ToyData, features_on_two_ranks: Run, tmp_path: Path, kind: str
) -> None:
    """By data workers of two ranks; the same bits as from the .pth file."""
    path = tmp_path / kind
    if kind == "npy":
        path.mkdir()
        for video, frames in toy.features.items():
            np.save(path / f"{video}.npy", frames.numpy())
    else:
        h5py = pytest.importorskip("h5py")
        compression = "gzip" if kind == "packed.h5" else None
        with h5py.File(path, "w") as file:
            for video, frames in toy.features.items():
                file.create_dataset(f"clips/{video}", data=frames.numpy(), compression=compression)
    run = train(toy, tmp_path / "out", *TWO_WORKERS, "--features", str(path), ranks=2)
    for ours, theirs in zip(run.steps, features_on_two_ranks.steps, strict=True):
        assert {**ours, "step_seconds": 0} == {**theirs, "step_seconds": 0}
    for name, value in features_on_two_ranks.tensors(4).items():
        assert torch.equal(run.tensors(4)[name], value), name
    assert run.predictions_text == features_on_two_ranks.predictions_text
