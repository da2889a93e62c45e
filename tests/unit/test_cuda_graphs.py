"""Padded streams, and blocks over static tensors: what of CUDA graphs can be tested on a CPU.

There nothing is captured: an entry computes at every use, as it does at its first on a GPU.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.baseline.models import random_weights, set_weights, take_gradients
from benchmarks.baseline.variants import scoring_batches, training_batch
from benchmarks.measure.workload import SyntheticWorkload
from vico.model import block_runners, cuda_graphs
from vico.model.attention.backends import KERNELS, choose_attention
from vico.model.attention.segment_layout import LayoutArrays, segment_layout
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch, Segment
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig, round_up_coarsely
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.vico import ViCo
from vico.train.build import why_no_graphs

CONFIG = LlamaConfig(64, 4, 4, 300, multiple_of=16)
GROUPED = replace(CONFIG, n_kv_heads=2)
WORK = SyntheticWorkload(300)
CPU = torch.device("cpu")
Step = tuple[Tensor, dict[str, Tensor]]  # losses, and the gradient of every trainable


@st.composite
def trees(draw: st.DrawFn) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for i in range(draw(st.integers(1, 12))):
        start = segments[-1].stop if segments else 0
        stop = start + draw(st.integers(1, 90))
        parent = draw(st.none() | st.integers(0, i - 1)) if i else None
        segments.append(Segment(start, stop, parent, draw(st.booleans()), draw(st.booleans())))
    return tuple(segments)


@given(trees())
def test_padded_sizes(segments: tuple[Segment, ...]) -> None:
    """They hold the stream, and at least one row more."""
    layout = segment_layout(segments)
    sizes, padded = layout.sizes, layout.padded_sizes
    assert all(long >= short for long, short in zip(padded, sizes, strict=True))
    assert padded.num_rows > sizes.num_rows and padded.num_rows % 128 == 0
    assert padded.max_seqlen_q % 64 == 0 and padded.max_seqlen_k % 64 == 0


def test_padded_sizes_are_few_and_near() -> None:
    """A segment of padding, and no more; numbers rounded by at most a quarter."""
    one = Segment(0, 1, None, False, False)
    many = [replace(one, start=row, stop=row + 1) for row in range(32)]
    assert segment_layout(tuple(many[:31])).padded_sizes.num_segments == 32
    assert segment_layout(tuple(many)).padded_sizes.num_segments == 64
    rounded = {number: round_up_coarsely(number, 8) for number in range(1, 5000)}
    assert all(size % 8 == 0 and size >= number for number, size in rounded.items())
    assert all(size <= max(1.25 * number, number + 7) for number, size in rounded.items())
    assert len(set(rounded.values())) <= 50


def test_the_longest_is_that_of_all_segments() -> None:
    """Of rows, and of keys: a segment's own and those that it follows."""
    first, second = Segment(0, 70, None, False, False), Segment(70, 80, 0, False, True)
    sizes = segment_layout((first, second)).sizes
    assert (sizes.max_seqlen_q, sizes.max_seqlen_k) == (128, 128)
    longer = Segment(70, 200, 0, False, True)
    sizes = segment_layout((first, longer, Segment(200, 201, None, False, False))).sizes
    assert (sizes.max_seqlen_q, sizes.max_seqlen_k) == (192, 256)


