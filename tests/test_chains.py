"""The elementwise chains compiled against the same chains plain, and how often they are compiled."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from benchmarks.variants import MODELS, Packed, make_fast, random_weights, take_gradients
from benchmarks.variants import fill as fill_model
from benchmarks.workload import SyntheticWorkload
from vico.errors import UserError
from vico.model import chains
from vico.model.attention_packed import choose
from vico.model.functions import FrozenRMSNorm, Rotate, SwiGLU
from vico.model.llama import rotary_angles

CPU = torch.device("cpu")
RTOL = 1e-5  # fp32: the same operations in another order


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(chains, "_compiling", True)
    yield
    torch._dynamo.reset()


def results(rows: int) -> list[Tensor]:
    """Outputs and gradients of each Function."""
    generator = torch.Generator().manual_seed(rows)
    found = []
    x, y = (torch.randn(rows, 64, generator=generator, requires_grad=True) for _ in range(2))
    weight = nn.Parameter(torch.randn(64, generator=generator), requires_grad=False)
    angles = rotary_angles(torch.arange(rows), 16, 10000.0)
    for out in (FrozenRMSNorm.apply(x, weight, 1e-5), SwiGLU.apply(x, y), Rotate.apply(x.unflatten(1, (4, 16)), angles)):
        found += [out, *(g for g in torch.autograd.grad(out.square().sum(), (x, y), allow_unused=True) if g is not None)]
    return found


@pytest.mark.slow
def test_compiled_chains_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [results(rows) for rows in (24, 40)]
    torch._dynamo.reset()
    monkeypatch.setattr(chains, "_compiling", True)
    for rows, plain in zip((24, 40), expected, strict=True):
        for mine, its in zip(results(rows), plain, strict=True):
            torch.testing.assert_close(mine, its, rtol=RTOL, atol=RTOL)
    torch._dynamo.reset()


def test_nothing_is_compiled_after_the_first_step(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has other lengths; scoring has no gradients."""
    monkeypatch.setattr(chains, "BACKEND", "eager")  # what is traced and guarded is the same, and no code is generated
    fast = make_fast(MODELS["toy"], torch.float32)
    fill_model(fast, random_weights(fast))
    fast.attend = choose("sdpa", CPU, torch.float32)[0]
    variant, work = Packed(fast, CPU), SyntheticWorkload(MODELS["toy"].vocab_size)
    graphs = []
    for place in range(5):
        variant.train(work.training(place, 2 + place))
        take_gradients(fast)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    variant.score(work.scoring(0, 1))
    assert graphs[0] >= 6  # norm, SwiGLU, rotary, forward and backward, and the widening
    assert graphs[-1] == graphs[0] == torch._dynamo.utils.counters["stats"]["unique_graphs"], graphs


@pytest.mark.parametrize(
    ("how", "device", "steps", "said"),
    [("auto", "cpu", 10**6, "a CPU"), ("off", "cuda", 10**6, "--compile off"), ("auto", "cuda", 10, "a short run")],
)
def test_when_nothing_is_compiled(how: str, device: str, steps: int, said: str) -> None:
    assert said in chains.choose(how, torch.device(device), steps)
    assert not chains.compiling()


def test_a_machine_that_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler was found\nand more")

    monkeypatch.setattr(torch, "compile", fails)
    with pytest.raises(UserError, match="no C\\+\\+ compiler was found"):
        chains.choose("on", CPU, 10**6)
