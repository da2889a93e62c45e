"""The Triton kernels against the plain operations beside them: on a GPU, else through Triton's interpreter on the CPU."""

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
    # Triton decides at its import whether it interprets, so that the tests below run in a process of their own.
    def test_kernels_through_the_interpreter() -> None:
        environment = {**os.environ, IN_A_CHILD: "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
        root = Path(__file__).resolve().parents[2]
        ended = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0 and "passed" in ended.stdout, ended.stdout[-4000:]

else:
    from benchmarks.baseline.models import make_fast, random_weights, set_weights, take_gradients
    from benchmarks.baseline.variants import Packed
    from benchmarks.measure.workload import SyntheticWorkload
    from vico.model.attention.backends import KERNELS
    from vico.model.attention.segment_layout import varlen_layout
    from vico.model.attention.varlen import PackedAttention, gate_unit, widen_heads
    from vico.model.batch import Segment
    from vico.model.block_runners import choose_block_runners
    from vico.model.config import LlamaConfig
    from vico.model.llama import rotary_angles
    from vico.model.ops import triton_ops
    from vico.model.ops.autograd import AdapterAttention, FrozenRMSNorm, RotaryEmbedding, SwiGLU

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # fp32: sums in another order. bf16: plain operations round between steps where a kernel does not.
    RTOL = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
    HEADS, WIDTH = 5, 16

    # Triton's interpreter (3.9) takes bf16 for whole numbers in products, and cuts where a GPU rounds.
    @pytest.fixture(
        params=[torch.float32, torch.float16, *([torch.bfloat16] if DEVICE.type == "cuda" else [])],
        ids=str,
    )
    def dtype(request: pytest.FixtureRequest) -> torch.dtype:
        return request.param

    @pytest.fixture(autouse=True)
    def restored() -> Iterator[None]:
        yield
        triton_ops.ENABLED = True

    def made(*size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
        return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)

    def distance(a: Tensor, b: Tensor) -> float:
        a, b = a.detach().double(), b.detach().double()
        return float((a - b).norm() / b.norm().clamp(min=1e-12))

    def same(
        function: Callable[..., Tensor],
        inputs: list[Tensor],
        constants: list[object],
        dtype: torch.dtype,
    ) -> None:
        """Output and gradients of the kernels against those of the plain operations; against fp32 they may be no farther than twice."""
        found: dict[str, list[Tensor]] = {}
        for name, kind, used in (
            ("kernels", dtype, True),
            ("plain", dtype, False),
            ("exact", torch.float32, False),
        ):
            triton_ops.ENABLED = used
            mine = [
                x.detach().to(kind if x.dtype == dtype else x.dtype).requires_grad_()
                for x in inputs
            ]
            out = function(*mine, *constants)
            upstream = made(*out.shape, dtype=torch.float32, seed=9).to(kind)
            gradients = torch.autograd.grad(out, mine, upstream, allow_unused=True)
            found[name] = [out, *(g for g in gradients if g is not None)]
        assert len(found["kernels"]) == len(found["plain"])
        for a, b, exact in zip(found["kernels"], found["plain"], found["exact"], strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            assert distance(a, exact) <= max(2 * distance(b, exact), RTOL[torch.float32]), (
                distance(a, exact),
                distance(b, exact),
            )
            assert distance(a, b) <= RTOL[dtype]

    @pytest.mark.parametrize(("rows", "dim"), [(1, 64), (37, 48), (130, 200)])
    def test_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
        weight = made(dim, dtype=dtype, seed=1)
        same(
            lambda x: FrozenRMSNorm.apply(x, weight.to(x.dtype), 1e-5),
            [made(rows, dim, dtype=dtype)],
            [],
            dtype,
        )

    @pytest.mark.parametrize(("rows", "dim"), [(1, 64), (37, 88)])
    def test_swiglu(rows: int, dim: int, dtype: torch.dtype) -> None:
        same(
            SwiGLU.apply,
            [made(rows, dim, dtype=dtype), made(rows, dim, dtype=dtype, seed=1)],
            [],
            dtype,
        )

    def test_rotary(dtype: torch.dtype) -> None:
        angles = rotary_angles(torch.arange(7, device=DEVICE) * 3, WIDTH, 10000.0)
        same(RotaryEmbedding.apply, [made(7, HEADS, WIDTH, dtype=dtype)], [angles], dtype)
        wide = made(
            7, HEADS, WIDTH + 8, dtype=dtype
        )  # rows that lie apart, as what attention's gradient leaves
        turned = RotaryEmbedding.apply(wide[..., :WIDTH], angles)
        triton_ops.ENABLED = False
        assert (
            distance(turned, RotaryEmbedding.apply(wide[..., :WIDTH].contiguous(), angles))
            <= RTOL[dtype]
        )
        pair = [made(7, HEADS, WIDTH, dtype=dtype, seed=i) for i in range(2)]
        for mine, x in zip(
            triton_ops.apply_rotary_emb_qk(pair[0], pair[1], torch.view_as_real(angles), -1.0),
            pair,
            strict=True,
        ):
            assert torch.equal(
                mine, triton_ops.apply_rotary_emb(x, torch.view_as_real(angles), -1.0)
            )

    @pytest.mark.parametrize(
        ("rows", "width", "length"), [(1, 16, 10), (64, 16, 17), (70, 32, 50), (65, 128, 1)]
    )
    def test_adapter(rows: int, width: int, length: int, dtype: torch.dtype) -> None:
        shapes = [
            (rows, HEADS, width),
            (rows, HEADS, width),
            (length, HEADS, width),
            (length, HEADS, width),
        ]
        inputs = [made(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]
        same(AdapterAttention.apply, [*inputs, made(HEADS, dtype=torch.float32, seed=7)], [], dtype)

    def test_widening_is_exact(dtype: torch.dtype) -> None:
        segments = (
            Segment(0, 3, None, False, False),
            Segment(3, 7, 0, True, False),
            Segment(7, 12, 1, False, True),
        )
        layout = varlen_layout(segments, DEVICE, dtype, True)
        inputs = [made(12, HEADS, WIDTH, dtype=dtype, seed=i) for i in range(3)]
        flags = (layout.after_video_T, layout.is_video_T, layout.key_rows_K, gate_unit(WIDTH), 8)
        gates = made(HEADS, dtype=torch.float32, seed=4)
        for mine, its in zip(
            triton_ops.widen(*inputs, gates, *flags),
            widen_heads(*inputs, gates, *flags),
            strict=True,
        ):
            assert torch.equal(mine, its)

    @pytest.mark.skipif(DEVICE.type != "cuda", reason="the interpreter takes minutes for it")
    def test_a_whole_step(dtype: torch.dtype) -> None:
        """Losses and every trainable's gradient of a packed step, and scores."""
        shape = LlamaConfig(32, 2, 2, 200, multiple_of=16)
        fast = make_fast(shape, dtype)
        set_weights(fast, random_weights(fast))
        choose_block_runners(fast.to(DEVICE), PackedAttention(KERNELS["sdpa"]))
        variant, work = Packed(fast, DEVICE), SyntheticWorkload(shape.vocab_size)
        found = []
        for triton_ops.ENABLED in (True, False):
            losses = variant.train(work.training(0, 2))
            found.append(
                (torch.tensor(losses), take_gradients(fast), variant.score(work.scoring(0, 1)))
            )
        (losses, gradients, scores), (its_losses, its_gradients, its_scores) = found
        assert (
            distance(losses, its_losses) <= RTOL[dtype]
            and distance(scores, its_scores) <= RTOL[dtype]
        )
        for name, gradient in gradients.items():
            assert distance(gradient, its_gradients[name]) <= (
                2e-4 if dtype == torch.float32 else 0.1
            ), name
