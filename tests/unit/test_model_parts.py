"""Parts of the model that a whole step hides: extremes, what runs twice, and what is put back."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline.models import random_weights, set_weights
from benchmarks.baseline.variants import training_batch
from benchmarks.measure.workload import SyntheticWorkload
from support.errors import refusal
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model import block_runners
from vico.model.attention import backends, cache
from vico.model.attention.backends import KERNELS, choose_attention
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.cache import KeyValueCache
from vico.model.attention.masks import attention_mask
from vico.model.attention.reference import attend_plain
from vico.model.attention.segment import SegmentAttention
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import Segment
from vico.model.block_runners import attending_by, choose_block_runners
from vico.model.config import LlamaConfig, trainable_shapes
from vico.model.interfaces import Context
from vico.model.ops import autograd, triton_ops
from vico.model.ops.autograd import linear_cross_entropy, rms_norm, rms_norm_backward
from vico.model.ops.logits import compare_predictions
from vico.model.vico import ViCo, initial_trainables

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HALF = (torch.float16, torch.bfloat16)
CONFIG = LlamaConfig(32, 3, 2, 200, multiple_of=16)


# Operations


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_token_beyond_doubt(dtype: torch.dtype) -> None:
    """All other probabilities are 0 in fp32: no loss and no gradient, and no NaN.

    A target that is as far below has the logits' difference as its loss.
    """
    weight_WD = torch.tensor([[16.0, 0.0], [-16.0, 0.0], [-16.0, 1.0]], dtype=dtype)
    h_RD = torch.tensor([[16.0, 0.0]], dtype=dtype).requires_grad_()
    rows_N, ids_N = torch.zeros(2, dtype=torch.int64), torch.tensor([0, 1])
    losses_N = linear_cross_entropy(h_RD, weight_WD, rows_N, ids_N)
    assert 0 <= losses_N[0] < 1e-30 and losses_N[1] == 512
    for weights, expected in (([1.0, 0.0], [[0.0, 0.0]]), ([0.0, 1.0], [[32.0, 0.0]])):
        upstream = torch.tensor(weights)
        (gradient_RD,) = torch.autograd.grad(losses_N, h_RD, upstream, retain_graph=True)
        assert torch.allclose(gradient_RD.float(), torch.tensor(expected), rtol=0, atol=1e-30)
    with torch.no_grad():
        scores_N = linear_cross_entropy(h_RD, weight_WD, rows_N, ids_N)
    assert 0 <= scores_N[0] < 1e-30 and scores_N[1] == 512


def test_scoring_computes_the_logits_of_a_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In half precision training has a row for each target, as it needs each one's gradient."""
    num_rows: list[int] = []
    right = autograd.linear

    def counted(x: Any, weight: Any) -> Tensor:
        num_rows.append(len(x))
        return right(x, weight)

    monkeypatch.setattr(autograd, "linear", counted)
    weight_WD, h_RD = torch.randn(7, 4).bfloat16(), torch.randn(3, 4).bfloat16()
    rows_N, ids_N = torch.tensor([0, 1, 1, 1, 2]), torch.arange(5)
    with torch.no_grad():
        scores_N = linear_cross_entropy(h_RD, weight_WD, rows_N, ids_N)
    assert num_rows == [3]
    losses_N = linear_cross_entropy(h_RD.requires_grad_(), weight_WD, rows_N, ids_N)
    assert num_rows == [3, 5] and torch.allclose(losses_N, scores_N, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_norm_is_computed_in_fp32(dtype: torch.dtype) -> None:
    """Squares of large numbers are beyond fp16, and sums of many beyond bf16's bits."""
    generator = torch.Generator().manual_seed(0)
    x = (300 * torch.randn(3, 500, generator=generator)).to(dtype)
    x[2] /= 1e5
    weight = torch.randn(500, generator=generator).to(dtype)
    out, scale = rms_norm(x, weight, 1e-5)
    expected = (x.double().square().mean(dim=1, keepdim=True) + 1e-5).rsqrt()
    assert scale.dtype == torch.float32 and scale.shape == (3, 1)
    assert torch.allclose(scale.double(), expected, rtol=1e-6, atol=0)
    rounding = torch.finfo(dtype).eps
    assert torch.allclose(out.double(), x.double() * expected * weight, rtol=2 * rounding, atol=0)
    assert out.dtype == dtype


def test_a_norms_gradient_is_the_definitions() -> None:
    """With the gradient that goes past the norm, and without it; the inputs stay as they are."""
    generator = torch.Generator().manual_seed(0)
    x, upstream, residual = torch.randn(3, 5, 16, generator=generator).unbind()
    weight = torch.randn(16, generator=generator)
    exact = x.double().requires_grad_()
    out = exact * (exact.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * weight
    (expected,) = torch.autograd.grad(out, exact, upstream.double())
    scale = rms_norm(x, weight, 1e-5)[1]
    inputs = (upstream, x, scale, weight, residual)
    before = [value.clone() for value in inputs]
    assert torch.allclose(rms_norm_backward(*inputs[:4]).double(), expected, rtol=1e-5, atol=1e-6)
    together = rms_norm_backward(*inputs).double()
    assert torch.allclose(together, expected + residual, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(*pair) for pair in zip(inputs, before, strict=True))


def test_predictions_compared_by_the_definition() -> None:
    """By whole distributions in float64, for two targets of one row and one of another."""
    generator = torch.Generator().manual_seed(0)
    frozen_RD, adapted_RD = torch.randn(2, 3, 4, generator=generator).unbind()
    weight_WD = torch.randn(9, 4, generator=generator)
    rows_N, ids_N = torch.tensor([2, 2, 0]), torch.tensor([3, 8, 1])
    p_NW, q_NW = (
        (h_RD.double() @ weight_WD.double().t()).softmax(1)[rows_N]
        for h_RD in (frozen_RD, adapted_RD)
    )
    found = compare_predictions(frozen_RD, adapted_RD, weight_WD, rows_N, ids_N)
    targets = torch.arange(3), ids_N
    expected = [
        -p_NW[targets].log(),
        -q_NW[targets].log(),
        F.kl_div(q_NW.log(), p_NW, reduction="none").sum(dim=1),
        (p_NW.argmax(1) == q_NW.argmax(1)).double(),
        (p_NW.argmax(1) == ids_N).double(),
        (q_NW.argmax(1) == ids_N).double(),
    ]
    assert found.dtype == torch.float64
    assert torch.allclose(found, torch.stack(expected), rtol=1e-5, atol=1e-6)
    none = torch.empty(0, dtype=torch.int64)
    assert compare_predictions(frozen_RD, adapted_RD, weight_WD, none, none).shape == (6, 0)


# The cache of generation


def test_a_cache_that_grows_is_attention_over_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sequences with a video and without, grouped heads, more rows than columns at a time."""
    monkeypatch.setattr(cache, "ADDED_COLUMNS", 2)
    tokens = [(1, VIDEO_SLOT, VIDEO_SLOT, 5, 6, 0), (1, 7, 0)]
    about_video = TokenSequence("vqa", tokens[0], range(5, 6), 1)
    alone = TokenSequence("cap", tokens[1], range(2, 3), 3)
    prompts = pack([Example(about_video, 0, 0), Example(alone, 0, 0)], torch.zeros(1, 2, 768))
    lengths, num_new, numbers = (5, 2), 5, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 10, heads, 8, generator=numbers) for heads in (4, 2, 2))
    gate2_H = torch.randn(4, generator=numbers)
    whole = KeyValueCache(1, prompts)
    layer = whole.layers[0]
    stream = torch.zeros(2, prompts.num_rows, 2, 8)
    for i, length in enumerate(lengths):
        stream[:, whole.rows_BL[i, :length]] = torch.stack([k[i, :length], v[i, :length]])
    k[0, 0], v[0, 0] = stream[:, 0]  # they share their first row, which the second has written
    assert prompts.num_rows == sum(lengths) - 1 and not layer.is_filled
    layer.fill(*stream)
    assert layer.is_filled
    for step in range(num_new):
        assert whole.grow().tolist() == [length + step for length in lengths]
        places = torch.tensor(lengths) + step
        new = [x[torch.arange(2), places] for x in (q, k, v)]
        out = layer.attend(*new, gate2_H)
        for i, length in enumerate(lengths):
            stop, keys = length + step + 1, [x[i, : length + step + 1] for x in (k, v)]
            k_LHd, v_LHd = (x.repeat_interleave(2, dim=1) for x in keys)
            scores_HL = torch.einsum("hd,lhd->hl", new[0][i], k_LHd) / math.sqrt(8)
            if i == 0:
                scores_HL[:, 1:3] += gate2_H[:, None]
            expected = torch.einsum("hl,lhd->hd", scores_HL.softmax(1), v_LHd)
            assert torch.allclose(out[i], expected, atol=1e-5), (step, i, stop)


# What computes the blocks


def small_model(num_adapted: int = 3) -> ViCo:
    model = ViCo(CONFIG, num_adapted, 10, 10, 100.0, torch.float32)
    set_weights(model, random_weights(model))
    return model


@pytest.mark.parametrize("num_checkpointed", [0, 1, 2, 3])
def test_which_layers_run_again_in_backward(num_checkpointed: int) -> None:
    """The lowest ones, and none where autograd is off."""
    model = small_model()
    assert model.num_checkpointed == 0 and model.graphed is None
    choose_block_runners(model, attend_plain, num_checkpointed)
    runs: Counter[int] = Counter()

    def count(module: nn.Module, *_: Any) -> None:
        runs[norms.index(module)] += 1

    norms: list[nn.Module] = [block.attention_norm for block in model.blocks]
    for norm in norms:
        norm.register_forward_hook(count)
    batch = training_batch(SyntheticWorkload(200).training(0, 1))
    with torch.no_grad():
        model(batch)
    assert runs == {0: 1, 1: 1, 2: 1}
    runs.clear()
    model(batch).sum().backward()
    assert runs == {i: 2 if i < num_checkpointed else 1 for i in range(3)}


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16], ids=str)
def test_trainables_are_fp32(default: torch.dtype) -> None:
    """And frozen weights of the run's type, whatever torch's default is."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        model = ViCo(CONFIG, 2, 10, 10, 100.0, torch.float16)
    finally:
        torch.set_default_dtype(before)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == trainable_shapes(CONFIG, 2, 10, 10)
    for name, parameter in model.named_parameters():
        expected = torch.float32 if parameter.requires_grad else torch.float16
        assert parameter.dtype == expected, name
        assert parameter.requires_grad == (name in shapes)


def test_another_attention_for_a_while() -> None:
    """The model is as before at the end, also of an error."""
    model, packed = small_model(), PackedAttention(KERNELS["sdpa"])
    choose_block_runners(model, packed, 1)
    graphed: Any = object()
    model.graphed = graphed
    runs = [block.run for block in model.blocks]
    assert len({run.__name__ for run in runs}) == 2
    with pytest.raises(KeyError), attending_by(model, attend_plain):
        assert (model.attend, model.num_checkpointed, model.graphed) == (attend_plain, 0, None)
        assert {block.run.__name__ for block in model.blocks} == {"run_modules"}
        raise KeyError
    assert (model.attend, model.num_checkpointed, model.graphed) == (packed, 1, graphed)
    assert [block.run for block in model.blocks] == runs


def test_grouped_heads_are_fused_by_the_attention_that_takes_them() -> None:
    config = LlamaConfig(32, 3, 2, 200, multiple_of=16, n_kv_heads=1)
    for attend, fused in (
        (SegmentAttention(), ["run_modules", "run_fused", "run_modules"]),
        (PackedAttention(KERNELS["sdpa"]), ["run_modules"] * 3),
    ):
        model = ViCo(config, 2, 10, 10, 100.0, torch.float32)
        assert choose_block_runners(model, attend) == "no CUDA graphs (a CPU)"
        assert [block.run.__name__ for block in model.blocks] == fused


def test_the_switch_of_cuda_graphs() -> None:
    assert block_runners.why_no_graphs_on(CPU) == "a CPU"
    assert block_runners.why_no_graphs_on(GPU) == (
        None if block_runners.GRAPHS_ENABLED else "VICO_GRAPHS=off"
    )


def test_a_context_has_the_cache_of_its_layer() -> None:
    """Without caches it is the same for all layers."""
    mask: Any = None
    plain = Context(torch.empty(0), mask, attend_plain)
    assert plain.at_layer(2) is plain and plain.cache is None and plain.query_rows_Q is None
    caches: Any = ("a", "b", "c")
    assert Context(torch.empty(0), mask, attend_plain, caches=caches).at_layer(1).cache == "b"


def test_initial_projection_fills_its_bound() -> None:
    """Uniform between +- 1 / sqrt(feature width), as nn.Linear's."""
    values = initial_trainables(trainable_shapes(CONFIG, 2, 10, 10, 400), 1.0, 0)
    projection = values["visual_proj.weight"]
    assert projection.shape == (32, 400)
    assert 0.0495 < projection.max() <= 0.05 and -0.05 <= projection.min() < -0.0495
    assert projection.mean().abs() < 0.001


# --attention


def give_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    ("capability", "dtype", "expected"),
    [
        ((8, 0), torch.bfloat16, "attention varlen (half precision on this GPU)"),
        ((9, 0), torch.float16, "attention varlen (half precision on this GPU)"),
        (
            (7, 5),
            torch.float16,
            "attention sdpa (packed kernels want half precision on a recent GPU)",
        ),
        (
            (8, 0),
            torch.float32,
            "attention sdpa (packed kernels want half precision on a recent GPU)",
        ),
    ],
)
def test_attention_of_a_gpu(
    capability: tuple[int, int],
    dtype: torch.dtype,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_gpu(monkeypatch, capability)
    attend, said = choose_attention("auto", GPU, dtype)
    assert said == expected and isinstance(attend, PackedAttention)
    assert attend.kernel is KERNELS["varlen" if "varlen" in said else "sdpa"]
    assert attend.can_be_captured is ("varlen" in said)


def test_attention_of_a_cpu() -> None:
    assert choose_attention("auto", CPU, torch.bfloat16) == (
        attend_blocks,
        "attention blocks (a CPU)",
    )
    for name, function in (("plain", attend_plain), ("blocks", attend_blocks)):
        asked = choose_attention(name, CPU, torch.float32)
        assert asked == (function, f"attention {name} (--attention says so)")
    attend, said = choose_attention("sdpa", CPU, torch.float32)
    assert isinstance(attend, PackedAttention) and attend.kernel is KERNELS["sdpa"]
    assert said == "attention sdpa (--attention says so)" and not attend.can_be_captured


def test_attention_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    too_old = "needs a GPU of compute capability 8.0 or newer and --precision bf16 or fp16"
    give_gpu(monkeypatch, (8, 0))
    for name in ("varlen", "flash_attn"):
        for device, dtype in ((CPU, torch.bfloat16), (GPU, torch.float32)):
            assert (
                refusal(choose_attention, name, device, dtype) == f"--attention {name}: {too_old}"
            )
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert refusal(choose_attention, "flash_attn", GPU, torch.float16) == (
        "--attention flash_attn: the package is not installed; pip install '.[flash]', "
        "or leave --attention out"
    )
    assert choose_attention("varlen", GPU, torch.float16)[1].startswith("attention varlen (--att")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: name)
    attend, _ = choose_attention("flash_attn", GPU, torch.float16)
    assert isinstance(attend, PackedAttention) and attend.kernel is KERNELS["flash_attn"]
    message = "--attention blocks: is for CPUs; leave --attention out"
    assert refusal(choose_attention, "blocks", GPU, torch.float32) == message
    monkeypatch.setattr(triton_ops, "can_run_on", lambda device: True)
    attend, said = choose_attention("segment", GPU, torch.float32)
    assert isinstance(attend, SegmentAttention) and said.startswith("attention segment (--att")


def test_a_layout_is_made_again_where_backward_wants_more() -> None:
    """And for another stream; otherwise all layers share it."""
    segments = (Segment(0, 3, None, False, False), Segment(3, 5, 0, False, False))
    attention, like = PackedAttention(KERNELS["sdpa"]), torch.zeros(5, 1, 8)
    mask = attention_mask(segments)
    with torch.no_grad():
        first = attention.layout(mask, like)
        assert not first.for_backward and attention.layout(mask, like) is first
    second = attention.layout(mask, like)
    assert second.for_backward and attention.layout(mask, like) is second
    with torch.no_grad():
        assert attention.layout(mask, like) is second
    other = attention.layout(attention_mask(segments[:1]), like)
    assert other is not second and other.for_backward
