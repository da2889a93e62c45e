"""The products' frozen weights in 8 or 4 bits, by bitsandbytes: for cards that do not hold the backbone in half precision.

A weight is unpacked for the moment of a product, in forward and again in backward; embeddings, norms and the output head keep
their type, and all arithmetic is as it was. Below ZeRO-3 only: DeepSpeed divides parameters among the ranks, and these are none.
"""

import importlib
import logging
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function

from vico.errors import UserError
from vico.model.ops.autograd import linear

Kind = Literal["8bit", "nf4"]
BLOCK_SIZES: dict[Kind, int] = {
    "8bit": 256,
    "nf4": 64,
}  # numbers that share a scale; footprint.py counts the scales


def library() -> Any:
    """bitsandbytes' functions. Raises UserError where it is not installed, or does not run."""
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # on a CPU it misses a faster kernel of another package
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as problem:
        why = (
            "is not installed"
            if getattr(problem, "name", "") == "bitsandbytes"
            else f"cannot be loaded ({problem})"
        )
        raise UserError(
            f"--quantize: bitsandbytes {why}; run pip install -c launch/constraints.txt -e '.[quantized]'"
        ) from None


class QuantizedLinear(nn.Module):
    """In the place of llama.FrozenLinear."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype, kind: Kind) -> None:
        super().__init__()
        self.shape, self.dtype, self.kind = (num_out, num_in), dtype, kind
        self._packed: tuple[Tensor, Any] | None = None  # the numbers and their scales

    def fill(self, weight: Tensor) -> None:
        """Pack `weight`, on the device where it is to stay."""
        assert tuple(weight.shape) == self.shape and weight.dtype == self.dtype
        functions, size = library(), BLOCK_SIZES[self.kind]
        if self.kind == "nf4":  # the scales are packed as well
            self._packed = functions.quantize_4bit(
                weight.contiguous(), blocksize=size, compress_statistics=True, quant_type="nf4"
            )
        else:
            self._packed = functions.quantize_blockwise(weight.contiguous(), blocksize=size)

    @property
    def weight(self) -> Tensor:
        """Unpacked, anew at every look."""
        assert self._packed is not None, "filled before it is used"
        numbers, scales = self._packed
        return (
            library().dequantize_4bit(numbers, scales)
            if self.kind == "nf4"
            else library().dequantize_blockwise(numbers, scales)
        )

    @property
    def num_bytes(self) -> int:
        assert self._packed is not None
        numbers, scales = self._packed
        return (
            numbers.nbytes
            + scales.absmax.nbytes
            + (scales.state2.absmax.nbytes if self.kind == "nf4" else 0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return QuantizedProduct.apply(x, self)


class QuantizedProduct(Function):
    """x W^T; keeps the packed weight, which is there anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: QuantizedLinear) -> Tensor:
        ctx.module = module
        return linear(x, module.weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        return linear(gradients[0], ctx.module.weight.t()) if ctx.needs_input_grad[
            0
        ] else None, None
