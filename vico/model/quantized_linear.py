"""Frozen weights of linear layers in 8 or 4 bits, by bitsandbytes, for small GPUs.

A weight is dequantized for a matrix product, in forward and again in backward. Embeddings, norms
and the output head keep their type, and all arithmetic is as without quantization. Not under
ZeRO-3: DeepSpeed divides parameters among the ranks, and these weights are no parameters.
"""

import importlib
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from vico.errors import UserError
from vico.model.config import QUANTIZATION_BLOCK_SIZES
from vico.model.ops.autograd import linear

Kind = Literal["8bit", "nf4"]


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

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedLinearFunction.apply(x, self)


class QuantizedLinearFunction(Function):
    """x W^T; saves nothing: the quantized weight is kept by its module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return linear(x, module.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None
        return linear(gradients[0], ctx.module.weight.t()), None
