"""Streams filled up to sizes in common, and the blocks as one program over tensors of their own: all that needs no GPU to be seen.

Without one nothing is recorded: a program runs at every use, over the same tensors, as it does at its first on a GPU.
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

from benchmarks.baseline.variants import (
    fill,
    random_weights,
    scoring_batches,
    take_gradients,
    training_batch,
)
from benchmarks.measure.workload import SyntheticWorkload
from vico.model import cuda_graphs
from vico.model.attention.segment_layout import segment_layout
from vico.model.attention.varlen import KERNELS, PackedAttention, choose
from vico.model.batch import PackedBatch, Segment
from vico.model.config import LlamaConfig
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.vico import ViCo
from vico.train.build import replay_refused

SHAPE = LlamaConfig(64, 4, 4, 300, multiple_of=16)
GROUPED = replace(SHAPE, n_kv_heads=2)
WORK = SyntheticWorkload(300)
CPU = torch.device("cpu")


@st.composite
def trees(draw: st.DrawFn) -> tuple[Segment, ...]:
    segments: list[Segment] = []
    for i in range(draw(st.integers(1, 12))):
        start = segments[-1].stop if segments else 0
        parent = draw(st.none() | st.integers(0, i - 1)) if i else None
        segments.append(
            Segment(
                start,
                start + draw(st.integers(1, 90)),
                parent,
                draw(st.booleans()),
                draw(st.booleans()),
            )
        )
    return tuple(segments)


def pieces(numbers: np.ndarray, sizes: cuda_graphs.LayoutSizes) -> list[np.ndarray]:
    rows, starts = sizes.rows, sizes.segments + 1
    return np.split(numbers, np.cumsum([sizes.keys, rows, rows, rows, sizes.shared, starts]))


@given(trees())
def test_what_fills_a_stream_up_sees_itself_alone(segments: tuple[Segment, ...]) -> None:
    found = segment_layout(segments)
    own, sizes = found.sizes, found.rounded
    assert (
        all(more >= fewer for more, fewer in zip(sizes, own, strict=True)) and sizes.rows > own.rows
    )
    assert sizes.rows % 128 == 0 and sizes.max_seqlen_q % 64 == 0 and sizes.max_seqlen_k % 64 == 0
    before, after = pieces(found.numbers(own), own), pieces(found.numbers(sizes), sizes)
    assert sum(map(len, after)) == sizes.numbers and all(piece.dtype == np.int64 for piece in after)
    for piece, (short, long) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(long[: len(short)], short), piece  # the stream itself is what it was
    key_rows, own_keys, after_video, is_video, shared, cu_seqlens_q, cu_seqlens_k = after
    assert (key_rows[own.keys :] >= own.rows).all()
    assert not after_video[own.rows :].any() and not is_video[own.rows :].any()
    assert np.array_equal(key_rows[own_keys], np.arange(sizes.rows))
    assert (shared[own.shared :] == own.rows).all()
    for starts, total in ((cu_seqlens_q, sizes.rows), (cu_seqlens_k, sizes.keys)):
        assert (np.diff(starts) >= 0).all() and starts[0] == 0 and starts[-1] == total
    assert (
        np.diff(cu_seqlens_q).max() <= sizes.max_seqlen_q
        and np.diff(cu_seqlens_k).max() <= sizes.max_seqlen_k
    )
    assert (np.diff(cu_seqlens_q) <= np.diff(cu_seqlens_k)).all()  # each row sees itself


def test_few_sizes_serve_many_micro_batches() -> None:
    sizes = {
        segment_layout(training_batch(WORK.training(place, 8)).segments).rounded
        for place in range(40)
    }
    assert len(sizes) <= 12, sizes


def model(num_adapted: int = 4, kernel: str = "sdpa", shape: LlamaConfig = SHAPE) -> ViCo:
    made = ViCo(shape, num_adapted, 10, 10, 100.0, torch.float32)
    fill(made, random_weights(made))
    made.attend = PackedAttention(KERNELS[kernel])
    return made


def step(made: ViCo, batch: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    losses = made(batch)
    losses.sum().backward()
    return losses.detach(), take_gradients(made)


def require_same(
    found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Of losses and of every trainable's gradient, up to rounding."""
    assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert all(
        torch.allclose(found[1][name], gradient, rtol=1e-4, atol=1e-5)
        for name, gradient in expected[1].items()
    )


