"""What only a GPU can show: `bash tests/run.sh -m gpu`. Everywhere else these are skipped, and pytest says so."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.baseline import correctness
from benchmarks.baseline.models import random_weights, set_weights, take_gradients
from benchmarks.baseline.variants import scoring_batches, training_batch
from benchmarks.measure.workload import SyntheticWorkload
from reference import oracle, oracle_files
from support.processes import start
from support.toy_dataset import ToyData, records
from vico.model import cuda_graphs
from vico.model.attention.backends import choose_attention
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.vico import ViCo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    *(
        pytest.mark.filterwarnings(f"ignore:{words}")
        for words in ("Attempting to run cuBLAS", "Synchronization debug mode")
    ),
]
CUDA = torch.device("cuda")
TOY = LlamaConfig(256, 4, 4, 2000, multiple_of=64)
HEADS_OF_7B = LlamaConfig(4096, 1, 32, 32000)
HALF_LOSS_RTOL = 1e-2  # bf16 on a random tiny model, as in test_training
FLAGS = [
    "--epochs",
    "2",
    "--warmup_epochs",
    "1",
    "--lr",
    "5e-3",
    "--bias",
    "0.7",
    "--batch_size",
    "4",
    "--num_workers",
    "0",
]


def toy_on_the_gpu(config: LlamaConfig = TOY, num_adapted: int = 4) -> ViCo:
    """Without CUDA graphs; `use_graphs` adds them."""
    fast = ViCo(config, num_adapted, 10, 10, 100.0, torch.bfloat16)
    set_weights(fast, random_weights(fast))
    attend = choose_attention("auto", CUDA, torch.bfloat16)[0]
    choose_block_runners(fast.to(CUDA), attend, no_graphs="not in this test")
    return fast


def use_graphs(model: ViCo) -> None:
    description = choose_block_runners(model, model.attend)
    assert description.endswith("rows by CUDA graphs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_computes_the_definition(dtype: torch.dtype) -> None:
    """Outputs and the gradients of q, k, v and gate2, on training's streams, scoring's trees and the last layer's few rows."""
    found = correctness.attention_backends(HEADS_OF_7B, CUDA, dtype, repeats=1)
    worst = {name: entry["worst"] for name, entry in found["backends"].items() if entry["runs"]}
    assert found["equal"], (worst, found["bound"])
    assert len(worst) >= (3 if dtype != torch.float32 else 2), found[
        "backends"
    ]  # sdpa, varlen, plain


def test_twenty_steps_against_fp32_on_the_cpu() -> None:
    found = correctness.twenty_steps(TOY, CUDA, torch.bfloat16)
    assert found["equal"], found


def test_no_farther_from_fp32_than_the_published_way() -> None:
    found = correctness.toy_distances(TOY, CUDA, torch.bfloat16, videos=4)
    assert found["equal"], found["fast_over_plain"]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in records(folder / "steps.jsonl")]


def digest(folder: Path, step: int) -> str:
    return hashlib.sha256(
        (folder / f"checkpoint-{step}" / "adapter_model.safetensors").read_bytes()
    ).hexdigest()


