"""--quantize: training equals that on the dequantized weights; its memory and cost are known."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.errors import refusal
from support.processes import succeeds, vico
from support.toy_dataset import ToyData, records
from vico.cli.env import _quantization
from vico.cli.flags import parse
from vico.model.config import LLAMA_CONFIGS, QUANTIZED_BYTES, LlamaConfig
from vico.model.llama import FrozenLinear
from vico.model.ops import fp8
from vico.model.quantized_linear import QuantizedLinear, library
from vico.model.weights.meta import SHARDED_DIM
from vico.planner.estimate import frozen_bytes
from vico.train.resume import differences
from vico.train.zero_stage import choose

LINEAR_LAYERS = set(SHARDED_DIM) - {"output", "tok_embeddings"}
# Of normally distributed weights, relative. Measured: 0.011 and 0.092.
ERRORS = {"8bit": (0.009, 0.013), "nf4": (0.08, 0.1)}
TWIN_LOSS_RTOL = 1e-6
HAS_FP8 = fp8.why_not(torch.device("cpu"), torch.bfloat16) is None
TRAINING = "--epochs 2 --warmup_epochs 1 --lr 0.02 --bias 0.7".split()
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


def quantized(weight: torch.Tensor, kind: Any) -> QuantizedLinear:
    linear = QuantizedLinear(weight.shape[1], weight.shape[0], weight.dtype, kind)
    linear.fill(weight)
    return linear


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZED_BYTES)
def test_a_layer_is_that_of_the_dequantized_weight(
    kind: str, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(512, 256)).to(device, dtype)
    linear, plain = quantized(weight, kind), FrozenLinear(256, 512, dtype)
    dequantized = linear.weight
    assert dequantized.dtype == dtype
    assert linear.num_bytes == pytest.approx(weight.numel() * QUANTIZED_BYTES[kind], rel=1e-3)
    error = (dequantized.float() - weight.float()).norm() / weight.float().norm()
    assert ERRORS[kind][0] < error < ERRORS[kind][1]
    plain.weight.data = dequantized
    inputs = [torch.randn(7, 256, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outs = linear(inputs[0]), plain(inputs[1])
    for out in outs:
        out.float().square().sum().backward()
    assert inputs[0].grad is not None and inputs[1].grad is not None
    assert torch.equal(*outs) and torch.equal(inputs[0].grad, inputs[1].grad)
    # DeepSpeed must not find the weight.
    assert not list(linear.parameters()) and not list(linear.buffers())


def test_a_backbone_is_as_large_as_planned() -> None:
    """A block of 7B's proportions, quantized for real."""
    config = LLAMA_CONFIGS["7B"]
    num_linear = config.n_layers * config.num_block_parameters
    shapes = [(1024, 1024)] * 4 + [(2752, 1024)] * 2 + [(1024, 2752)]
    num_weights = sum(rows * columns for rows, columns in shapes)
    assert num_weights * 16 == config.num_block_parameters
    for kind in QUANTIZED_BYTES:
        num_bytes = sum(quantized(torch.randn(shape), kind).num_bytes for shape in shapes)
        assert num_bytes / num_weights == pytest.approx(QUANTIZED_BYTES[kind], rel=1e-3)
        planned = frozen_bytes(config, 2, kind) - 2 * (config.num_parameters - num_linear)
        assert planned == pytest.approx(num_bytes / num_weights * num_linear, rel=1e-3)


@pytest.fixture(scope="module")
def models(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as it is, and `dequantized`: the weights that `tiny` has in nf4."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tokenizer.model").symlink_to(toy.llama / "tokenizer.model")
    (folder / "tiny").symlink_to(toy.llama / "tiny")
    (folder / "dequantized").mkdir()
    (folder / "dequantized" / "params.json").symlink_to(toy.llama / "tiny" / "params.json")
    weights = torch.load(toy.llama / "tiny" / "consolidated.00.pth", weights_only=True)
    for name, weight in weights.items():
        is_linear = name.split(".")[-2] in LINEAR_LAYERS
        weights[name] = quantized(weight.float(), "nf4").weight if is_linear else weight.float()
    torch.save(weights, folder / "dequantized" / "consolidated.00.pth")
    return folder


def flags_of(toy: ToyData, models: Path, model: str) -> list[str]:
    data = ["--data_path", str(toy.folder / "data"), "--llama_model_path", str(models)]
    return [*data, *f"--model {model} --precision fp32 --max_seq_len 256 --num_workers 0".split()]


