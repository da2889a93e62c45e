"""A micro-batch as a GPU computes it, on any machine, by tensors of torch's meta device.

These have shapes and types but no numbers. Mixing devices is an error there, and so is reading a
number on the host, for which the host would wait on a GPU. Launches of Triton's kernels, which want
numbers, are only counted. tests/gpu/test_gpu.py runs on a real one.
"""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.baseline.variants import scoring_batches, training_batch
from benchmarks.measure.workload import SyntheticWorkload
from vico.model.attention.backends import KERNELS
from vico.model.attention.segment import SegmentAttention
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.interfaces import MakeLinear
from vico.model.llama import FrozenLinear
from vico.model.ops import fp8, segment_ops, triton_ops
from vico.model.quantized_linear import Fp8Linear
from vico.model.vico import ViCo
from vico.train.build import _load_weights
from vico.train.step import sums_by_task

META = torch.device("meta")
WORK = SyntheticWorkload(2000)
# Launches of a block with Triton's kernels, forward and backward. A slow host needs as long for
# varlen's as a GPU for a step of the published micro-batch. A product that adds counts twice here;
# on CUDA it is one launch.
MAX_LAUNCHES = {"varlen": (19, 43), "segment": (17, 18)}
# In fp8: what no other kernel quantizes (attention's output; the gradients of the block, of its
# attention half, of q, k and v), and wk and wv, dequantized for the prompts' rows.
MORE_IN_FP8 = 5, 9