def test_whole_runs(toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real runs under DeepSpeed, side by side: stages 2 and 3, recomputed layers, fp32; and one that was cut and goes on."""
    first = tmp_path / "start.pth"
    oracle_files.write_tiny_meta(
        toy.llama / "wide", toy.tokenizer.vocab_size(), dim=128, n_layers=3, n_heads=2, shards=1
    )
    params, _ = oracle_files.load_meta(toy.llama / "wide")
    oracle_files.save_lineage(
        first, oracle.init_trainables(params, oracle.Hyper(bias=0.7), seed=5, random_gates=True)
    )
    common = [
        "train",
        *toy.flags,
        "--model",
        "wide",
        *FLAGS,
        "--resume",
        str(first),
        "--no_shuffle",
        "--caption_crop",
        "none",
    ]
    bf16, zero3 = ["--precision", "bf16"], ["--precision", "bf16", "--deepspeed", "zero3"]
    kinds = {
        "bf16": bf16,
        "zero3": zero3,
        "recomputed": [*zero3, "--checkpoint_activations", "full"],
        "sdpa": [*bf16, "--attention", "sdpa"],
        "cut": [*bf16, "--max_steps", "7"],
        "fp32": [],
        "cpu": [],
    }
    begun = {}
    for name, flags in kinds.items():
        if name == "cpu":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which conftest.py has set
        begun[name] = start(*common, *flags, "--output_dir", str(tmp_path / name), ranks=1)
    monkeypatch.undo()
    for name, ended in begun.items():
        assert ended.wait() == [0], (name, ended.output)
        assert ("by Triton kernels" in ended.output) == (name != "cpu")
        assert ("rows by CUDA graphs" in ended.output) == (name in ("bf16", "cut")), ended.output
    exact = losses(tmp_path / "cpu")
    assert len(exact) == 10
    for name in ("bf16", "zero3", "recomputed", "sdpa", "fp32"):
        assert losses(tmp_path / name) == pytest.approx(
            exact, rel=1e-5 if name == "fp32" else HALF_LOSS_RTOL
        ), name
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-6)

    ended = start(*common, *bf16, "--output_dir", str(tmp_path / "cut"), ranks=1)
    assert ended.wait() == [0], ended.output
    assert digest(tmp_path / "cut", 10) == digest(tmp_path / "bf16", 10)


def test_nothing_waits_and_nothing_is_compiled_after_the_third_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Forward and backward of steps of many lengths, and scoring, start their kernels without one wait for the device."""
    import triton

    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1)
    )
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    counts = []
    for place in range(8):
        batch = training_batch(work.training(place, 2 + place)).pin_memory()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if place >= 3 else "default")
        try:
            fast(batch.to(CUDA)).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(len(compiled))
    assert counts[2:] == [counts[2]] * 6, counts
    scoring = [batch.pin_memory() for batch in scoring_batches(work.scoring(0, 2))]
    with torch.no_grad():
        fast(scoring[0].to(CUDA))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in scoring:
                fast(batch.to(CUDA))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("num_adapted", "heads"), [(4, 4), (2, 4), (3, 2)], ids=["all", "some", "grouped"]
)
def test_records_compute_what_they_recorded(
    num_adapted: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size as kernels one by one, recorded, and replayed: the same losses to the bit; gradients up to attention's order of sums."""
    fast, work = (
        toy_on_the_gpu(replace(TOY, n_kv_heads=heads), num_adapted),
        SyntheticWorkload(TOY.vocab_size),
    )
    use_graphs(fast)
    replayed = fast.graphed
    batches = [training_batch(work.training(place, 2 + place % 3)).to(CUDA) for place in range(12)]
    found: dict[str, list[tuple[torch.Tensor, dict[str, torch.Tensor]]]] = {}
    for how in ("eager", "first", "second", "third", "unrecorded"):
        fast.graphed = None if how == "eager" else replayed
        if how == "unrecorded":
            use_graphs(fast)
            assert fast.graphed is not replayed
            monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 0)
        for batch in batches:
            losses = fast(batch)
            losses.sum().backward()
            found.setdefault(how, []).append((losses.detach(), take_gradients(fast)))
    assert replayed is not None and all(
        program.is_captured for program in replayed.entries.values()
    )
    assert 1 < len(replayed.entries) < len(batches)
    fast.graphed = replayed
    for batch in batches[:2]:  # gradients add up: what a record returns is not where it writes next
        fast(batch).sum().backward()
    for name, gradient in take_gradients(fast).items():
        both = found["third"][0][1][name] + found["third"][1][1][name]
        assert correctness.distance(gradient, both) <= 1e-2, name
    for how, steps in found.items():
        for (losses, gradients), (same, of_same), (eager, of_eager) in zip(
            steps, found["unrecorded"], found["eager"], strict=True
        ):
            assert how == "eager" or torch.equal(losses, same), how
            assert correctness.distance(losses, eager) <= 1e-2
            for name, gradient in gradients.items():
                assert correctness.distance(gradient, of_same[name]) <= 1e-2, (how, name)
                assert correctness.distance(gradient, of_eager[name]) <= 5e-2, (how, name)


def test_a_replayed_step_waits_for_nothing() -> None:
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    use_graphs(fast)
    batch = training_batch(work.training(0, 4)).pin_memory()
    for _ in range(3):
        fast(batch.to(CUDA)).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        fast(batch.to(CUDA)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_backward_that_comes_too_late_says_so() -> None:
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    use_graphs(fast)
    first, second = (fast(training_batch(work.training(place, 2)).to(CUDA)) for place in range(2))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="VICO_GRAPHS=off"):
        first.sum().backward()
