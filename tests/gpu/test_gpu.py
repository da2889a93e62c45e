"""What only a GPU can show: `bash tests/run.sh -m gpu`. Elsewhere these tests are skipped."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
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
from vico.distributed import launcher_env
from vico.model import cuda_graphs
from vico.model.attention.backends import choose_attention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.interfaces import LowerLayers
from vico.model.ops.logits import Divergence, compare_predictions
from vico.model.vico import ViCo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
CUDA = torch.device("cuda")
TOY = LlamaConfig(256, 4, 4, 2000, multiple_of=64)
HEADS_OF_7B = LlamaConfig(4096, 1, 32, 32000)
HALF_LOSS_RTOL = 1e-2  # bf16 on a random tiny model, as in test_training
FLAGS = "--epochs 2 --warmup_epochs 1 --lr 5e-3 --bias 0.7 --batch_size 4 --num_workers 0".split()
Step = tuple[torch.Tensor, dict[str, torch.Tensor]]  # losses, and the gradient of every trainable


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


@contextmanager
def waiting_is_an_error(is_error: bool = True) -> Iterator[None]:
    """Raises where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error" if is_error else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_computes_the_definition(dtype: torch.dtype) -> None:
    """Outputs and the gradients of q, k, v and gate2.

    On training's streams, scoring's trees and the last layer's few query rows.
    """
    report = correctness.attention_backends(HEADS_OF_7B, CUDA, dtype, repeats=1)
    backends = report["backends"]
    worst = {name: entry["worst"] for name, entry in backends.items() if entry["runs"]}
    assert report["equal"], (worst, report["bound"])
    # sdpa and plain, and in half precision varlen.
    assert len(worst) >= (3 if dtype != torch.float32 else 2), backends


def test_twenty_steps_against_fp32_on_the_cpu() -> None:
    report = correctness.twenty_steps(TOY, CUDA, torch.bfloat16)
    assert report["equal"], report


def test_no_farther_from_fp32_than_the_plain_baseline() -> None:
    report = correctness.toy_distances(TOY, CUDA, torch.bfloat16, videos=4)
    assert report["equal"], report["fast_over_plain"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keep_and_comparisons_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    """KL, its gradient and what cognition compares, of equal states; several chunks on the CPU."""
    generator = torch.Generator().manual_seed(0)
    weight_WD = torch.randn(32000, 256, generator=generator).to(dtype) / 8
    p_ND = torch.randn(600, 256, generator=generator).to(dtype)
    q_ND = (p_ND.float() + 0.1 * torch.randn(600, 256, generator=generator)).to(dtype)
    ids_N, rows_N = torch.randint(32000, (600,), generator=generator), torch.arange(600).flip(0)
    results = []
    for device in (torch.device("cpu"), CUDA):
        p, own, weight, rows, ids = (x.to(device) for x in (p_ND, q_ND, weight_WD, rows_N, ids_N))
        own.requires_grad_()
        found = Divergence.apply(own, p, weight)
        (gradient,) = torch.autograd.grad(found.sum(), own)
        with torch.no_grad():
            compared = compare_predictions(p, own, weight, rows, ids)
        results.append([x.detach().cpu() for x in (found, gradient, compared)])
    (kl, gradient, compared), (gpu_kl, gpu_gradient, gpu_compared) = results
    assert torch.allclose(gpu_kl, kl, rtol=1e-4, atol=1e-5) and (kl > 1e-3).all()
    half_bound = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert correctness.distance(gpu_gradient.float(), gradient.float()) <= half_bound
    assert torch.allclose(gpu_compared[:3], compared[:3], rtol=1e-4, atol=1e-5)
    # A rounding may turn a tie.
    assert (gpu_compared[3:] != compared[3:]).float().mean() <= 1e-3


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in records(folder / "steps.jsonl")]


def digest(folder: Path, step: int) -> str:
    path = folder / f"checkpoint-{step}" / "adapter_model.safetensors"
    return hashlib.sha256(path.read_bytes()).hexdigest()


BF16, ZERO3 = "--precision bf16", "--precision bf16 --deepspeed zero3"
KINDS = {
    "bf16": BF16,
    "zero3": ZERO3,
    "recomputed": f"{ZERO3} --checkpoint_activations full",
    "sdpa": f"{BF16} --attention sdpa",
    "cut": f"{BF16} --max_steps 7",
    "fp32": "",
    "cpu": "",
}