class Launches(TorchDispatchMode):
    """Counts what a GPU would have to run: operations that write numbers, and Triton's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aliases = [argument.alias_info for argument in func._schema.arguments]
        is_view = any(alias is not None and not alias.is_write for alias in aliases)
        if not is_view and "empty" not in str(func):
            self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


class CountingKernel:
    """`kernel[grid](...)` is counted."""

    def __init__(self, name: str, counts: Counter[str]) -> None:
        self._name, self._counts = name, counts

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert all(isinstance(size, int) and size > 0 for size in grid)
        self._counts[self._name] += 1
        return lambda *args, **kwargs: None


class CountingKernels:
    """In the place of the module triton_kernels."""

    def __init__(self, counts: Counter[str]) -> None:
        self._counts = counts

    def __getattr__(self, name: str) -> CountingKernel:
        return CountingKernel(name, self._counts)


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@pytest.fixture(params=["triton", "plain"])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """With Triton's kernels, or with the plain operations of VICO_KERNELS=plain."""
    launches = Launches()
    triton = SimpleNamespace(cdiv=lambda a, b: -(-a // b), next_power_of_2=next_power_of_2)

    def can_run(x: Tensor) -> bool:
        return request.param == "triton" and x.stride(-1) == 1

    monkeypatch.setattr(triton_ops, "can_run", can_run)
    monkeypatch.setattr(triton_ops, "triton", triton, raising=False)
    for module in (triton_ops, fp8):
        kernels = CountingKernels(launches.counts)
        monkeypatch.setattr(module, "kernels", kernels, raising=False)
    for name in ("segment_kernels", "segment_backward_kernels"):
        counting = CountingKernels(launches.counts)
        monkeypatch.setattr(segment_ops, name, counting, raising=False)
    return launches


ATTENTIONS = {"varlen": PackedAttention(KERNELS["varlen"]), "segment": SegmentAttention()}
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def make_model(
    num_layers: int = 4,
    num_checkpointed: int = 0,
    attention: str = "varlen",
    linear: MakeLinear = FrozenLinear,
) -> ViCo:
    config = LlamaConfig(256, num_layers, 4, 2000, multiple_of=64)
    with META:
        model = ViCo(config, num_layers, 10, 10, 100.0, torch.bfloat16, linear)
        for module in model.modules():
            if isinstance(module, Fp8Linear):
                module.fill(torch.empty(module.shape, dtype=module.dtype))
    choose_block_runners(model, ATTENTIONS[attention], num_checkpointed)
    return model


def step(model: ViCo, batch: PackedBatch) -> None:
    batch = batch.to(META)
    sums = sums_by_task(model(batch), batch, 2).float() * torch.ones(2, device=META)
    sums.sum().backward()


def require_gradients(model: ViCo) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.device == META, name


@every_attention
@pytest.mark.parametrize("num_checkpointed", [0, 2, 4])
def test_training_neither_mixes_devices_nor_waits(
    launches: Launches, num_checkpointed: int, attention: str
) -> None:
    model = make_model(num_checkpointed=num_checkpointed, attention=attention)
    for place, num_questions in enumerate((1, 2, 8)):
        step(model, training_batch(WORK.training(place, num_questions)))
        require_gradients(model)


@every_attention
@pytest.mark.parametrize("linear", [FrozenLinear, Fp8Linear])
def test_graphed_blocks_neither_mix_devices_nor_wait(
    launches: Launches, attention: str, linear: MakeLinear
) -> None:
    """What is captured on a GPU, where waiting would be an error, and what runs around it."""
    model = make_model(attention=attention, linear=linear)
    model.graphed = graphed = GraphedBlocks(model)
    for place, num_questions in enumerate((1, 2, 8, 1)):
        step(model, training_batch(WORK.training(place, num_questions)))
        require_gradients(model)
    assert graphed.entries


@every_attention
@torch.no_grad()
def test_scoring_neither_mixes_devices_nor_waits(launches: Launches, attention: str) -> None:
    model = make_model(attention=attention)
    for batch in scoring_batches(WORK.scoring(0, 3)):
        assert model(batch.to(META)).device == META


FAULTS = {
    "waits for a number": lambda h: h * float(h.sum()),
    "waits for a size": lambda h: h[h.sum(dim=1) > 0],
    "adds a tensor of the host": lambda h: h + torch.ones(h.shape, dtype=h.dtype),
    "copies to the host": lambda h: h.cpu().to(h.device),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_faults_are_found(launches: Launches, fault: Any) -> None:
    model = make_model()
    model.layers[1].register_forward_hook(lambda _module, _inputs, out: fault(out))
    with pytest.raises((RuntimeError, NotImplementedError)):
        step(model, training_batch(WORK.training(0, 2)))


def of_one_block(
    launches: Launches, attention: str, linear: MakeLinear = FrozenLinear
) -> tuple[Counter[str], Counter[str]]:
    """(forward, backward): the difference between four layers and three."""
    counts = []
    for num_layers in (3, 4):
        model = make_model(num_layers, attention=attention, linear=linear)
        batch = training_batch(WORK.training(0, 8)).to(META)
        with launches:
            launches.counts.clear()
            losses = model(batch)
            forward = launches.counts.copy()
            losses.sum().backward()
        counts.append((forward, launches.counts - forward))
    (forward_3, backward_3), (forward_4, backward_4) = counts
    return forward_4 - forward_3, backward_4 - backward_3


@every_attention
@pytest.mark.parametrize(("linear", "more"), [(FrozenLinear, (0, 0)), (Fp8Linear, MORE_IN_FP8)])
@pytest.mark.parametrize("launches", ["triton"], indirect=True)
def test_launches_of_a_block(
    launches: Launches, attention: str, linear: MakeLinear, more: tuple[int, int]
) -> None:
    forward, backward = of_one_block(launches, attention, linear)
    print(f"forward {forward.total()}: {dict(forward)}")
    print(f"backward {backward.total()}: {dict(backward)}")
    max_forward, max_backward = MAX_LAUNCHES[attention]
    assert forward.total() <= max_forward + more[0]
    assert backward.total() <= max_backward + more[1]


class HostConversions(TorchDispatchMode):
    """Operations that change the type of a tensor of the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        source = args[1] if "copy_" in str(func) and "_copy" not in str(func) else args[0]
        is_of_host = isinstance(source, Tensor) and source.device.type == "cpu"
        if is_of_host and isinstance(out, Tensor) and out.dtype != source.dtype:
            self.found.append(str(func))
        return out


def test_weights_are_converted_on_the_device() -> None:
    """They cross to a GPU in the type of their file, also those that are quantized there."""
    model = nn.ModuleDict({"a": nn.Linear(32, 16, bias=False, dtype=torch.bfloat16, device=META)})
    with META:
        quantized = Fp8Linear(32, 16, torch.bfloat16)
    model["b"] = quantized
    weights: Any = SimpleNamespace(
        read_slice=lambda name, start, stop: torch.ones(stop - start, dtype=torch.float16),
        read=lambda name: torch.ones(16, 32, dtype=torch.float16),
    )
    world: Any = SimpleNamespace(device=META, set_phase=lambda phase: None)
    model_of_any: Any = model
    with HostConversions() as conversions:
        _load_weights(model_of_any, weights, {}, torch.bfloat16, world)
    assert conversions.found == [] and quantized.weight.by_output.numbers_TK.device == META
    with HostConversions() as conversions:
        model["a"].weight.data.copy_(torch.ones(16, 32, dtype=torch.float16))
    assert len(conversions.found) == 1, "what would go wrong is seen"
