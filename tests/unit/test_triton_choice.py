"""Which code computes a product, a norm or an attention, and what is said about it.

Nothing here runs a kernel: what is not there is put in its place.
"""

import importlib.util
import runpy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vico.model import config
from vico.model.attention.masks import attention_mask
from vico.model.attention.segment import SegmentAttention
from vico.model.batch import Segment
from vico.model.ops import autograd, fp8, triton_ops
from vico.model.ops.logits import vocabulary_logits

CPU, GPU = torch.device("cpu"), torch.device("cuda")
HAS_GPU, HAS_TRITON = torch.cuda.is_available(), importlib.util.find_spec("triton") is not None
PLAIN = "elementwise work by plain operations"


@pytest.mark.parametrize(
    ("value", "is_enabled"), [(None, True), ("triton", True), ("plain", False)]
)
def test_the_switch(value: str | None, is_enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """VICO_KERNELS; Triton is imported only where its kernels can run."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("VICO_KERNELS", raising=False)
    if value is not None:
        monkeypatch.setenv("VICO_KERNELS", value)
    module = runpy.run_path(triton_ops.__file__)
    assert (module["ENABLED"], module["INTERPRETED"]) == (is_enabled, False)
    assert (module["_INSTALLED"], module["IMPORTED"]) == (HAS_TRITON, HAS_TRITON and HAS_GPU)
    assert module["describe"](CPU) == f"{PLAIN} (a CPU)"


def give_capability(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    triton_ops._is_recent.cache_clear()
    monkeypatch.setattr(triton_ops, "_INSTALLED", True)
    monkeypatch.setattr(triton_ops, "ENABLED", True)


@pytest.mark.parametrize(
    ("capability", "is_recent"), [((7, 5), False), ((8, 0), True), ((8, 6), True), ((9, 0), True)]
)
def test_what_is_said_of_a_gpu(
    capability: tuple[int, int], is_recent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_capability(monkeypatch, capability)
    reason = f"{PLAIN} (a GPU before compute capability 8.0)"
    kernels = "elementwise work by Triton kernels"
    assert triton_ops.describe(GPU) == (kernels if is_recent else reason)
    monkeypatch.setattr(triton_ops, "IMPORTED", True)
    assert triton_ops.can_run_on(GPU) == triton_ops.can_run_on(torch.device("cuda:1")) == is_recent
    monkeypatch.setattr(triton_ops, "ENABLED", False)
    assert triton_ops.describe(GPU) == f"{PLAIN} (VICO_KERNELS=plain)"
    monkeypatch.setattr(triton_ops, "_INSTALLED", False)
    assert triton_ops.describe(GPU) == f"{PLAIN} (no Triton here)"
    monkeypatch.setattr(triton_ops, "IMPORTED", False)
    assert not triton_ops.can_run_on(GPU)
    triton_ops._is_recent.cache_clear()


def test_what_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of neighbouring numbers; heads whose width is a power of two, 16 or more."""
    x = torch.zeros(4, 32)
    monkeypatch.setattr(triton_ops, "_INSTALLED", True)
    monkeypatch.setattr(triton_ops, "ENABLED", True)
    if not HAS_GPU:
        monkeypatch.setattr(triton_ops, "INTERPRETED", False)
        assert not triton_ops.can_run(x) and not triton_ops.can_run_on(CPU)
    monkeypatch.setattr(triton_ops, "INTERPRETED", True)
    monkeypatch.setattr(triton_ops, "IMPORTED", True)
    assert triton_ops.can_run(x) and triton_ops.can_run_on(CPU)
    assert not triton_ops.can_run(x.t()) and not triton_ops.can_run(x[:, ::2])
    widths = [
        width for width in range(1, 130) if triton_ops.can_run_on_heads(x.new_zeros(2, 3, width))
    ]
    assert widths == [16, 32, 64, 128]
    assert fp8.can_run_kernels(x) and not fp8.can_run_kernels(x[:0])
    for name in ("ENABLED", "_INSTALLED"):
        with monkeypatch.context() as patch:
            patch.setattr(triton_ops, name, False)
            assert not triton_ops.can_run(x)


@pytest.mark.skipif(autograd._ONEDNN_LINEAR is None, reason="this torch has no such product")
def test_which_product_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's for matrices in fp32 on a CPU, and only for these: it takes no others."""
    right: Any = autograd._ONEDNN_LINEAR
    shapes: list[torch.Size] = []

    def counted(x: Tensor, *others: Any) -> Any:
        shapes.append(x.shape)
        return right(x, *others)

    monkeypatch.setattr(autograd, "_ONEDNN_LINEAR", counted)
    torch.manual_seed(0)
    weight = torch.randn(5, 8)
    for shape, dtype, is_counted in (
        ((3, 8), torch.float32, True),
        ((1, 8), torch.float32, True),
        ((0, 8), torch.float32, False),
        ((2, 3, 8), torch.float32, False),
        ((8,), torch.float32, False),
        ((3, 8), torch.bfloat16, False),
    ):
        x = torch.randn(shape).to(dtype)
        out = autograd.linear(x, weight.to(dtype))
        assert torch.allclose(out, x @ weight.to(dtype).t(), rtol=1e-5, atol=1e-6)
        base = torch.ones_like(out)
        assert torch.equal(autograd.linear_add(base, x, weight.to(dtype)), out + 1)
        assert torch.equal(base, torch.ones_like(out))
        assert shapes == [torch.Size(shape)] * (2 if is_counted else 0)
        shapes.clear()


class Largest(TorchDispatchMode):
    """The most numbers in fp32 that a conversion made."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default:
            self.numbers = max(self.numbers, out.numel())
        return out


@pytest.mark.parametrize(
    ("num_bytes", "num_rows"), [(4 * 8 * 3, 3), (4 * 8 * 4 - 1, 3), (7, 1), (10**6, 10)]
)
def test_rows_of_the_vocabulary_are_converted_in_parts(
    num_bytes: int, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as the bytes allow, and one at least."""
    monkeypatch.setitem(config.HEAD_CHUNK_BYTES, "cpu", num_bytes)
    torch.manual_seed(0)
    h_RD, weight_WD = torch.randn(1, 8).bfloat16(), torch.randn(10, 8).bfloat16()
    with Largest() as largest:
        logits_RW = vocabulary_logits(h_RD, weight_WD)
    assert largest.numbers == 8 * num_rows
    assert logits_RW.dtype == torch.float32 and logits_RW.shape == (1, 10)
    assert torch.allclose(logits_RW, h_RD.float() @ weight_WD.float().t(), atol=1e-5)


def test_tiles_of_segment_attention() -> None:
    """The same bytes in both types, unless a size is given; a layout is made once per stream."""
    attention = SegmentAttention()
    sizes = [attention.tile_rows(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert sizes == [16, 32, 32]
    assert SegmentAttention(tile_rows=64).tile_rows(torch.float32) == 64
    segments = (Segment(0, 20, None, False, False),)
    like = torch.zeros(20, 1, 16)
    layout = attention.make_layout(segments, like, for_backward=True)
    assert layout.tile_rows == 16 and layout.for_backward
    assert not attention.make_layout(segments, like, for_backward=False).for_backward
    fixed = attention.with_layout(layout)
    assert fixed.layout(attention_mask(()), like) is layout
    assert SegmentAttention(tile_rows=64).with_layout(layout).tile_rows(torch.bfloat16) == 64