@given(trees())
def test_padding_sees_itself_alone(segments: tuple[Segment, ...]) -> None:
    """The stream's numbers stay.

    The padding is a segment of its own, and each of its rows sees itself.
    """
    layout = segment_layout(segments)
    sizes, padded = layout.sizes, layout.padded_sizes
    before, after = layout.arrays(sizes), layout.arrays(padded)
    assert len(after.joined()) == sum(padded.array_lengths)
    for name, short, long in zip(LayoutArrays._fields, before, after, strict=True):
        assert long.dtype == np.int64 and np.array_equal(long[: len(short)], short), name
    assert (after.key_rows[sizes.num_keys :] >= sizes.num_rows).all()
    assert not after.after_video[sizes.num_rows :].any()
    assert not after.is_video[sizes.num_rows :].any()
    assert np.array_equal(after.key_rows[after.own_keys], np.arange(padded.num_rows))
    assert (after.shared_rows[sizes.num_shared_rows :] == sizes.num_rows).all()
    for starts, total in (
        (after.cu_seqlens_q, padded.num_rows),
        (after.cu_seqlens_k, padded.num_keys),
    ):
        assert (np.diff(starts) >= 0).all() and starts[0] == 0 and starts[-1] == total
    q_lengths, k_lengths = np.diff(after.cu_seqlens_q), np.diff(after.cu_seqlens_k)
    assert q_lengths.max() <= padded.max_seqlen_q and k_lengths.max() <= padded.max_seqlen_k
    assert (q_lengths <= k_lengths).all()


def test_few_sizes_serve_many_micro_batches() -> None:
    batches = [training_batch(WORK.training(place, 8)) for place in range(40)]
    sizes = {segment_layout(batch.segments).padded_sizes for batch in batches}
    assert len(sizes) <= 12, sizes


def make_model(num_adapted: int = 4, kernel: str = "sdpa", config: LlamaConfig = CONFIG) -> ViCo:
    model = ViCo(config, num_adapted, 10, 10, 100.0, torch.float32)
    set_weights(model, random_weights(model))
    choose_block_runners(model, PackedAttention(KERNELS[kernel]))
    return model


def one_batch(place: int = 0, num_questions: int = 1) -> PackedBatch:
    return training_batch(WORK.training(place, num_questions))


def step(model: ViCo, batch: PackedBatch) -> Step:
    losses = model(batch)
    losses.sum().backward()
    return losses.detach(), take_gradients(model)


def require_same(actual: Step, expected: Step) -> None:
    """Up to rounding."""
    assert torch.allclose(actual[0], expected[0], rtol=1e-5, atol=1e-6)
    for name, gradient in expected[1].items():
        assert torch.allclose(actual[1][name], gradient, rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    ("num_adapted", "config"),
    [(4, CONFIG), (2, CONFIG), (3, GROUPED)],
    ids=["all", "some", "grouped"],
)
def test_same_results_as_the_blocks(num_adapted: int, config: LlamaConfig) -> None:
    """Losses and every trainable's gradient.

    Of streams of one size in a row and of several sizes.
    """
    model = make_model(num_adapted, config=config)
    batches = [one_batch(place, 1 + place % 3) for place in (0, 3, 1, 6, 2)]
    expected = [step(model, batch) for batch in batches]
    model.graphed = graphed = GraphedBlocks(model)
    for batch, (expected_losses, expected_gradients) in zip(batches, expected, strict=True):
        losses, gradients = step(model, batch)
        assert torch.allclose(losses, expected_losses, rtol=1e-5, atol=1e-6)
        assert set(gradients) == set(expected_gradients)
        for name, gradient in expected_gradients.items():
            distance = float((gradients[name] - gradient).norm() / gradient.norm())
            assert gradient.any() and distance <= 1e-5, name
    assert 1 < len(graphed.entries) < len(batches)


@pytest.mark.parametrize(
    ("num_adapted", "config"), [(4, CONFIG), (3, CONFIG), (4, GROUPED), (3, GROUPED)]
)
def test_gradients_come_in_the_same_order(num_adapted: int, config: LlamaConfig) -> None:
    """DeepSpeed fills the buffer that ranks sum in this order.

    Some ranks may replay where others do not.
    """
    model = make_model(num_adapted, config=config)
    orders: list[list[str]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: orders[-1].append(name)
            )
    for graphed in (None, GraphedBlocks(model)):
        model.graphed = graphed
        orders.append([])
        step(model, one_batch())
    assert len(orders[0]) == 3 + 2 * num_adapted and orders[0] == orders[1]


