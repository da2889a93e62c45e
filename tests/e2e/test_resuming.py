"""Whole commands that continue or evaluate what another command wrote."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference import oracle, oracle_files
from support.processes import succeeds, vico
from support.toy_dataset import ToyData, write_csv
from support.training import FLAGS, HYPER, PLAIN, Run, train
from vico.train.saved_run import read_checkpoint

ORACLE_LOSS_RTOL = 3e-6  # the oracle sums in another order
SLOW = pytest.mark.slow


def last_line(stdout: str) -> dict[str, float]:
    result: dict[str, float] = json.loads(stdout.splitlines()[-1])
    return result


def test_best_checkpoint_is_what_init_eval_finds(
    toy: ToyData, reference: Run, tmp_path: Path
) -> None:
    """`train --resume --init_eval` evaluates and stops; `vico eval` needs only --resume."""
    best, (a, b) = str(reference.folder / "checkpoint_best"), (tmp_path / "a", tmp_path / "b")
    flags = [*toy.flags, *FLAGS, *PLAIN, "--batch_size", "8"]
    again = ["--resume", best, "--init_eval", "--output_dir", str(a)]
    trained = succeeds("train", *flags, *again).stdouts[0]
    expected = max(line["val_acc"] for line in reference.epochs)
    assert last_line(trained)["acc"] == expected
    assert not (a / "steps.jsonl").exists()
    out = ["--output_dir", str(b)]
    evaluated = succeeds("eval", "--resume", best, *out, ranks=2, cwd=tmp_path).stdouts[0]
    assert last_line(evaluated)["acc"] == expected
    assert Run(a).predictions_text == Run(b).predictions_text


@pytest.mark.parametrize(("ranks", "stage"), [pytest.param(1, 2, marks=SLOW), (2, 3)])
def test_a_run_cut_in_two_is_the_run(
    toy: ToyData, zero3: str, tmp_path: Path, ranks: int, stage: int
) -> None:
    """Stopped in mid-epoch and started again: the same bits, shuffled, with random crops."""
    flags = [*toy.flags, *FLAGS, "--batch_size", str(8 // ranks), "--num_workers", "1"]
    flags += ["--deepspeed", zero3 if stage == 3 else "zero2"]
    # How often is saved changes nothing else.
    saving = "--save_steps 1 --save_total_limit 2 --save_legacy".split()
    whole, cut = Run(tmp_path / "whole"), Run(tmp_path / "cut")
    no_limit = ["--save_total_limit", "0"]
    succeeds("train", *flags, *no_limit, "--output_dir", str(whole.folder), ranks=ranks)
    assert len(list(whole.folder.glob("checkpoint-*"))) == 2, "one of each epoch"
    in_two = ["train", *flags, *saving, "--output_dir", str(cut.folder)]
    succeeds(*in_two, "--max_steps", "4", ranks=ranks)
    assert "resuming from step 4" in succeeds(*in_two, ranks=ranks).stdouts[0]
    for name, value in whole.tensors(6).items():
        assert torch.equal(cut.tensors(6)[name], value), name
    for a, b in zip(whole.steps, cut.steps, strict=True):
        assert a | {"step_seconds": 0} == b | {"step_seconds": 0}
    assert whole.predictions_text == cut.predictions_text
    assert cut.epochs[-1] == whole.epochs[-1]
    kept = "checkpoint-5 checkpoint-6 checkpoint_best checkpoint_best.pth"
    assert sorted(path.name for path in cut.folder.glob("checkpoint*")) == kept.split()
    best = load_file(cut.folder / "checkpoint_best" / "adapter_model.safetensors")
    published = read_checkpoint(cut.folder / "checkpoint_best.pth")
    assert published.weights.keys() == best.keys()
    assert all(torch.equal(published.weights[name], value) for name, value in best.items())
    assert published.moments is None and published.settings["max_seq_len"] == 256
    assert not (whole.folder / "checkpoint_best.pth").exists()
    ended = succeeds("train", *flags, "--output_dir", str(cut.folder), ranks=ranks)
    assert "complete at step 6" in ended.stdouts[0]


def test_a_used_folder_refuses_another_start_but_not_another_division(
    toy: ToyData, start: Path, tmp_path: Path
) -> None:
    run = Run(tmp_path / "out")
    flags = [*toy.flags, *FLAGS, "--cap", "0", "--output_dir", str(run.folder), "--max_steps"]
    first = ["--resume", str(start), "--batch_size", "8"]
    succeeds("train", *flags, "1", *first)
    again = tmp_path / "again.pth"
    again.write_bytes(start.read_bytes())
    ended = vico("train", *flags, "2", "--resume", str(again), "--batch_size", "8")
    assert ended.codes == [2] and "did not start from --resume" in ended.stderrs[0]
    succeeds("train", *flags, "2", *first)
    succeeds("train", *flags, "3", "--batch_size", "4", ranks=2)
    assert [line["step"] for line in run.steps] == [1, 2, 3]
    for line in run.steps:
        assert line["cap_loss"] is None and line["cap_targets"] == 0


def test_a_published_checkpoint_continues_after_its_epoch(toy: ToyData, tmp_path: Path) -> None:
    """One epoch by the oracle, written as the published code does; then the second, by both."""
    model = oracle_files.load_meta(toy.llama / "tiny")
    trainables = oracle.init_trainables(model[0], HYPER, seed=5, random_gates=True)
    optimizer = oracle.make_optimizer(trainables, HYPER)
    items = toy.items("train")
    batches = [items[first : first + 8] for first in (0, 8, 16)]
    epoch = (model, toy.tokenizer, trainables, batches, HYPER, 3)
    oracle.train_steps(*epoch, optimizer=optimizer)
    path, args = tmp_path / "published.pth", argparse.Namespace(bias=0.7, dataset="nextqa")
    oracle_files.save_published(path, trainables, optimizer=optimizer, epoch=0, args=args)
    run = train(toy, tmp_path / "out", "--resume", str(path), "--batch_size", "8")
    reports = oracle.train_steps(*epoch, steps_done=3, optimizer=optimizer)
    assert [line["step"] for line in run.steps] == [4, 5, 6]
    for ours, theirs in zip(run.steps, reports, strict=True):
        assert ours["loss"] == pytest.approx(theirs.total, rel=ORACLE_LOSS_RTOL)
        assert ours["lr"] == pytest.approx(theirs.lr, rel=1e-12)


@pytest.mark.parametrize("num", [pytest.param(1, marks=SLOW), 3, pytest.param(64, marks=SLOW)])
def test_every_question_counts_once(
    toy: ToyData, start: Path, zero3: str, tmp_path: Path, num: int
) -> None:
    data = tmp_path / "data" / "nextqa"
    data.mkdir(parents=True)
    write_csv(data / "val.csv", [{**toy.rows["val"][i % 10], "qid": str(i)} for i in range(num)])
    (data / "clipvitl14.pth").symlink_to(toy.data / "clipvitl14.pth")
    flags = ["--llama_model_path", str(toy.llama), "--model", "tiny", "--precision", "fp32"]
    flags += ["--data_path", str(tmp_path / "data"), "--num_workers", "0", "--deepspeed", zero3]
    flags += ["--resume", str(start), "--output_dir"]
    runs, results = [], []
    for ranks in (1, 2):
        runs.append(Run(tmp_path / f"out{ranks}"))
        ended = succeeds("eval", *flags, str(runs[-1].folder), ranks=ranks)
        results.append(last_line(ended.stdouts[0]))
    assert results[0] == results[1] and results[0]["n"] == num
    assert runs[0].predictions_text == runs[1].predictions_text