@pytest.mark.parametrize(
    ("num_adapted", "shape"), [(4, SHAPE), (2, SHAPE), (3, GROUPED)], ids=["all", "some", "grouped"]
)
def test_a_program_computes_what_the_blocks_do(num_adapted: int, shape: LlamaConfig) -> None:
    """Losses and every trainable's gradient, of streams of one size after each other and of several sizes."""
    made = model(num_adapted, shape=shape)
    batches = [training_batch(WORK.training(place, 1 + place % 3)) for place in (0, 3, 1, 6, 2)]
    expected = [step(made, batch) for batch in batches]
    made.graphed = GraphedBlocks(made)
    for batch, (losses, gradients) in zip(batches, expected, strict=True):
        its_losses, its = step(made, batch)
        assert torch.allclose(its_losses, losses, rtol=1e-5, atol=1e-6)
        assert set(its) == set(gradients)
        for name, gradient in gradients.items():
            assert (
                gradient.any() and float((its[name] - gradient).norm() / gradient.norm()) <= 1e-5
            ), name
    assert 1 < len(made.graphed.programs) < len(batches)


@pytest.mark.parametrize(
    ("num_adapted", "shape"), [(4, SHAPE), (3, SHAPE), (4, GROUPED), (3, GROUPED)]
)
def test_gradients_come_in_the_same_order(num_adapted: int, shape: LlamaConfig) -> None:
    """In which DeepSpeed puts them into the buffer that ranks sum: some may replay where others do not."""
    made = model(num_adapted, shape=shape)
    orders: list[list[str]] = []
    for name, parameter in made.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name: orders[-1].append(name)
            )
    for how in (None, GraphedBlocks(made)):
        made.graphed = how
        orders.append([])
        step(made, training_batch(WORK.training(0, 1)))
    assert len(orders[0]) == 3 + 2 * num_adapted and orders[0] == orders[1]


def test_what_fills_a_stream_up_is_as_finite_as_the_stream() -> None:
    """Rows of zeros would have values that no real row has; what is not finite there spoils sums over rows."""
    made = model()
    made.graphed = GraphedBlocks(made)
    seen: list[Tensor] = []
    made.layers[0].register_forward_hook(
        lambda _module, inputs, _out: seen.append(inputs[0].detach().clone())
    )
    batch = training_batch(WORK.training(0, 1))
    made(batch)
    (x_TD,) = seen
    assert (
        len(x_TD) > batch.num_rows and (x_TD[batch.num_rows :] == x_TD[0]).all() and x_TD[0].any()
    )


class Again(GraphedBlocks):
    """Records without a GPU: a record is the program itself, which then keeps its results where it wrote them, as a GPU does."""

    records = 0

    def may_record(self, kept: int) -> bool:
        return True

    def record(self, *runs: Callable[[], None]) -> list[Callable[[], None]]:
        self.records += 1
        return [*runs]


def test_what_is_recorded_is_replayed() -> None:
    made = model()
    batches = [training_batch(WORK.training(place, 1)) for place in (0, 3, 7)]
    steps = [step(made, batch) for batch in batches]
    made.graphed = again = Again(made)
    for _ in range(3):
        for batch, expected in zip(batches, steps, strict=True):
            require_same(step(made, batch), expected)
            for program in again.programs.values():
                program._kept = 1  # as a GPU's allocator says after the first
    assert again.records == len(again.programs) and all(
        program.is_recorded for program in again.programs.values()
    )
    for batch in batches:
        made(batch).sum().backward()
    for name, gradient in take_gradients(made).items():
        assert torch.allclose(
            gradient, sum(gradients[name] for _, gradients in steps), rtol=1e-4, atol=1e-5
        ), name


@pytest.mark.parametrize(
    ("free", "reserved", "peak", "pooled", "may"),
    [
        (
            28,
            0,
            20,
            0,
            True,
        ),  # GiB; 10 are allocated and a forward keeps 4: 5 for the record, 11 for the largest step, 16 in all
        (15, 0, 20, 0, False),
        (6, 10, 20, 0, True),  # what the allocator holds and nobody has
        (6, 10, 20, 4, False),  # which is the other records'
        (13, 4, 20, 4, True),  # of whose memory this one can use most
        (40, 0, 60, 0, False),  # a larger step has been
        (11, 0, 10, 0, True),  # a smaller one: as this one runs by itself, half as much again
        (10, 0, 10, 0, False),
    ],
)
def test_room_for_a_record(
    free: int, reserved: int, peak: int, pooled: int, may: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 10 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: (10 + reserved) * gib)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak * gib)
    one = GraphedBlocks(model())
    one._pooled = pooled * gib
    assert one.may_record(4 * gib) == may
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 0)
    assert not one.may_record(0)


