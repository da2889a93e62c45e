"""Frozen weights of linear layers in other types; embeddings, norms and output head keep theirs.

- `8bit` and `nf4`, by bitsandbytes, for small GPUs: a weight is dequantized for a matrix product,
  in forward and again in backward, and all arithmetic is as without quantization.
- `fp8`, by torch, for GPUs that multiply in it: the inputs of the products are quantized as well,
  and so are their gradients. Its weights are parameters, which ZeRO-3 divides among the ranks.

`8bit` and `nf4` not under ZeRO-3: bitsandbytes' weights are no parameters.
"""

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from vico.errors import UserError
from vico.model.config import FP8, QUANTIZATION_BLOCK_SIZES, LlamaConfig, block_shapes
from vico.model.interfaces import MakeLinear
from vico.model.ops import fp8
from vico.model.ops.autograd import FrozenLinearFunction, linear
from vico.model.ops.fp8 import Weight8, dequantized

Kind = Literal["8bit", "nf4"]


def quantized_linear(kind: Kind | Literal["fp8"]) -> MakeLinear:
    """What makes the layers of --quantize `kind`."""
    return Fp8Linear if kind == FP8 else partial(QuantizedLinear, kind=kind)


def require_available(kind: str, dtype: torch.dtype) -> None:
    """Raises UserError where --quantize `kind` cannot run here with products of this type."""
    if kind != FP8:
        library()
    elif reason := fp8.why_not(_device(), dtype):
        raise UserError(
            f"--quantize fp8: {reason}; leave it out, or use another --precision, GPU or torch"
        )


def require_shapes(kind: str, config: LlamaConfig) -> None:
    """Raises UserError where a layer's product cannot be computed here."""
    if kind != FP8 or _device().type != "cuda":
        return  # a CPU takes any size
    for name, shape in block_shapes(config).items():
        if len(shape) == 2 and any(size % fp8.GPU_MULTIPLE for size in shape):
            raise UserError(
                f"--quantize fp8: the model's {name} has shape {list(shape)}, and a GPU's fp8 "
                f"products take multiples of {fp8.GPU_MULTIPLE}; leave it out for this model"
            )


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def library() -> Any:
    """bitsandbytes' functions. Raises UserError where it is not installed, or cannot be loaded."""
    # On a CPU it warns of a faster kernel in another package.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as problem:
        is_missing = getattr(problem, "name", "") == "bitsandbytes"
        why = "is not installed" if is_missing else f"cannot be loaded ({problem})"
        raise UserError(
            f"--quantize: bitsandbytes {why}; run pip install -c launch/constraints.txt "
            "-e '.[quantized]'"
        ) from None


class QuantizedLinear(nn.Module):
    """x W^T with a quantized weight; in the place of llama.FrozenLinear."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype, kind: Kind) -> None:
        super().__init__()
        self.shape, self.dtype, self.kind = (num_out, num_in), dtype, kind
        self._quantized: tuple[Tensor, Any] | None = None  # the numbers and their scales

    def fill(self, weight: Tensor) -> None:
        """Quantize `weight`, on its device, where the result stays."""
        assert tuple(weight.shape) == self.shape and weight.dtype == self.dtype
        weight, block_size = weight.contiguous(), QUANTIZATION_BLOCK_SIZES[self.kind]
        if self.kind == "nf4":
            # compress_statistics: the scales are quantized too.
            self._quantized = library().quantize_4bit(
                weight, blocksize=block_size, compress_statistics=True, quant_type="nf4"
            )
        else:
            self._quantized = library().quantize_blockwise(weight, blocksize=block_size)

    @property
    def weight(self) -> Tensor:
        """Dequantized, again at every access."""
        assert self._quantized is not None, "filled before it is used"
        numbers, scales = self._quantized
        if self.kind == "nf4":
            return library().dequantize_4bit(numbers, scales)
        return library().dequantize_blockwise(numbers, scales)

    @property
    def num_bytes(self) -> int:
        assert self._quantized is not None
        numbers, scales = self._quantized
        scale_bytes = scales.absmax.nbytes
        if self.kind == "nf4":
            scale_bytes += scales.state2.absmax.nbytes
        return numbers.nbytes + scale_bytes

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        """x is never quantized."""
        return QuantizedLinearFunction.apply(x, lambda: self.weight)


class Fp8Linear(nn.Module):
    """x W^T with a weight in fp8, and x too (ops/fp8.py); in the place of llama.FrozenLinear."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = (num_out, num_in), dtype
        codes_NK = torch.empty(num_out, num_in, dtype=torch.uint8)
        self.codes = nn.Parameter(codes_NK, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(num_out, 1), requires_grad=False)
        self._ones_K1 = torch.ones(num_in, 1)
        self._codes_KN: Tensor | None = None

    def fill(self, weight: Tensor) -> None:
        """Quantize `weight`, on its device, where the result stays; its transpose is kept too."""
        assert tuple(weight.shape) == self.shape and weight.dtype == self.dtype
        filled = fp8.quantize_weight(weight)
        self.codes.data, self.scale.data = filled.codes_NK, filled.scale_N1
        self._codes_KN = filled.codes_KN

    @property
    def weight(self) -> Weight8:
        return Weight8(self.codes, self.scale, self._ones_K1, self._codes_KN, self.dtype)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weight if isinstance(tensor, Tensor))

    def forward(self, x: Tensor, exact: bool = False) -> Tensor:
        """`exact`: by the dequantized weight, and x as it is."""
        if exact:
            return QuantizedLinearFunction.apply(x, lambda: dequantized(self.weight))
        return FrozenLinearFunction.apply(x, self.weight)


class QuantizedLinearFunction(Function):
    """x W^T; saves nothing but how to make W: its module keeps the quantized weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, make_weight: Callable[[], Tensor]) -> Tensor:
        ctx.make_weight = make_weight
        return linear(x, make_weight())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return linear(gradients[0], ctx.make_weight().t()), None
