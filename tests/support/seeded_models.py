"""Models with random weights of known size, in fp8 and without it, for test_fp8.py."""

import torch
from torch import Tensor

from vico.model.attention.backends import KERNELS
from vico.model.attention.varlen import PackedAttention
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.interfaces import MakeLinear
from vico.model.quantized_linear import Fp8Linear
from vico.model.vico import ViCo


def made(
    config: LlamaConfig,
    weights: dict[str, Tensor],
    dtype: torch.dtype,
    linear: MakeLinear,
    num_checkpointed: int | None = 0,
) -> ViCo:
    """`num_checkpointed`: layers that are recomputed; None: the modules compute every block."""
    model = ViCo(config, config.n_layers, 10, 10, 100.0, dtype, linear)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    for name, module in model.named_modules():
        if isinstance(module, Fp8Linear):
            module.fill(weights[f"{name.removesuffix('.quantized')}.weight"].to(dtype))
    if num_checkpointed is not None:
        choose_block_runners(model, PackedAttention(KERNELS["sdpa"]), num_checkpointed)
    return model


def usual_weights(config: LlamaConfig) -> dict[str, Tensor]:
    """As LLaMA is initialised before pretraining, and random gates and prompts."""
    torch.manual_seed(0)
    weights = {}
    for name, parameter in ViCo(
        config, config.n_layers, 10, 10, 100.0, torch.float32
    ).named_parameters():
        std = 0.02
        if ".wo." in name or ".w2." in name:
            std = 0.02 / (2 * config.n_layers) ** 0.5
        elif "gate" in name:
            std = 0.5
        elif "layers" not in name:
            std = 0.2
        norms = "norm" in name
        weights[name] = torch.ones(parameter.shape) if norms else std * torch.randn(parameter.shape)
    return weights


def plant_outliers(weights: dict[str, Tensor]) -> None:
    """Of the inputs of every product but wo, one in 128 is 64 times as large.

    The weights that it meets are smaller by that, so the model computes the same.
    """
    after = {"attention_norm": ("attention", "q k v"), "ffn_norm": ("feed_forward", "1 3")}
    for name in list(weights):
        layer, _, kind = name.removesuffix(".weight").rpartition(".")
        if kind in after:
            weights[name][::128] *= 64
            part, products = after[kind]
            for product in products.split():
                weights[f"{layer}.{part}.w{product}.weight"][:, ::128] /= 64
        elif kind == "w3":
            weights[name][::128] *= 64
            weights[f"{layer}.w2.weight"][:, ::128] /= 64
