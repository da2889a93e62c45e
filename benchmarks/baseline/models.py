"""The two models under test, the plain baseline and ViCo, with the same random weights."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from benchmarks.baseline.plain import PlainViCo
from benchmarks.measure.lengths import NUM_SLOTS
from vico.model.config import LLAMA_CONFIGS, LlamaConfig
from vico.model.llama import FrozenLinear
from vico.model.quantized_linear import Fp8Linear
from vico.model.vico import ViCo

# The baseline has no grouped-query attention, so it cannot compute the newer sizes.
SIZES = ("7B", "13B", "33B", "65B")
TOY = LlamaConfig(128, 2, 2, 600, multiple_of=32)
MODELS = {size: LLAMA_CONFIGS[size] for size in SIZES} | {"toy": TOY}
ADAPTER_LEN = 10
TAU = 100.0
# Gains of random weights: attention is sharp enough to matter, but does not amplify rounding.
GAINS = {"wq": 1.4, "wk": 1.4, "wo": 2.0}


def make_plain(config: LlamaConfig, dtype: torch.dtype) -> PlainViCo:
    return PlainViCo(config, ADAPTER_LEN, NUM_SLOTS, dtype)


def make_fast(config: LlamaConfig, dtype: torch.dtype) -> ViCo:
    return ViCo(config, config.n_layers, ADAPTER_LEN, NUM_SLOTS, TAU, dtype)


def make_pair(config: LlamaConfig) -> tuple[PlainViCo, ViCo]:
    """Both models with equal fp32 weights, on the CPU."""
    plain, fast = make_plain(config, torch.float32), make_fast(config, torch.float32)
    weights = random_weights(plain)
    set_weights(plain, weights)
    set_weights(fast, weights)
    return plain, fast


def make_shared_pair(
    config: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[PlainViCo, ViCo]:
    """Both models on `device` with the same parameter tensors, so that memory holds them once.

    Frozen parameters have type `dtype`.
    """
    with device:
        plain = make_plain(config, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(plain.named_parameters()):
            parameter.copy_(random_value(name, parameter.shape, generator))
    with torch.device("meta"):
        fast = make_fast(config, dtype)
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(fast.get_submodule(owner), leaf, parameter)
    return plain, fast


def with_fp8_products(model: ViCo) -> ViCo:
    """`model` with its frozen products in fp8; all other parameters are the same tensors."""
    device = model.tok_embeddings.weight.device
    with device:
        made = ViCo(
            model.config, model.num_adapted, ADAPTER_LEN, NUM_SLOTS, TAU, model.dtype, Fp8Linear
        )
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        module = made.get_submodule(owner)
        if isinstance(module, Fp8Linear):
            module.fill(parameter.detach())
        else:
            setattr(module, leaf, parameter)
    return made


def random_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A value for one parameter, fp32 on the generator's device; gates are random, far from 0."""
    normal = torch.randn(shape, generator=generator, device=generator.device)
    if "norm" in name:
        return normal.mul_(0.1).add_(1)
    if "gate" in name or name in ("adapter_query.weight", "temporal_emb.weight"):
        return normal
    if name == "tok_embeddings.weight":
        # Small beside what attention adds, so that predictions depend on the question.
        return normal.mul_(0.1)
    return normal.mul_(GAINS.get(name.split(".")[-2], 1.0) / shape[1] ** 0.5)


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Values for every parameter of `model` by name; the same seed gives the same values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_value(name, parameter.shape, generator)
        for name, parameter in sorted(model.named_parameters())
    }


def set_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The trainables' gradients by name. Clears them in the model."""
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return gradients


@contextmanager
def gates_at_zero(model: nn.Module) -> Iterator[None]:
    """The model without its prompts and the video's bias, as peers start."""
    gates = {name: p for name, p in model.named_parameters() if ".gate" in name}
    values = {name: p.detach().clone() for name, p in gates.items()}
    with torch.no_grad():
        for gate in gates.values():
            gate.zero_()
    try:
        yield
    finally:
        with torch.no_grad():
            for name, gate in gates.items():
                gate.copy_(values[name])


class _FlatFrozenLinear(FrozenLinear):
    """ViCo's frozen product for the baseline: the rows of all sequences are one matrix."""

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def with_vico_products(model: PlainViCo) -> PlainViCo:
    """A copy of the baseline, with equal parameters, that uses ViCo's frozen products.

    It shows how much of a ratio is due to the product's library and to inputs that ViCo does not
    save for the backward pass.
    """
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            owner, _, leaf = name.rpartition(".")
            product = _FlatFrozenLinear(
                module.in_features, module.out_features, module.weight.dtype
            )
            product.weight = nn.Parameter(module.weight, requires_grad=False)
            setattr(model.get_submodule(owner), leaf, product)
    return model