@pytest.fixture(scope="module")
def run(toy: ToyData, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, on quantized weights, with recomputed layers; resumed after two.

    Under --attention sdpa the blocks are one Function each, with a gradient of their own.
    """
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = [*flags_of(toy, models, "tiny"), *TRAINING, "--output_dir", str(folder)]
    flags += "--batch_size 4 --quantize nf4 --checkpoint_activations 2 --attention sdpa".split()
    succeeds("train", *flags, "--max_steps", "2", ranks=2)
    ended = succeeds("train", *flags, ranks=2)
    assert "resuming from step 2\n" in ended.output and "ZeRO-2 (" in ended.output
    return folder


def test_training_is_that_on_the_dequantized_weights(
    toy: ToyData, models: Path, run: Path, tmp_path: Path
) -> None:
    flags = [*flags_of(toy, models, "dequantized"), *TRAINING, "--batch_size", "8"]
    succeeds("train", *flags, "--output_dir", str(tmp_path / "out"))
    steps, expected = records(run / "steps.jsonl"), records(tmp_path / "out" / "steps.jsonl")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(steps, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TWIN_LOSS_RTOL)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


@pytest.mark.skipif(not HAS_FP8, reason="torch 2.11 has no such product on a CPU")
def test_two_ranks_train_in_fp8_as_one_does(toy: ToyData, models: Path, tmp_path: Path) -> None:
    """With the same micro-batches. Where questions share rows, gradients are quantized summed."""
    flags = [
        *flags_of(toy, models, "tiny"),
        *TRAINING,
        *"--batch_size 1 --quantize fp8 --attention sdpa".split(),
    ]
    flags += ["--max_steps", "6"]
    runs = []
    for ranks in (1, 2):
        own = ["--accum_iter", str(2 // ranks), "--output_dir", str(tmp_path / str(ranks))]
        succeeds("train", *flags, *own, ranks=ranks)
        runs.append(records(tmp_path / str(ranks) / "steps.jsonl"))
    assert len(runs[0]) == 6
    for a, b in zip(*runs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TWIN_LOSS_RTOL)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def scores_of(folder: Path) -> torch.Tensor:
    lines = records(folder / "predictions_val.jsonl")
    return torch.tensor([line["scores"] for line in lines]).double()


def test_cost_of_quantization(toy: ToyData, models: Path, run: Path, tmp_path: Path) -> None:
    """What two evaluations differ by.

    The run's last one, and one of the same trainables on the weights without quantization.
    """
    ended = succeeds("quantize-eval", "--resume", str(run / "checkpoint-6"))
    lines = ended.stdouts[0].splitlines()
    report = json.loads(lines[-1])
    weights = str(run / "checkpoint-6" / "adapter_model.safetensors")
    flags = [*flags_of(toy, models, "tiny"), "--output_dir", str(tmp_path)]
    succeeds("eval", "--resume", weights, *flags)
    scores, exact_scores = scores_of(run), scores_of(tmp_path)
    distances = (scores - exact_scores).abs()
    assert report["n"] == 10 and report["quantize"] == "nf4" and distances.mean() > 1e-3
    assert report["mean_score_distance"] == pytest.approx(float(distances.mean()), rel=1e-3)
    assert report["largest_score_distance"] == pytest.approx(float(distances.max()), rel=1e-3)
    changed = scores.argmin(1) != exact_scores.argmin(1)
    assert report["predictions_changed"] == int(changed.sum())
    assert report["acc_quantized"] == records(run / "log.txt")[-1]["val_acc"]
    assert any(line.startswith("  score distance   ") for line in lines)


def test_refusals_are_one_line(
    toy: ToyData, models: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags_of(toy, models, "tiny"), *TRAINING]
    for kind in QUANTIZED_BYTES:
        zero3 = [*flags, *f"--quantize {kind} --deepspeed zero3".split()]
        config = parse(zero3, "vico train", "").resolve()
        message = refusal(choose, config, LlamaConfig(32, 3, 4, 400), 1, None, True)
        expected = "is for ZeRO-2, and --deepspeed zero3 is ZeRO-3; leave one out"
        assert message == f"--quantize {kind}: {expected}"
    weights = str(run / "checkpoint-6" / "adapter_model.safetensors")
    ended = vico("quantize-eval", "--resume", weights, *flags)
    last_line = ended.stderrs[0].splitlines()[-1]
    assert ended.codes == [2]
    assert "vico: error: --quantize is missing: give 8bit, nf4 or fp8, to be" in last_line
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    pattern = r"--quantize: bitsandbytes .*; run pip install .*\[quantized\]'"
    assert re.fullmatch(pattern, refusal(library))
    told = _quantization()  # of vico env
    assert told.startswith("fp8; " if HAS_FP8 else "none; ")
    assert f"; no 8bit: {refusal(library)}; no nf4: {refusal(library)}" in told


def test_another_quantization_is_another_run(toy: ToyData, models: Path, run: Path) -> None:
    """Unless the run is from before the flag."""
    plain = parse([*flags_of(toy, models, "tiny"), *TRAINING], "vico train", "").resolve()
    saved = json.loads((run / "args.json").read_text())
    assert ("quantize", '"nf4"', "null") in differences(saved, plain)
    assert "quantize" not in [name for name, *_ in differences({}, plain)]