def test_memory_that_ends_in_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """The micro-batch runs as it is, and no other record is tried."""
    made = model()
    batch = training_batch(WORK.training(0, 1))
    expected = step(made, batch)
    made.graphed = found = GraphedBlocks(made)
    step(made, batch)
    (program,) = found.programs.values()
    tried = []

    def ended(run: Callable[[], None]) -> Callable[[], None]:
        tried.append(run)
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(found, "_record", ended)
    program._kept = 1
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    for _ in range(2):
        require_same(step(made, batch), expected)
        program._kept = 1
    assert len(tried) == 1 and not program.is_recorded


def test_weights_that_change_are_seen() -> None:
    made = model()
    made.graphed = GraphedBlocks(made)
    batch = training_batch(WORK.training(0, 1))
    before = step(made, batch)[0]
    with torch.no_grad():
        made.adapter_query.weight.add_(1.0)
        made.get_parameter("layers.1.attention.gate2").sub_(2.0)
    changed = step(made, batch)[0]
    made.graphed = None
    assert not torch.allclose(changed, before, atol=1e-4)
    assert torch.allclose(changed, step(made, batch)[0], rtol=1e-5, atol=1e-6)


def test_a_backward_that_comes_too_late_says_so() -> None:
    made = model()
    made.graphed = GraphedBlocks(made)
    first, second = (made(training_batch(WORK.training(place, 1))).sum() for place in (0, 3))
    second.backward(retain_graph=True)
    for late in (first, second):
        with pytest.raises(RuntimeError, match="VICO_GRAPHS=off"):
            late.backward()


def test_scoring_between_steps_has_no_program() -> None:
    made = model()
    training, scoring = training_batch(WORK.training(0, 1)), scoring_batches(WORK.scoring(0, 1))[0]
    expected, scores = step(made, training), made(scoring).detach()
    made.graphed = GraphedBlocks(made)
    for _ in range(2):
        require_same(step(made, training), expected)
        with torch.no_grad():
            assert torch.equal(made(scoring), scores)
    assert len(made.graphed.programs) == 1


def test_long_streams_run_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_ROWS", 64)
    made = model()
    made.graphed = GraphedBlocks(made)
    step(made, training_batch(WORK.training(0, 1)))
    assert not made.graphed.programs


def test_who_replays_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nobody; the other reasons as a GPU would hear them, the first that holds."""
    made = model(kernel="varlen")
    assert cuda_graphs.attach(made) == "no CUDA graphs (a CPU)" and made.graphed is None
    monkeypatch.setattr(cuda_graphs, "_is_gpu", lambda device: True)
    attach = partial(cuda_graphs.attach, made)
    assert attach("ZeRO-3 gathers") == "no CUDA graphs (ZeRO-3 gathers)"
    for made.attend in (choose("plain", CPU, torch.float32)[0], PackedAttention(KERNELS["sdpa"])):
        assert attach() == "no CUDA graphs (only with --attention varlen)"
    made.attend = PackedAttention(KERNELS["varlen"])
    made.num_checkpointed = 1
    assert attach() == "no CUDA graphs (layers are recomputed)"
    made.num_checkpointed = 0
    assert attach() == "training on up to 4,096 rows by CUDA graphs" and made.graphed is not None
    monkeypatch.setattr(cuda_graphs, "USED", False)
    assert attach() == "no CUDA graphs (VICO_GRAPHS=off)" and made.graphed is None
    monkeypatch.setattr(cuda_graphs, "USED", True)
    assert all(
        "flops"
        in str(
            replay_refused({"flops_profiler": {"enabled": True}, "zero_optimization": {"stage": n}})
        )
        for n in (2, 3)
    )
    assert replay_refused({"zero_optimization": {"stage": 2}}) is None and replay_refused(
        {"zero_optimization": {"stage": 3}}
    )
    one = model(1, "varlen")
    assert cuda_graphs.attach(one) == "no CUDA graphs (one adapted layer)"