def test_padding_is_as_finite_as_the_stream() -> None:
    """Rows of zeros would have values that no real row has.

    A value that is not finite there would spread by sums over rows.
    """
    model = make_model()
    model.graphed = GraphedBlocks(model)
    streams: list[Tensor] = []
    model.layers[0].register_forward_hook(
        lambda _module, inputs, _out: streams.append(inputs[0].detach().clone())
    )
    batch = one_batch()
    model(batch)
    (x_TD,) = streams
    assert len(x_TD) > batch.num_rows
    assert (x_TD[batch.num_rows :] == x_TD[0]).all() and x_TD[0].any()


class FakeCapture(GraphedBlocks):
    """Captures without a GPU: a replay computes again, into the same results, as a GPU does."""

    num_captures = 0

    def has_room(self, *kept_bytes: int) -> bool:
        return True

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        self.num_captures += 1
        return [*functions]


def test_captured_sizes_are_replayed() -> None:
    model = make_model()
    batches = [one_batch(place) for place in (0, 3, 7)]
    steps = [step(model, batch) for batch in batches]
    model.graphed = graphed = FakeCapture(model)
    for _ in range(3):
        for batch, expected in zip(batches, steps, strict=True):
            require_same(step(model, batch), expected)
            for entry in graphed.entries.values():
                entry.kept_bytes = 1  # as a GPU's allocator says after the first step
    assert graphed.num_captures == len(graphed.entries)
    assert all(entry.is_captured for entry in graphed.entries.values())
    for batch in batches:
        model(batch).sum().backward()
    for name, gradient in take_gradients(model).items():
        expected_sum = sum(gradients[name] for _, gradients in steps)
        assert torch.allclose(gradient, expected_sum, rtol=1e-4, atol=1e-5), name


# GiB, of which 10 are allocated: free, reserved besides, peak, in the pool of captures. A forward
# keeps 4, so a capture takes 5 GiB.
ROOM = {
    "16 are needed: 5, and 11 for the largest step": (28, 0, 20, 0, True),
    "one too few": (15, 0, 20, 0, False),
    "reserved and unused": (6, 10, 20, 0, True),
    "reserved for earlier captures": (6, 10, 20, 4, False),
    "a capture can use most of the pool": (13, 4, 20, 4, True),
    "a larger step has been": (40, 0, 60, 0, False),
    "a smaller step, so 6 for an eager one": (11, 0, 10, 0, True),
    "one too few for an eager one": (10, 0, 10, 0, False),
}


@pytest.mark.parametrize(("free", "reserved", "peak", "pool", "has_room"), ROOM.values(), ids=ROOM)
def test_room_for_a_capture(
    free: int, reserved: int, peak: int, pool: int, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: (10 + reserved) * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak * gib)
    graphed = GraphedBlocks(make_model())
    graphed._pool_bytes = pool * gib
    assert graphed.has_room(4 * gib) == has_room
    # Of two, the second takes 1.2 GiB more, as it can use most of the first one's pool.
    assert graphed.has_room(4 * gib, 4 * gib) == (free == 28)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 0)
    assert not graphed.has_room(0)


