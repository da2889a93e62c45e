"""A micro-batch as a GPU computes it, on any machine: by tensors of torch's meta device, which have shapes and types but no numbers.

What mixes devices is an error there, and so is what needs a number on the host, for which a GPU would be waited for. Starts of
Triton's programs, which want numbers, are only counted. tests/gpu/test_gpu.py asks a real one.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baseline.variants import scoring_batches, training_batch
from benchmarks.measure.workload import SyntheticWorkload
from vico.model.attention.backends import KERNELS
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.ops import triton_ops
from vico.model.vico import ViCo
from vico.train.step import sums_by_task

GPU = torch.device("meta")
WORK = SyntheticWorkload(2000)
# Of a block, forward and backward, with Triton's programs; at the published micro-batch a slow host's time for these is a step's.
MOST_STARTS = (19, 45)


class Starts(TorchDispatchMode):
    """What a GPU would be given to do: operations that make or change numbers, and Triton's programs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(
            a.alias_info is not None and not a.alias_info.is_write for a in func._schema.arguments
        )
        if not views and "empty" not in str(func):
            self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


class Programs:
    """In the place of triton_programs: `programs.NAME[grid](...)` is counted."""

    def __init__(self, seen: Counter[str]) -> None:
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        def start(grid: tuple[int, ...]) -> Any:
            assert all(isinstance(size, int) and size > 0 for size in grid)
            self._seen[name] += 1
            return lambda *args, **kwargs: None

        return type("Program", (), {"__getitem__": lambda _, grid: start(grid)})()


@pytest.fixture(params=["triton", "plain"])
def starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Starts:
    """With Triton's programs, or the operations that VICO_KERNELS=plain leaves in their place."""
    found = Starts()
    triton = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), next_power_of_2=lambda n: 1 << (n - 1).bit_length()
    )
    monkeypatch.setattr(
        triton_ops, "can_run", lambda x: request.param == "triton" and x.stride(-1) == 1
    )
    monkeypatch.setattr(triton_ops, "triton", triton, raising=False)
    monkeypatch.setattr(triton_ops, "kernels", Programs(found.seen), raising=False)
    return found


def made(layers: int = 4, checkpointed: int = 0) -> ViCo:
    with GPU:
        model = ViCo(
            LlamaConfig(256, layers, 4, 2000, multiple_of=64), layers, 10, 10, 100.0, torch.bfloat16
        )
    choose_block_runners(model, PackedAttention(KERNELS["varlen"]), checkpointed)
    return model


def step(model: ViCo, batch: PackedBatch) -> None:
    batch = batch.to(GPU)
    (sums_by_task(model(batch), batch, 2).float() * torch.ones(2, device=GPU)).sum().backward()


@pytest.mark.parametrize("checkpointed", [0, 2, 4])
def test_training_mixes_no_devices_and_waits_for_none(starts: Starts, checkpointed: int) -> None:
    model = made(checkpointed=checkpointed)
    for place, questions in enumerate((1, 2, 8)):
        step(model, training_batch(WORK.training(place, questions)))
        assert all(
            p.grad is not None and p.grad.device == GPU
            for p in model.parameters()
            if p.requires_grad
        )


def test_a_program_mixes_no_devices_and_waits_for_none(starts: Starts) -> None:
    """What is recorded on a GPU, where waiting would be an error, and what is done around it."""
    model = made()
    model.graphed = GraphedBlocks(model)
    for place, questions in enumerate((1, 2, 8, 1)):
        step(model, training_batch(WORK.training(place, questions)))
        assert all(
            p.grad is not None and p.grad.device == GPU
            for p in model.parameters()
            if p.requires_grad
        )
    assert model.graphed.entries


@torch.no_grad()
def test_scoring_mixes_no_devices_and_waits_for_none(starts: Starts) -> None:
    model = made()
    for batch in scoring_batches(WORK.scoring(0, 3)):
        assert model(batch.to(GPU)).device == GPU


@pytest.mark.parametrize(
    "spoil",
    [
        lambda h: h * float(h.sum()),  # waits
        lambda h: h[h.sum(dim=1) > 0],  # waits: how many?
        lambda h: h + torch.ones(h.shape, dtype=h.dtype),  # on the host
        lambda h: h.cpu().to(h.device),
    ],
)
def test_what_waits_or_mixes_is_found(starts: Starts, spoil: Any) -> None:
    model = made()
    model.layers[1].register_forward_hook(lambda _module, _inputs, out: spoil(out))
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(model, training_batch(WORK.training(0, 2)))


@pytest.mark.parametrize("starts", ["triton"], indirect=True)
def test_a_block_starts_no_more_than_it_did(starts: Starts) -> None:
    counts = []
    for layers in (3, 4):
        model, batch = made(layers), training_batch(WORK.training(0, 8)).to(GPU)
        with starts:
            starts.seen.clear()
            losses = model(batch)
            forward = starts.seen.copy()
            losses.sum().backward()
        counts.append((forward, starts.seen - forward))
    forward, backward = (more - fewer for fewer, more in zip(*counts, strict=True))
    print(
        f"forward {forward.total()}: {dict(forward)}\nbackward {backward.total()}: {dict(backward)}"
    )
    assert forward.total() <= MOST_STARTS[0] and backward.total() <= MOST_STARTS[1]
