"""The Triton kernels against the plain operations that they replace.

On a GPU, or through Triton's interpreter on the CPU.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
IN_A_CHILD = "VICO_TEST_KERNELS"
if not torch.cuda.is_available() and os.environ.get(IN_A_CHILD) != "1":
    # Triton decides at its import whether it interprets: the tests below run in their own process.
    def test_kernels_through_the_interpreter() -> None:
        environment = {**os.environ, IN_A_CHILD: "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        root = Path(__file__).resolve().parents[2]
        ended = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, encoding="utf-8", timeout=300
        )
        assert ended.returncode == 0 and "passed" in ended.stdout, ended.stdout[-4000:]

else:
    from benchmarks.baseline.models import make_fast, random_weights, set_weights, take_gradients
    from benchmarks.baseline.variants import Packed
    from benchmarks.measure.workload import SyntheticWorkload
    from support.before_nan import before_nan
    from vico.model.attention.backends import KERNELS
    from vico.model.attention.segment_layout import varlen_layout
    from vico.model.attention.varlen import PackedAttention, gate_unit, widen_heads
    from vico.model.batch import Segment
    from vico.model.block_runners import choose_block_runners
    from vico.model.config import LlamaConfig
    from vico.model.llama import rotary_angles
    from vico.model.ops import fp8, triton_ops
    from vico.model.ops.autograd import (
        AdapterAttention,
        FrozenRMSNorm,
        RotaryEmbedding,
        SwiGLU,
        rms_norm_backward,
    )
    from vico.model.ops.fp8 import Rows8

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # fp32: sums in another order. Half: plain operations round more often than a kernel.
    RTOL = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    HEADS, WIDTH = 5, 16

    # Triton's interpreter (3.9) is wrong on bf16: products take it for whole numbers, and it cuts
    # where a GPU rounds.
    DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])]

    @pytest.fixture(params=DTYPES, ids=str)
    def dtype(request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    @pytest.fixture(autouse=True)
    def restored() -> Iterator[None]:
        yield
        triton_ops.ENABLED = True

    def made(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        numbers = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        return before_nan(numbers.to(DEVICE, dtype))

    def distance(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        return float((a - b).norm() / b.norm().clamp(min=1e-12))

    def require_same(
        function: Callable[..., Tensor],
        inputs: list[Tensor],
        constants: list[object],
        dtype: torch.dtype,
    ) -> None:
        """Output and gradients of the kernels against those of the plain operations.

        Their distance from fp32 may be at most twice that of the plain operations.
        """
        by_kernels = output_and_gradients(True, function, inputs, constants)
        plain = output_and_gradients(False, function, inputs, constants)
        fp32_inputs = [x.float() if x.dtype == dtype else x for x in inputs]
        exact = output_and_gradients(False, function, fp32_inputs, constants)
        assert len(by_kernels) == len(plain)
        for a, b, c in zip(by_kernels, plain, exact, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            distances = distance(a, c), distance(b, c)
            assert distances[0] <= max(2 * distances[1], RTOL[torch.float32]), distances
            assert distance(a, b) <= RTOL[dtype]

    def output_and_gradients(
        use_kernels: bool,
        function: Callable[..., Tensor],
        inputs: list[Tensor],
        constants: list[object],
    ) -> list[Tensor]:
        triton_ops.ENABLED = use_kernels
        inputs = [before_nan(x).requires_grad_() for x in inputs]
        out = function(*inputs, *constants)
        upstream = before_nan(made(*out.shape, dtype=torch.float32, seed=9).to(out.dtype))
        gradients = torch.autograd.grad(out, inputs, upstream, allow_unused=True)
        return [out, *(gradient for gradient in gradients if gradient is not None)]

    @pytest.mark.parametrize(("rows", "dim"), [(1, 64), (37, 48), (130, 200)])
    def test_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
        weight = made(dim, dtype=dtype, seed=1)

        def norm(x: Tensor) -> Tensor:
            return FrozenRMSNorm.apply(x, weight.to(x.dtype), 1e-5)

        require_same(norm, [made(rows, dim, dtype=dtype)], [], dtype)

    def test_residual_gradient_is_added_by_the_norm(dtype: torch.dtype) -> None:
        x, weight, upstream, residual = (made(37, 48, dtype=dtype, seed=seed) for seed in range(4))
        scale = triton_ops.rms_norm(x, weight[0], 1e-5)[1]
        inputs = (upstream, x, scale, weight[0])
        together = rms_norm_backward(*inputs, residual)
        if dtype == torch.float32:
            assert distance(together, rms_norm_backward(*inputs) + residual) <= RTOL[dtype]
        triton_ops.ENABLED = False
        of_fp32 = (value.float() for value in inputs)
        exact = rms_norm_backward(*of_fp32, residual.float())
        assert distance(together, exact) <= RTOL[dtype] / 4  # rounded once

    @pytest.mark.parametrize(("rows", "dim"), [(1, 64), (37, 88)])
    def test_swiglu(rows: int, dim: int, dtype: torch.dtype) -> None:
        inputs = [made(rows, dim, dtype=dtype, seed=seed) for seed in range(2)]
        require_same(SwiGLU.apply, inputs, [], dtype)

    def test_rotary_embedding(dtype: torch.dtype) -> None:
        angles = rotary_angles(torch.arange(7, device=DEVICE) * 3, WIDTH, 10000.0)
        require_same(RotaryEmbedding.apply, [made(7, HEADS, WIDTH, dtype=dtype)], [angles], dtype)
        # Rows that lie apart, as attention's gradient leaves them.
        apart = made(7, HEADS, WIDTH + 8, dtype=dtype)[..., :WIDTH]
        rotated = RotaryEmbedding.apply(apart, angles)
        triton_ops.ENABLED = False
        expected = RotaryEmbedding.apply(apart.contiguous(), angles)
        assert distance(rotated, expected) <= RTOL[dtype]

    def test_rotary_embedding_of_two(dtype: torch.dtype) -> None:
        angles = rotary_angles(torch.arange(7, device=DEVICE) * 3, WIDTH, 10000.0)
        angles = torch.view_as_real(angles)
        q, k = (made(7, HEADS, WIDTH, dtype=dtype, seed=seed) for seed in range(2))
        rotated_q, rotated_k = triton_ops.apply_rotary_emb_qk(q, k, angles, -1.0)
        assert torch.equal(rotated_q, triton_ops.apply_rotary_emb(q, angles, -1.0))
        assert torch.equal(rotated_k, triton_ops.apply_rotary_emb(k, angles, -1.0))

    ADAPTERS = [(1, 16, 10), (64, 16, 17), (70, 32, 50), (65, 128, 1)]

    @pytest.mark.parametrize(("rows", "width", "length"), ADAPTERS)
    def test_adapter_attention(rows: int, width: int, length: int, dtype: torch.dtype) -> None:
        row_counts = enumerate((rows, rows, length, length))
        inputs = [made(num, HEADS, width, dtype=dtype, seed=seed) for seed, num in row_counts]
        gates = made(HEADS, dtype=torch.float32, seed=7)
        require_same(AdapterAttention.apply, [*inputs, gates], [], dtype)

    def test_widening_is_exact(dtype: torch.dtype) -> None:
        segments = (
            Segment(0, 3, None, False, False),
            Segment(3, 7, 0, True, False),
            Segment(7, 12, 1, False, True),
        )
        layout = varlen_layout(segments, DEVICE, dtype, True)
        inputs = [made(12, HEADS, WIDTH, dtype=dtype, seed=i) for i in range(3)]
        gates = made(HEADS, dtype=torch.float32, seed=4)
        flags = (layout.after_video_T, layout.is_video_T)
        for rows_K in (layout.key_rows_K, layout.key_rows_K[:5]):  # more than rows, and fewer
            constants = (*flags, rows_K, gate_unit(WIDTH), 8)
            by_kernel = triton_ops.widen(*inputs, gates, *constants)
            expected = widen_heads(*inputs, gates, *constants)
            for a, b in zip(by_kernel, expected, strict=True):
                assert torch.equal(a, b)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter takes minutes for it")
    def test_a_whole_step(dtype: torch.dtype) -> None:
        """Losses and every trainable's gradient of a packed step, and scores."""
        config = LlamaConfig(32, 2, 2, 200, multiple_of=16)
        fast = make_fast(config, dtype)
        set_weights(fast, random_weights(fast))
        choose_block_runners(fast.to(DEVICE), PackedAttention(KERNELS["sdpa"]))
        variant, work = Packed(fast, DEVICE), SyntheticWorkload(config.vocab_size)
        results = []
        for triton_ops.ENABLED in (True, False):
            losses = torch.tensor(variant.train(work.training(0, 2)))
            results.append((losses, take_gradients(fast), variant.score(work.scoring(0, 1))))
        (losses, gradients, scores), (plain_losses, plain_gradients, plain_scores) = results
        assert distance(losses, plain_losses) <= RTOL[dtype]
        assert distance(scores, plain_scores) <= RTOL[dtype]
        bound = 2e-4 if dtype == torch.float32 else 0.1
        for name, gradient in gradients.items():
            assert distance(gradient, plain_gradients[name]) <= bound, name

    def require_equal(by_kernel: Rows8, plain: Rows8) -> None:
        assert by_kernel.dtype == plain.dtype and torch.equal(by_kernel.scale_T1, plain.scale_T1)
        codes = by_kernel.numbers_TK.view(torch.uint8), plain.numbers_TK.view(torch.uint8)
        assert torch.equal(*codes)

    @pytest.mark.parametrize(("rows", "dim"), [(1, 64), (37, 48), (70, 1000)])
    def test_rows_are_quantized_alike(rows: int, dim: int, dtype: torch.dtype) -> None:
        """Bit for bit: also zeros, tiny rows, and numbers below the smallest normal one."""
        x = made(rows, dim, dtype=dtype)
        x[0, ::3], x[-1] = 0, x[-1] * 1e-5
        x[rows // 2] *= torch.logspace(-8, 0, dim, device=DEVICE).to(dtype)
        factor = made(dim, dtype=torch.float32, seed=1) * 1e-4
        by_kernel = fp8.quantize_rows(x), fp8.quantize_rows(x, factor)
        triton_ops.ENABLED = False
        require_equal(by_kernel[0], fp8.quantize_rows(x))
        require_equal(by_kernel[1], fp8.quantize_rows(x, factor))

    def test_every_magnitude_is_rounded_alike() -> None:
        """All codes, the middles between neighbours, and the numbers next to those."""
        codes = torch.arange(127, dtype=torch.uint8).view(fp8.E4M3).float()
        middles = (codes[1:] + codes[:-1]) / 2
        x = torch.cat([codes, middles, middles * (1 + 1e-6), middles * (1 - 1e-6)])
        x = torch.cat([x, -x]).to(DEVICE)[None]  # the largest is 448: the scale is 1
        by_kernel = fp8.quantize_rows(x)
        triton_ops.ENABLED = False
        require_equal(by_kernel, fp8.quantize_rows(x))
        assert torch.equal(by_kernel.numbers_TK[0, :127].float().cpu(), codes)

    @pytest.mark.filterwarnings("ignore:invalid value encountered")
    def test_a_row_that_is_not_finite_is_told() -> None:
        x = made(3, 40, dtype=torch.float32)
        x[0, 1], x[2, 2] = float("inf"), float("nan")
        rows = fp8.quantize_rows(x)
        values = rows.numbers_TK.float() * rows.scale_T1
        assert values.sum(dim=1).isfinite().tolist() == [False, True, False]

    def test_kernels_quantize_what_they_would_write(dtype: torch.dtype) -> None:
        """The norm, SwiGLU and its gradients, against the same followed by quantize_rows."""
        x, gradient, a, b = (made(9, 200, dtype=dtype, seed=seed) for seed in range(4))
        weight = made(200, dtype=dtype, seed=5)
        normed, scale_T1 = triton_ops.rms_norm(x, weight, 1e-5)
        rows, own_scale_T1 = fp8.rms_norm(x, weight, 1e-5)
        assert torch.equal(own_scale_T1, scale_T1)
        require_equal(rows, fp8.quantize_rows(normed))
        require_equal(fp8.swiglu(a, b), fp8.quantize_rows(triton_ops.swiglu(a, b)))
        factors = (
            made(200, 1, dtype=torch.float32, seed=6),
            made(200, 1, dtype=torch.float32, seed=7),
        )
        own = fp8.swiglu_backward(gradient, a, b, factors)
        plain = triton_ops.swiglu_backward(gradient, a, b)
        for quantized, written, factor in zip(own, plain, factors, strict=True):
            require_equal(quantized, fp8.quantize_rows(written, factor.flatten()))