def test_out_of_memory_in_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch runs eagerly, and no other capture is tried."""
    model = make_model()
    batch = one_batch()
    expected = step(model, batch)
    model.graphed = graphed = GraphedBlocks(model)
    step(model, batch)
    (entry,) = graphed.entries.values()
    tried = []

    def run_out(function: Callable[[], None]) -> Callable[[], None]:
        tried.append(function)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(graphed, "_capture", run_out)
    entry.kept_bytes = 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    for _ in range(2):
        require_same(step(model, batch), expected)
        entry.kept_bytes = 1
    assert len(tried) == 1 and not entry.is_captured


def test_changed_weights_take_effect() -> None:
    model = make_model()
    model.graphed = GraphedBlocks(model)
    batch = one_batch()
    before = step(model, batch)[0]
    with torch.no_grad():
        model.adapter_query.weight.add_(1.0)
        model.get_parameter("layers.1.attention.gate2").sub_(2.0)
    changed = step(model, batch)[0]
    model.graphed = None
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.allclose(changed, step(model, batch)[0], rtol=1e-5, atol=1e-6)


def test_a_late_backward_is_an_error() -> None:
    model = make_model()
    model.graphed = GraphedBlocks(model)
    first, second = (model(one_batch(place)).sum() for place in (0, 3))
    second.backward(retain_graph=True)
    for late in (first, second):
        with pytest.raises(RuntimeError, match="VICO_GRAPHS=off"):
            late.backward()


def test_scoring_is_not_graphed() -> None:
    model = make_model()
    training, scoring = one_batch(), scoring_batches(WORK.scoring(0, 1))[0]
    expected, scores = step(model, training), model(scoring).detach()
    model.graphed = graphed = GraphedBlocks(model)
    for _ in range(2):
        require_same(step(model, training), expected)
        with torch.no_grad():
            assert torch.equal(model(scoring), scores)
    assert len(graphed.entries) == 1


def test_long_streams_are_not_graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_ROWS", 64)
    model = make_model()
    model.graphed = graphed = GraphedBlocks(model)
    step(model, one_batch())
    assert not graphed.entries


def test_reasons_against_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU there are none; the other reasons as on a GPU, the first that holds."""
    varlen, sdpa = PackedAttention(KERNELS["varlen"]), PackedAttention(KERNELS["sdpa"])
    plain = choose_attention("plain", CPU, torch.float32)[0]
    model = make_model()
    choose = partial(choose_block_runners, model)
    assert choose(varlen) == "no CUDA graphs (a CPU)" and model.graphed is None
    monkeypatch.setattr(block_runners, "_is_gpu", lambda device: True)
    assert choose(varlen, no_graphs="ZeRO-3 gathers") == "no CUDA graphs (ZeRO-3 gathers)"
    for attend in (plain, sdpa):
        assert choose(attend) == "no CUDA graphs (only with --attention varlen or segment)"
    assert choose(varlen, num_checkpointed=1) == "no CUDA graphs (layers are recomputed)"
    assert choose(varlen) == "training on up to 4,096 rows by CUDA graphs"
    assert model.graphed is not None
    monkeypatch.setattr(block_runners, "GRAPHS_ENABLED", False)
    assert choose(varlen) == "no CUDA graphs (VICO_GRAPHS=off)" and model.graphed is None
    monkeypatch.setattr(block_runners, "GRAPHS_ENABLED", True)
    one_adapted = make_model(1)
    reason = choose_block_runners(one_adapted, varlen)
    assert reason == "no CUDA graphs (one adapted layer)"


def test_reasons_against_graphs_in_a_ds_config() -> None:
    for stage in (2, 3):
        zero = {"zero_optimization": {"stage": stage}}
        assert "flops" in str(why_no_graphs({"flops_profiler": {"enabled": True}, **zero}))
    assert why_no_graphs({"zero_optimization": {"stage": 2}}) is None
    assert why_no_graphs({"zero_optimization": {"stage": 3}})


def test_runners_of_the_blocks() -> None:
    """One Function for adapted blocks but the last.

    Only under packed attention without grouped heads.
    """
    packed = PackedAttention(KERNELS["sdpa"])
    plain = choose_attention("plain", CPU, torch.float32)[0]
    cases = (
        (CONFIG, packed, ["run_modules", "run_fused", "run_fused", "run_modules"]),
        (CONFIG, plain, ["run_modules"] * 4),
        (GROUPED, packed, ["run_modules"] * 4),
    )
    for config, attend, expected in cases:
        model = make_model(3, config=config)
        choose_block_runners(model, attend)
        assert [block.run.__name__ for block in model.blocks] == expected
