"""The kernels of segment attention against the definition, in float64.

On a GPU, or through Triton's interpreter on the CPU: then in a process of their own, because
Triton decides at its import whether it interprets.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
IN_A_CHILD = "VICO_TEST_SEGMENT"
if not torch.cuda.is_available() and os.environ.get(IN_A_CHILD) != "1":

    def run_in_the_interpreter(which: str) -> None:
        environment = {**os.environ, IN_A_CHILD: "1", "TRITON_INTERPRET": "1"}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
        ended = subprocess.run(
            [*command, __file__],
            cwd=Path(__file__).resolve().parents[2],
            env=environment,
            capture_output=True,
            encoding="utf-8",
            timeout=1500,
        )
        assert ended.returncode == 0 and "passed" in ended.stdout, ended.stdout[-4000:]

    def test_in_the_interpreter() -> None:
        run_in_the_interpreter("not slow")

    @pytest.mark.slow
    def test_many_trees_in_the_interpreter() -> None:
        run_in_the_interpreter("slow")

else:
    from benchmarks.baseline.models import random_weights, set_weights, take_gradients
    from benchmarks.baseline.variants import scoring_batches, training_batch
    from benchmarks.measure.workload import SyntheticWorkload
    from support.before_nan import before_nan
    from support.segment_trees import Segments, random_segments, visible_pairs
    from vico.model.attention import segment_tiles
    from vico.model.attention.backends import choose_attention
    from vico.model.attention.masks import Attend, attention_mask
    from vico.model.attention.reference import attend_plain
    from vico.model.attention.segment import SegmentAttention
    from vico.model.batch import Segment
    from vico.model.block_runners import choose_block_runners
    from vico.model.config import LlamaConfig
    from vico.model.cuda_graphs import GraphedBlocks
    from vico.model.llama import rotary_angles
    from vico.model.ops import segment_ops, triton_ops
    from vico.model.ops.prompt_heads import PromptHeads
    from vico.model.vico import ViCo

    DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Relative to the largest entry of the tensor. fp32: sums in another order; measured 1e-6. Half:
    # inputs are exact, outputs and the factors of products are rounded, to 11 and to 8 bits; the
    # interpreter cuts bf16 where a GPU rounds. Measured: 1.1e-3; 9e-3, and 2.5e-2 for gate2.
    BOUNDS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
    NAMES = "out q k v gate2 prompt_k prompt_v gate1".split()

    def angles_of(num_rows: int, width: int) -> Tensor:
        return rotary_angles(torch.arange(num_rows, device=DEVICE) * 7 % 40, width, 10000.0)

    def rotated(x: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
        angles = angles_of(len(x), x.shape[-1]).to(torch.complex128)
        return torch.view_as_real(pairs * angles).flatten(-2)

    def definition_with_rotary(q: Tensor, k: Tensor, *others: Tensor, segments: Segments) -> Tensor:
        return definition(rotated(q), rotated(k), *others, segments=segments)

    def definition(
        q: Tensor, k: Tensor, v: Tensor, gate2: Tensor, *prompt: Tensor, segments: Segments
    ) -> Tensor:
        """METHOD section 1 with whole score matrices; without a prompt its first softmax alone."""
        group, scale = q.shape[1] // k.shape[1], 1 / math.sqrt(q.shape[-1])
        visible, gated = (pairs.to(q.device) for pairs in visible_pairs(segments))
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = scale * torch.einsum("qhd,khd->hqk", q, k) + gate2[:, None, None] * gated
        weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
        out = torch.einsum("hqk,khd->qhd", weights, v)
        if prompt:
            pk, pv = (x.repeat_interleave(group, 1) for x in prompt[:2])
            prompt_weights = (scale * torch.einsum("qhd,ahd->hqa", q, pk)).softmax(-1)
            gates = prompt[2].tanh()[:, None, None]
            out = out + torch.einsum("hqa,ahd->qhd", gates * prompt_weights, pv)
        return out

    def random_inputs(
        num_rows: int, heads: tuple[int, int], width: int, length: int, dtype: torch.dtype
    ) -> list[Tensor]:
        """q, k, v, gate2, the prompt's k and v, gate1, the output's gradient."""
        generator = torch.Generator().manual_seed(num_rows)
        num_heads, num_key_heads = heads
        sizes = [(num_rows, num_heads), *[(num_rows, num_key_heads)] * 2, (num_heads,)]
        sizes += [*[(length, num_key_heads)] * 2, (num_heads,), (num_rows, num_heads)]
        inputs = []
        for size in sizes:
            is_gate = len(size) == 1
            shape = size if is_gate else (*size, width)
            value = torch.randn(shape, generator=generator).to(DEVICE)
            inputs.append(before_nan(value if is_gate else value.to(dtype)))
        return inputs

    def by_kernels(inputs: list[Tensor], segments: Segments) -> list[Tensor]:
        """(out, the gradients of all inputs)."""
        q, k, v, gate2, *prompt, upstream = inputs
        attention = SegmentAttention(tile_rows=16)
        layout = attention.layout(attention_mask(segments), q)
        heads = PromptHeads(*prompt)
        angles = angles_of(len(q), q.shape[-1])
        out, saved = attention.forward_with_prompt(q, k, v, gate2, heads, angles, layout)
        gradients = attention.backward_with_prompt(upstream, saved, angles, layout)
        assert gradients.gate2_H is not None and gradients.prompt is not None
        return [out, *gradients[:4], *gradients.prompt]

    def largest_term(inputs: list[Tensor]) -> float:
        """Of a score's two in the gradient of its q or k: |upstream v| |q or k| / sqrt(width)."""
        q, k, v, *_, upstream = (x.double() for x in inputs)
        v = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
        weight = torch.einsum("qhd,khd->hqk", upstream, v).abs().max()
        return float(weight * max(q.abs().max(), k.abs().max()) / math.sqrt(q.shape[-1]))

    def require_definition(
        segments: Segments,
        dtype: torch.dtype = torch.float32,
        heads: tuple[int, int] = (2, 2),
        width: int = 16,
        length: int = 10,
    ) -> None:
        """Output and gradients; one below 0.1, a tenth of the upstream's, counts as that.

        Where a row sees one key, its softmax is 1, and the gradients of its score are differences
        of equal terms. They are 0 up to the rounding of these.
        """
        inputs = random_inputs(segments[-1].stop, heads, width, length, dtype)
        actual = by_kernels(inputs, segments)
        exact = [x.double().requires_grad_() for x in inputs[:-1]]
        out = definition_with_rotary(*exact, segments=segments)
        expected = [out, *torch.autograd.grad(out, exact, inputs[-1].double())]
        for name, a, b in zip(NAMES, actual, expected, strict=True):
            assert a.shape == b.shape and a.isfinite().all(), name
            largest = max(float(b.detach().abs().max()), 0.1)
            if not b.any():
                largest = largest_term(inputs)
            distance = float((a - b.detach()).abs().max()) / largest
            assert distance <= BOUNDS[dtype], (name, distance, segments)

    def require_tree(seed: int) -> None:
        dtype = (torch.float32, torch.bfloat16, torch.float32, torch.float16)[seed % 4]
        heads = ((2, 2), (2, 1), (4, 2))[seed % 3]
        lengths = (1, 2, 5, 15, 16, 17, 33) if seed % 5 else (1, 2, 3)
        width, length = ((16, 10), (24, 1), (16, 17))[seed // 3 % 3]
        require_definition(random_segments(seed, lengths), dtype, heads, width, length)

    @pytest.mark.parametrize("first", range(0, 16, 4))
    def test_random_trees(first: int) -> None:
        for seed in range(first, first + 4):
            require_tree(seed)

    @pytest.mark.slow
    @pytest.mark.parametrize("first", range(0, 200, 20))
    def test_two_hundred_random_trees(first: int) -> None:
        for seed in range(first, first + 20):
            require_tree(seed)
            if seed % 2:  # in half precision before
                require_definition(random_segments(seed))

    def chain(*lengths: int) -> Segments:
        """Each segment the parent of the next; the second is a video."""
        stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        return tuple(
            Segment(stop - length, stop, i - 1 if i else None, i == 1, i > 1)
            for i, (stop, length) in enumerate(zip(stops, lengths, strict=True))
        )

    def test_a_tile_and_one_row_more_or_less() -> None:
        require_definition(chain(15, 16, 17, 1))

    def test_options_and_questions_of_several_videos() -> None:
        """An instruction, two videos, a question each, and options that share a question's rows."""
        instruction = Segment(0, 3, None, False, False)
        videos = (Segment(3, 7, 0, True, False), Segment(7, 18, 1, False, True))
        options = tuple(Segment(18 + 2 * i, 20 + 2 * i, 2, False, True) for i in range(3))
        more = (Segment(24, 28, 0, True, False), Segment(28, 31, 6, False, True))
        require_definition((instruction, *videos, *options, *more), heads=(4, 2))

    def test_rows_that_many_see_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (segment_tiles, segment_ops):
            monkeypatch.setattr(module, "MAX_VISITS", 1)
        shared = Segment(0, 17, None, False, False)
        children = [Segment(17 + 9 * i, 26 + 9 * i, 0, False, bool(i % 2)) for i in range(3)]
        segments = (shared, *children)
        assert SegmentAttention(tile_rows=16).host_layout(segments, torch.float32).own.shared_tiles
        require_definition(segments, heads=(2, 1))

    def test_equal_inputs_give_equal_bits() -> None:
        segments = chain(5, 4, 17)
        inputs = random_inputs(26, (2, 1), 16, 10, torch.float16)
        first, second = (by_kernels(inputs, segments) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("has_gate", [True, False])
    def test_without_a_prompt(has_gate: bool) -> None:
        """As autograd calls it, for layers without adapter and for the last one."""
        segments = chain(5, 4, 9)
        q, k, v, gate2, *_, upstream = random_inputs(18, (2, 1), 16, 1, torch.float32)
        inputs = [q, k, v, *([gate2] if has_gate else [])]
        attend, _ = choose_attention("segment", DEVICE, torch.float32)
        inputs = [x.requires_grad_() for x in inputs]
        gate = inputs[3] if has_gate else None
        out = attend(*inputs[:3], gate, attention_mask(segments))
        gradients = torch.autograd.grad(out, inputs, upstream)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        gates = exact[3] if has_gate else torch.zeros(2, device=DEVICE)
        expected = definition(*exact[:3], gates, segments=segments)
        of_expected = torch.autograd.grad(expected, exact, upstream.double())
        for a, b in zip([out, *gradients], [expected, *of_expected], strict=True):
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()

    CONFIG = LlamaConfig(32, 2, 2, 200, multiple_of=16)
    GROUPED = LlamaConfig(32, 3, 2, 200, multiple_of=16, n_kv_heads=1)
    WORK = SyntheticWorkload(200)

    def model_by(attend: Attend, config: LlamaConfig) -> ViCo:
        model = ViCo(config, 2, 10, 10, 100.0, torch.float32)
        set_weights(model, random_weights(model))
        choose_block_runners(model.to(DEVICE), attend)
        return model

    def step(model: ViCo) -> dict[str, Tensor]:
        losses = model(training_batch(WORK.training(0, 1)).to(DEVICE))
        losses.sum().backward()
        return {"losses": losses.detach(), **take_gradients(model)}

    def require_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
        assert set(actual) == set(expected)
        for name, value in actual.items():
            distance = float((value - expected[name]).norm() / expected[name].norm())
            assert distance <= 2e-5, (name, distance)

    @pytest.fixture
    def only_segment_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
        """The others have their own tests."""
        monkeypatch.setattr(triton_ops, "ENABLED", False)

    @pytest.mark.usefixtures("only_segment_kernels")
    def test_a_step_and_scores_of_a_model() -> None:
        """Losses, every trainable's gradient and options' scores, by fused blocks."""
        reference = model_by(attend_plain, CONFIG)
        model = model_by(SegmentAttention(tile_rows=128), CONFIG)
        assert [block.run.__name__ for block in model.blocks] == ["run_fused", "run_modules"]
        require_same(step(model), step(reference))
        batch = scoring_batches(WORK.scoring(0, 1))[0].to(DEVICE)
        with torch.no_grad():
            require_same({"scores": model(batch)}, {"scores": reference(batch)})

    @pytest.mark.usefixtures("only_segment_kernels")
    def test_a_step_of_graphed_blocks_with_grouped_heads() -> None:
        """Over a padded stream and static tables; the lowest layer has no adapter."""
        model = model_by(SegmentAttention(tile_rows=128), GROUPED)
        model.graphed = GraphedBlocks(model)
        require_same(step(model), step(model_by(attend_plain, GROUPED)))
        assert [block.run.__name__ for block in model.blocks][1] == "run_fused"
