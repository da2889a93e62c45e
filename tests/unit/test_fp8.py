"""--quantize fp8: its products, the gradients of a block, memory, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from benchmarks.baseline.models import take_gradients
from benchmarks.baseline.variants import training_batch
from benchmarks.measure.workload import SyntheticWorkload, TrainingWork
from support.errors import refusal
from support.processes import ROOT, succeeds
from support.seeded_models import made, plant_outliers, usual_weights
from support.toy_dataset import records
from vico.cli.demo import make_toy_dataset
from vico.model import quantized_linear
from vico.model.config import FP8, LLAMA_CONFIGS, LlamaConfig, block_shapes
from vico.model.llama import FrozenLinear
from vico.model.ops import fp8
from vico.model.ops.fp8 import Rows8, Weight8
from vico.model.quantized_linear import Fp8Linear, require_available, require_shapes
from vico.model.vico import ViCo
from vico.planner.estimate import frozen_bytes

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    fp8.why_not(CPU, torch.bfloat16) is not None, reason="torch 2.11 has no such product on a CPU"
)
ALL_CODES = torch.arange(256, dtype=torch.uint8).view(fp8.E4M3).double()
# Products of the same quantized numbers: sums in another order, and the result's own rounding
# (measured: 2.3e-7, 1.7e-3 and 2.2e-4).
PRODUCT_RTOL = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}
# Measured: 4e-8 and 0.004; without quantization 3e-4 and 0.02 to 0.06.
LOSS_RTOL, GRADIENT_RTOL = 1e-5, 0.01
MIN_COSINE = 0.99  # measured: 0.9969 or more


def exact(rows: Rows8) -> Tensor:
    """In fp64, from the numbers and scales alone."""
    return rows.numbers_TK.double() * rows.scale_T1.double()


def distance(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("dtype", PRODUCT_RTOL, ids=str)
def test_numbers_are_the_nearest_of_e4m3(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 41, dtype=dtype)
    x[1], x[2], x[3, ::2] = 0, x[2] * 1e-4, 0
    before = x.clone()
    rows = fp8.quantize_rows(x)
    assert torch.equal(x, before) and rows.dtype == dtype
    scale_T1 = x.double().abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 448
    assert torch.allclose(rows.scale_T1.double(), scale_T1, rtol=1e-6, atol=0)
    codes = ALL_CODES[ALL_CODES.isfinite()]
    errors = (x.double() / scale_T1 - rows.numbers_TK.double()).abs()
    nearest = (x.double()[..., None] / scale_T1[..., None] - codes).abs().amin(dim=-1)
    assert (errors <= nearest + 1e-4).all()  # 448 times fp32's precision, at a tie
    # The largest keeps its value, and a row of zeros is one.
    assert torch.allclose(exact(rows).abs().amax(dim=1), x.double().abs().amax(dim=1), rtol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so(bad: float) -> None:
    """And no other is touched."""
    torch.manual_seed(0)
    x, linear = torch.randn(3, 32), filled(torch.randn(16, 32))
    x[1, 5] = bad
    out = linear(x)
    assert not out[1].isfinite().any() and out[0].isfinite().all() and out[2].isfinite().all()


def filled(weight: Tensor) -> Fp8Linear:
    with weight.device:
        linear = Fp8Linear(weight.shape[1], weight.shape[0], weight.dtype)
    linear.fill(weight)
    return linear


@pytest.mark.parametrize("dtype", PRODUCT_RTOL, ids=str)
@pytest.mark.parametrize("shape", [(512, 256), (64, 172), (17, 33)])
def test_a_product_is_that_of_the_dequantized(shape: tuple[int, int], dtype: torch.dtype) -> None:
    require_dequantized(shape, dtype, CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", [(4096, 4096), (11008, 4096), (4096, 11008)])
def test_a_product_on_a_gpu(shape: tuple[int, int]) -> None:
    require_dequantized(shape, torch.bfloat16, torch.device("cuda"))


def require_dequantized(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
    """x W^T and g W, of what was quantized; in what `exact` asks for, x is not."""
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(shape)).to(device, dtype)
    linear = filled(weight)
    x, gradient = (torch.randn(7, size).to(device, dtype) for size in reversed(shape))
    x.requires_grad_()
    out = linear(x)
    out.backward(gradient)
    w8, x8 = linear.weight, fp8.quantize_rows(x.detach())
    g8 = fp8.quantize_rows(gradient, w8.scale_N1.flatten())
    assert out.dtype == dtype and x.grad is not None and x.grad.dtype == dtype
    assert distance(out, exact(x8) @ exact(w8.by_output).t()) < PRODUCT_RTOL[dtype]
    assert distance(x.grad, exact(g8) @ exact(w8.t().by_output).t()) < PRODUCT_RTOL[dtype]
    assert distance(x.grad, gradient.double() @ exact(w8.by_output)) < 0.04
    assert distance(exact(w8.by_output), weight) < 0.03
    assert torch.equal(w8.t().by_output.numbers_TK, w8.by_output.numbers_TK.t())
    made_at_use = w8._replace(codes_KN=None).t()  # as under ZeRO-3
    assert torch.equal(fp8.scaled_product(gradient, made_at_use), x.grad)
    x.grad = None
    out = linear(x, exact=True)
    out.backward(gradient)
    assert distance(out, x.double() @ exact(w8.by_output).t()) < 2 * PRODUCT_RTOL[dtype]
    assert distance(x.grad, gradient.double() @ exact(w8.by_output)) < 2 * PRODUCT_RTOL[dtype]
    assert linear(x[:0]).shape == (0, shape[0])
    # What DeepSpeed finds, and divides.
    assert {name: p.dtype for name, p in linear.named_parameters()} == {
        "codes": torch.uint8,
        "scale": torch.float32,
    }


class ByAutograd(nn.Module):
    """Fp8Linear's definition: autograd over fp32 products of what was quantized."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.quantized = Fp8Linear(num_in, num_out, dtype)

    @property
    def weight(self) -> Weight8:
        return self.quantized.weight

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        weight_NK = as_fp32(self.weight.by_output)
        if exact:
            return x @ weight_NK.t()
        x8 = as_fp32(fp8.quantize_rows(x.detach()))
        # Its value is x8's product, its gradient that of x's.
        straight = x @ weight_NK.t() + ((x8 - x) @ weight_NK.t()).detach()
        return QuantizedGradient.apply(straight, self.weight.scale_N1.flatten())


class QuantizedGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale_N: Tensor) -> Tensor:
        ctx.scale_N = scale_N
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return as_fp32(fp8.quantize_rows(gradients[0], ctx.scale_N)) / ctx.scale_N, None


def as_fp32(rows: Rows8) -> Tensor:
    return exact(rows).float()


def losses_and_gradients(model: ViCo, num_questions: int) -> tuple[Tensor, dict[str, Tensor]]:
    batch = training_batch(SyntheticWorkload(model.config.vocab_size).training(0, num_questions))
    losses = model(batch)
    losses.sum().backward()
    return losses.detach(), take_gradients(model)


@pytest.mark.parametrize("num_checkpointed", [0, 2, None], ids=["fused", "recomputed", "modules"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_step_is_autograd_over_the_dequantized(
    kv_heads: int, num_checkpointed: int | None
) -> None:
    """All but a few roundings, which sums in another order turn the other way."""
    config = LlamaConfig(64, 3, 4, 300, multiple_of=16, n_kv_heads=kv_heads)
    weights = usual_weights(config)
    model = made(config, weights, torch.float32, Fp8Linear, num_checkpointed)
    losses, gradients = losses_and_gradients(model, 1)
    model = made(config, weights, torch.float32, ByAutograd, None)
    expected_losses, expected = losses_and_gradients(model, 1)
    model = made(config, weights, torch.float32, FrozenLinear)
    plain_losses, plain = losses_and_gradients(model, 1)
    assert distance(losses, expected_losses) < LOSS_RTOL < distance(plain_losses, expected_losses)
    for name, gradient in gradients.items():
        found = distance(gradient, expected[name])
        assert found < GRADIENT_RTOL and 4 * found < distance(plain[name], expected[name]), name


@pytest.mark.parametrize("has_outliers", [False, True])
def test_gradients_point_where_those_of_fp32_do(has_outliers: bool) -> None:
    """Those of every trainable, by bf16 with fp8, on a wide model of usual weights.

    Outliers do no harm: numbers of e4m3 have their own exponents, so that all but the smallest
    beside an outlier keep their three bits.
    """
    config = LlamaConfig(512, 4, 8, 2000, multiple_of=64)
    weights = usual_weights(config)
    if has_outliers:
        plant_outliers(weights)
    own = losses_and_gradients(made(config, weights, torch.bfloat16, Fp8Linear), 1)
    expected = losses_and_gradients(made(config, weights, torch.float32, FrozenLinear), 1)
    assert distance(own[0], expected[0]) < 1e-2
    for name, gradient in own[1].items():
        cosine = F.cosine_similarity(gradient.flatten(), expected[1][name].flatten(), dim=0)
        assert cosine > MIN_COSINE, name


def test_a_split_moves_what_sequences_share() -> None:
    """Scales are by row: without shared rows, a micro-batch is the sum of its questions.

    With them, a row's gradient is the sum of several questions' before it is rounded.
    """
    config = LlamaConfig(64, 3, 4, 300, multiple_of=16)
    model = made(config, usual_weights(config), torch.float32, Fp8Linear)
    work = SyntheticWorkload(config.vocab_size).training(0, 2)
    moved = {}
    for share in (False, True):
        whole = gradients_of(model, work, share)
        parts = [
            TrainingWork(work.vqa[i : i + 1], work.cap[i : i + 1], work.features_VFC[i : i + 1])
            for i in range(2)
        ]
        of_parts = [gradients_of(model, part, share) for part in parts]
        moved[share] = max(
            distance(whole[name], of_parts[0][name] + of_parts[1][name]) for name in whole
        )
    assert moved[False] < 3e-6 and moved[True] > 3e-5  # measured: 4e-7 and 7e-5


def gradients_of(model: ViCo, work: TrainingWork, share: bool) -> dict[str, Tensor]:
    model(training_batch(work, share)).sum().backward()
    return take_gradients(model)


def test_it_takes_the_memory_of_bf16() -> None:
    """The numbers as many bytes, and the scales a thousandth more; the planner counts the same."""
    config = LLAMA_CONFIGS["7B"]
    block = {name: shape for name, shape in block_shapes(config).items() if len(shape) == 2}
    num_bytes = num_scales = 0
    for rows, columns in block.values():
        linear = filled(torch.empty(rows, columns, dtype=torch.bfloat16, device="meta"))
        num_bytes += config.n_layers * linear.num_bytes
        num_scales += config.n_layers * (rows + columns)
        assert linear.num_bytes - 4 * (rows + columns) == 2 * rows * columns
    assert num_scales * 4 < 2e-3 * num_bytes
    in_bf16 = config.n_layers * config.num_block_parameters * 2
    assert frozen_bytes(config, 2, FP8) - frozen_bytes(config, 2) == num_bytes - in_bf16


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    require_available(FP8, torch.bfloat16)
    odd = LlamaConfig(64, 1, 8, 512, multiple_of=4)
    require_shapes(FP8, odd)  # a CPU takes any size
    monkeypatch.setattr(quantized_linear, "_device", lambda: torch.device("cuda"))
    require_shapes("nf4", odd)
    require_shapes(FP8, LLAMA_CONFIGS["7B"])
    assert refusal(require_shapes, FP8, odd) == (
        "--quantize fp8: the model's feed_forward.w1.weight has shape [172, 64], and a GPU's fp8 "
        "products take multiples of 16; leave it out for this model"
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert refusal(require_available, FP8, torch.bfloat16) == (
        "--quantize fp8: NVIDIA A100 has no fp8 units (compute capability 8.9 or newer has them); "
        "leave it out, or use another --precision, GPU or torch"
    )
    monkeypatch.setattr(quantized_linear, "_device", lambda: CPU)
    monkeypatch.setattr(torch, "_scaled_mm", of_torch_2_11)
    message = refusal(require_available, FP8, torch.bfloat16)
    assert "computes no fp8 products with scales by row and results in torch.bfloat16" in message


def of_torch_2_11(*_: object, **__: object) -> Tensor:
    raise RuntimeError("(scale_a.numel() == 1 && scale_b.numel() == 1) INTERNAL ASSERT FAILED")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
@pytest.mark.parametrize("size", ["7B", "13B", "65B"])
def test_the_kernels_compile_for_hopper(
    size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the sizes of a model, which needs no GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from vico.model.ops import fp8_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config, target = LLAMA_CONFIGS[size], GPUTarget("cuda", 90, 32)
    types = {"numbers": "*u8", "eps": "fp32"}
    types |= dict.fromkeys(("scale", "factor", "factors"), "*fp32")
    types |= {
        f"{name}_{part}": types[part]
        for name in ("da", "db")
        for part in ("numbers", "scale", "factor")
    }
    for name, dim in (
        ("quantize_kernel", config.dim),
        ("quantize_kernel", config.hidden_dim),
        ("norm_quantize_kernel", config.dim),
        ("swiglu_quantize_kernel", config.hidden_dim),
        ("swiglu_backward_quantize_kernel", config.hidden_dim),
    ):
        kernel = getattr(fp8_kernels, name)
        sizes = fp8._sizes(torch.empty(1, dim, device="meta"))
        num_warps = sizes.pop("num_warps")
        if name == "quantize_kernel":
            sizes["has_factor"] = True
        signature = {arg: types.get(arg, "*bf16") for arg in kernel.arg_names}
        signature |= dict.fromkeys(sizes, "constexpr")
        source = ASTSource(kernel, signature, sizes)
        compiled = triton.compile(source, target, {"num_warps": num_warps})
        assert compiled.asm["cubin"]


@pytest.mark.slow
def test_the_demo_is_learnt_in_fp8(tmp_path: Path) -> None:
    """Accuracy on questions, and the frozen LLaMA's perplexity on captions, against bf16."""
    demo, run = tmp_path / "demo", tmp_path / "run"
    make_toy_dataset(demo)
    flags = ["--config", str(ROOT / "launch" / "recipes" / "demo.yaml"), "--quantize", FP8]
    flags += ["--data_path", str(demo / "data"), "--output_dir", str(run)]
    flags += ["--llama_model_path", str(demo / "pretrained" / "llama")]
    succeeds("train", *flags, ranks=2)
    assert records(run / "log.txt")[-1]["val_acc"] >= 0.94
    captions = demo / "data" / "nextqa" / "llava_v15_13b_n6.json"
    text = tmp_path / "captions.txt"
    text.write_text("\n".join(list(json.loads(captions.read_text()).values())[:100]))
    perplexities = []
    for kind in ("none", FP8):
        asked = ["--resume", str(run), "--text", str(text), "--quantize", kind]
        report = json.loads(succeeds("cognition", *asked).stdouts[0].splitlines()[-1])
        perplexities.append(report["perplexity_frozen"])
    assert perplexities[1] <= 1.02 * perplexities[0]
    ended = succeeds("quantize-eval", "--resume", str(run), "--quantize", FP8)
    report = json.loads(ended.stdouts[0].splitlines()[-1])
    assert report["quantize"] == FP8 and report["acc_quantized"] >= 0.94