def test_whole_runs(toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs under DeepSpeed side by side, one of which is resumed."""
    checkpoint, vocab_size = tmp_path / "start.pth", toy.tokenizer.vocab_size()
    sizes = {"dim": 128, "n_layers": 3, "n_heads": 2}
    oracle_files.write_tiny_meta(toy.llama / "wide", vocab_size, shards=1, **sizes)
    params, _ = oracle_files.load_meta(toy.llama / "wide")
    hyper = oracle.Hyper(bias=0.7)
    trainables = oracle.init_trainables(params, hyper, seed=5, random_gates=True)
    oracle_files.save_published(checkpoint, trainables)
    common = ["train", *toy.flags, "--model", "wide", *FLAGS, "--resume", str(checkpoint)]
    common += ["--no_shuffle", "--caption_crop", "none"]
    runs = {}
    for name, flags in KINDS.items():
        if name == "cpu":
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
            monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which conftest.py has set
        output_dir = ["--output_dir", str(tmp_path / name)]
        runs[name] = start(*common, *flags.split(), *output_dir, ranks=1)
    monkeypatch.undo()
    for name, run in runs.items():
        assert run.wait() == [0], (name, run.output)
        assert ("by Triton kernels" in run.output) == (name != "cpu")
        assert ("rows by CUDA graphs" in run.output) == (name in ("bf16", "cut")), run.output
    expected = losses(tmp_path / "cpu")
    assert len(expected) == 10
    for name in ("bf16", "zero3", "recomputed", "sdpa", "fp32"):
        bound = 1e-5 if name == "fp32" else HALF_LOSS_RTOL
        assert losses(tmp_path / name) == pytest.approx(expected, rel=bound), name
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "recomputed"), rel=1e-6)

    resumed = start(*common, *BF16.split(), "--output_dir", str(tmp_path / "cut"), ranks=1)
    assert resumed.wait() == [0], resumed.output
    assert digest(tmp_path / "cut", 10) == digest(tmp_path / "bf16", 10)


def test_two_ranks_on_one_gpu(toy: ToyData, tmp_path: Path) -> None:
    """Under both ZeRO stages, and with CUDA graphs on two ranks: losses of one rank alone."""
    common = ["train", *toy.flags, *FLAGS, "--no_shuffle", "--caption_crop", "none", *BF16.split()]
    environment = {launcher_env.SHARED_GPU_VARIABLE: "on"}
    runs = {}
    for ranks, stage in ((1, "zero2"), (2, "zero2"), (2, "zero3")):
        out = tmp_path / f"{stage}-{ranks}"
        flags = ["--deepspeed", stage, "--batch_size", str(4 // ranks), "--output_dir", str(out)]
        runs[out] = start(*common, *flags, ranks=ranks, environment=environment)
        assert runs[out].wait() == [0] * ranks, runs[out].output
        assert ("rows by CUDA graphs" in runs[out].output) == (stage == "zero2")
    expected, *others = map(losses, runs)
    assert len(expected) == 10
    for found in others:
        assert found == pytest.approx(expected, rel=HALF_LOSS_RTOL)


def test_no_waits_and_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the third step: training steps of many lengths, and scoring, launch without a wait."""
    import triton

    compiled: list[object] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **_: compiled.append(1)
    )
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    counts = []
    for place in range(8):
        batch = training_batch(work.training(place, 2 + place)).pin_memory()
        with waiting_is_an_error(place >= 3):
            fast(batch.to(CUDA)).sum().backward()
        counts.append(len(compiled))
    assert counts[2:] == [counts[2]] * 6, counts
    scoring = [batch.pin_memory() for batch in scoring_batches(work.scoring(0, 2))]
    with torch.no_grad():
        fast(scoring[0].to(CUDA))
        with waiting_is_an_error():
            for batch in scoring:
                fast(batch.to(CUDA))


@pytest.mark.parametrize(
    ("num_adapted", "kv_heads"), [(4, 4), (2, 4), (3, 2)], ids=["all", "some", "grouped"]
)
def test_graphs_compute_what_they_captured(
    num_adapted: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each size uncaptured, captured and replayed: the same losses to the bit.

    Gradients are the same up to attention's order of sums. "eager": the blocks one by one.
    """
    fast = toy_on_the_gpu(replace(TOY, n_kv_heads=kv_heads), num_adapted)
    work = SyntheticWorkload(TOY.vocab_size)
    use_graphs(fast)
    graphed = fast.graphed
    batches = [training_batch(work.training(place, 2 + place % 3)).to(CUDA) for place in range(12)]
    rounds = {"eager": steps(fast, None, batches)}
    for name in ("first", "second", "third"):
        rounds[name] = steps(fast, graphed, batches)
    use_graphs(fast)
    assert isinstance(graphed, GraphedBlocks) and fast.graphed is not graphed
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 0)
    rounds["uncaptured"] = steps(fast, fast.graphed, batches)
    assert all(entry.is_captured for entry in graphed.entries.values())
    assert 1 < len(graphed.entries) < len(batches)
    require_sums(fast, graphed, batches[:2], rounds["third"][:2])
    for name, results in rounds.items():
        twins = zip(results, rounds["uncaptured"], rounds["eager"], strict=True)
        for result, uncaptured, eager in twins:
            assert name == "eager" or torch.equal(result[0], uncaptured[0]), name
            assert correctness.distance(result[0], eager[0]) <= 1e-2
            require_near(result[1], uncaptured[1], 1e-2)
            require_near(result[1], eager[1], 5e-2)


def steps(model: ViCo, graphed: LowerLayers | None, batches: list[PackedBatch]) -> list[Step]:
    model.graphed = graphed
    results = []
    for batch in batches:
        losses = model(batch)
        losses.sum().backward()
        results.append((losses.detach(), take_gradients(model)))
    return results


def require_sums(
    model: ViCo, graphed: LowerLayers, batches: list[PackedBatch], expected: list[Step]
) -> None:
    """Gradients of two batches add up: a replay does not write where an earlier one's result is."""
    model.graphed = graphed
    for batch in batches:
        model(batch).sum().backward()
    (_, first), (_, second) = expected
    sums = {name: first[name] + second[name] for name in first}
    require_near(take_gradients(model), sums, 1e-2)


def require_near(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float
) -> None:
    for name, gradient in gradients.items():
        assert correctness.distance(gradient, expected[name]) <= bound, name


def test_a_replayed_step_waits_for_nothing() -> None:
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    use_graphs(fast)
    batch = training_batch(work.training(0, 4)).pin_memory()
    for _ in range(3):
        fast(batch.to(CUDA)).sum().backward()
    with waiting_is_an_error():
        fast(batch.to(CUDA)).sum().backward()


def test_a_late_backward_is_an_error() -> None:
    fast, work = toy_on_the_gpu(), SyntheticWorkload(TOY.vocab_size)
    use_graphs(fast)
    first, second = (fast(training_batch(work.training(place, 2)).to(CUDA)) for place in range(2))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="VICO_GRAPHS=off"):
        first.sum().backward()
