"""--quantize: packed weights are trained on like the weights that they unpack to, counted by the planner, and their cost is said."""

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
from vico.cli.flags import parse
from vico.model.config import LLAMA_CONFIGS, QUANTIZED_BYTES, LlamaConfig
from vico.model.llama import FrozenLinear
from vico.model.quantized_linear import QuantizedLinear, library
from vico.model.weights.meta import SHARDED_DIM
from vico.planner.estimate import frozen_bytes
from vico.train.resume import differences
from vico.train.zero_stage import choose

PRODUCTS = tuple(name for name in SHARDED_DIM if name not in ("output", "tok_embeddings"))
ERRORS = {
    "8bit": (0.009, 0.013),
    "nf4": (0.08, 0.1),
}  # of normally distributed weights, relative; seen: 0.011, 0.092
TWIN_LOSS_RTOL = 1e-6


def packed(weight: torch.Tensor, kind: Any) -> QuantizedLinear:
    linear = QuantizedLinear(weight.shape[1], weight.shape[0], weight.dtype, kind)
    linear.fill(weight)
    return linear


ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZED_BYTES)
def test_a_product_is_that_of_the_unpacked_weight(
    kind: str, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(512, 256)).to(device, dtype)
    linear, plain = packed(weight, kind), FrozenLinear(256, 512, dtype)
    unpacked = linear.weight
    assert unpacked.dtype == dtype and linear.num_bytes == pytest.approx(
        weight.numel() * QUANTIZED_BYTES[kind], rel=1e-3
    )
    error = (unpacked.float() - weight.float()).norm() / weight.float().norm()
    assert ERRORS[kind][0] < error < ERRORS[kind][1]
    plain.weight.data = unpacked
    inputs = [torch.randn(7, 256, dtype=dtype, device=device).requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    outs = [each(x) for each, x in zip((linear, plain), inputs, strict=True)]
    for out in outs:
        out.float().square().sum().backward()
    assert torch.equal(*outs) and inputs[0].grad is not None and inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert not list(linear.parameters()) and not list(linear.buffers()), (
        "DeepSpeed is not to find it"
    )


def test_a_backbone_is_as_large_as_planned() -> None:
    """A block of 7B's proportions, packed for real."""
    config = LLAMA_CONFIGS["7B"]
    linear = config.n_layers * config.num_block_parameters
    for kind in QUANTIZED_BYTES:
        shapes = {(1024, 1024): 4, (2752, 1024): 2, (1024, 2752): 1}
        taken = sum(
            count * packed(torch.randn(shape), kind).num_bytes for shape, count in shapes.items()
        )
        numbers = sum(count * shape[0] * shape[1] for shape, count in shapes.items())
        assert taken / numbers == pytest.approx(QUANTIZED_BYTES[kind], rel=1e-3)
        assert numbers * 16 == config.num_block_parameters
        quantized = frozen_bytes(config, 2, kind) - 2 * (config.num_parameters - linear)
        assert quantized == pytest.approx(taken / numbers * linear, rel=1e-3)


@pytest.fixture(scope="module")
def models(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny` as it is, and `unpacked`: what `tiny` becomes in nf4, as weights of their own."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "tokenizer.model").symlink_to(toy.llama / "tokenizer.model")
    (folder / "tiny").symlink_to(toy.llama / "tiny")
    (folder / "unpacked").mkdir()
    (folder / "unpacked" / "params.json").symlink_to(toy.llama / "tiny" / "params.json")
    weights = torch.load(toy.llama / "tiny" / "consolidated.00.pth", weights_only=True)
    unpacked = {
        n: packed(v.float(), "nf4").weight if n.split(".")[-2] in PRODUCTS else v.float()
        for n, v in weights.items()
    }
    torch.save(unpacked, folder / "unpacked" / "consolidated.00.pth")
    return folder


def flags_of(toy: ToyData, models: Path, model: str) -> list[str]:
    where = [
        "--llama_model_path",
        str(models),
        "--model",
        model,
        "--data_path",
        str(toy.folder / "data"),
        "--precision",
        "fp32",
    ]
    return [*where, "--max_seq_len", "256", "--num_workers", "0"]


@pytest.fixture(scope="module")
def run(toy: ToyData, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two ranks, on packed weights, with recomputed layers; the last three after a stop."""
    folder = tmp_path_factory.mktemp("run") / "out"
    flags = [
        *flags_of(toy, models, "tiny"),
        *TRAINING,
        "--batch_size",
        "4",
        "--quantize",
        "nf4",
        "--checkpoint_activations",
        "2",
    ]
    flags += ["--attention", "sdpa"]  # whose blocks are one Function, with a gradient of their own
    succeeds("train", *flags, "--output_dir", str(folder), "--max_steps", "2", ranks=2)
    said = succeeds("train", *flags, "--output_dir", str(folder), ranks=2)
    assert "resuming from step 2\n" in said.output and "ZeRO-2 (" in said.output
    return folder


TRAINING = ["--epochs", "2", "--warmup_epochs", "1", "--lr", "0.02", "--bias", "0.7"]


def test_training_is_that_on_the_unpacked_weights(
    toy: ToyData, models: Path, run: Path, tmp_path: Path
) -> None:
    flags = [
        *flags_of(toy, models, "unpacked"),
        *TRAINING,
        "--batch_size",
        "8",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    succeeds("train", *flags)
    ours, theirs = records(run / "steps.jsonl"), records(tmp_path / "out" / "steps.jsonl")
    assert [line["step"] for line in ours] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=TWIN_LOSS_RTOL) and a[
            "grad_norm"
        ] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_what_it_costs_is_said(toy: ToyData, models: Path, run: Path, tmp_path: Path) -> None:
    """And is what two evaluations differ by: the run's last one, and one of the same trainables on the weights as they are."""
    said = succeeds("quantize-eval", "--resume", str(run / "checkpoint-6")).stdouts[0].splitlines()
    found = json.loads(said[-1])
    weights = str(run / "checkpoint-6" / "adapter_model.safetensors")
    succeeds(
        "eval", "--resume", weights, *flags_of(toy, models, "tiny"), "--output_dir", str(tmp_path)
    )
    with_nf4, whole = (
        torch.tensor([line["scores"] for line in records(f / "predictions_val.jsonl")]).double()
        for f in (run, tmp_path)
    )
    apart = (with_nf4 - whole).abs()
    assert found["n"] == 10 and found["quantize"] == "nf4" and apart.mean() > 1e-3
    assert found["mean_score_distance"] == pytest.approx(float(apart.mean()), rel=1e-3)
    assert found["largest_score_distance"] == pytest.approx(float(apart.max()), rel=1e-3)
    assert found["predictions_changed"] == int((with_nf4.argmin(1) != whole.argmin(1)).sum())
    assert found["acc_quantized"] == records(run / "log.txt")[-1]["val_acc"]
    assert any(line.startswith("  score distance   ") for line in said)


def test_refusals_are_one_line(
    toy: ToyData, models: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*flags_of(toy, models, "tiny"), *TRAINING]
    config = parse(
        [*flags, "--quantize", "nf4", "--deepspeed", "zero3"], "vico train", ""
    ).resolve()
    said = refusal(choose, config, LlamaConfig(32, 3, 4, 400), 1, None, True)
    assert said == "--quantize nf4: is for ZeRO-2, and --deepspeed zero3 is ZeRO-3; leave one out"
    ended = vico(
        "cost", "--resume", str(run / "checkpoint-6" / "adapter_model.safetensors"), *flags
    )
    assert (
        ended.codes == [2]
        and "vico: error: --quantize is missing: name what" in ended.stderrs[0].splitlines()[-1]
    )
    plain = parse(flags, "vico train", "").resolve()
    assert ("quantize", '"nf4"', "null") in differences(
        json.loads((run / "args.json").read_text()), plain
    ), "another run"
    assert "quantize" not in [name for name, *_ in differences({}, plain)], (
        "saved before there was the flag"
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    assert re.fullmatch(
        r"--quantize: bitsandbytes .*; run pip install .*\[quantized\]'", refusal(library)
    )
