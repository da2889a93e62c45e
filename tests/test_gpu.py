"""What only a GPU can show: `bash tests/run.sh -m gpu`. Everywhere else these are skipped, and pytest says so."""

import hashlib
from pathlib import Path

import pytest
import torch

import oracle
from benchmarks import correctness
from vico.model.llama import LlamaShape
from world import World, records, succeeds

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
CUDA = torch.device("cuda")
TOY = LlamaShape(256, 4, 4, 2000, multiple_of=64)
HEADS_OF_7B = LlamaShape(4096, 1, 32, 32000)
HALF_LOSS_RTOL = 1e-2  # bf16 on a random tiny model, as in test_training
FLAGS = ["--epochs", "2", "--warmup_epochs", "1", "--lr", "5e-3", "--bias", "0.7", "--batch_size", "4", "--num_workers", "0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_computes_the_definition(dtype: torch.dtype) -> None:
    """Outputs and the gradients of q, k, v and gate2, on training's streams, scoring's trees and the last layer's few rows."""
    found = correctness.attention_backends(HEADS_OF_7B, CUDA, dtype, repeats=1)
    worst = {name: entry["worst"] for name, entry in found["backends"].items() if entry["runs"]}
    assert found["equal"], (worst, found["bound"])
    assert len(worst) >= (3 if dtype != torch.float32 else 2), found["backends"]  # sdpa, varlen, plain


def test_twenty_steps_against_fp32_on_the_cpu() -> None:
    found = correctness.twenty_steps(TOY, CUDA, torch.bfloat16)
    assert found["equal"], found


def test_no_farther_from_fp32_than_the_published_way() -> None:
    found = correctness.toy_distances(TOY, CUDA, torch.bfloat16, videos=4)
    assert found["equal"], found["fast_over_plain"]


def run(world: World, folder: Path, *flags: str) -> Path:
    succeeds("train", *world.flags, *FLAGS, *flags, "--output_dir", str(folder))
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in records(folder / "steps.jsonl")]


def digest(folder: Path, step: int) -> str:
    return hashlib.sha256((folder / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_whole_runs(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs under DeepSpeed: stages 2 and 3, compiled or not, against fp32 on the CPU; a resumed run against one that never stopped."""
    start = tmp_path / "start.pth"
    params, _ = oracle.load_meta(world.llama / "tiny")
    oracle.save_lineage(start, oracle.init_trainables(params, oracle.Hyper(bias=0.7), seed=5, random_gates=True))
    flags = ["--resume", str(start), "--no_shuffle", "--caption_crop", "none"]
    runs = {
        "zero2": run(world, tmp_path / "zero2", *flags, "--precision", "bf16"),
        "zero3": run(world, tmp_path / "zero3", *flags, "--precision", "bf16", "--deepspeed", "zero3"),
        "fp32": run(world, tmp_path / "fp32", *flags, "--precision", "fp32"),
    }
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    exact = losses(run(world, tmp_path / "cpu", *flags, "--precision", "fp32"))
    monkeypatch.undo()
    for name, folder in runs.items():
        assert losses(folder) == pytest.approx(exact, rel=1e-5 if name == "fp32" else HALF_LOSS_RTOL), name
    assert losses(runs["zero2"]) == pytest.approx(losses(runs["zero3"]), rel=1e-6)

    stopped = run(world, tmp_path / "stopped", *flags, "--precision", "bf16", "--max_steps", "7")
    run(world, stopped, *flags, "--precision", "bf16")
    assert digest(stopped, 10) == digest(runs["zero2"], 10)
