"""Products of a frozen weight in 8-bit floating point: e4m3, with one fp32 scale per row.

Both sides of x W^T are quantized along the dimension that the product sums over: x by row (token),
W by output. The gradient's product g W sums over the other dimension, and wants W^T by row, so a
weight is kept twice, in as many bytes as in bf16. Sums are fp32, results have the type of x.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vico.model.ops import triton_ops

if triton_ops.IMPORTED:
    from vico.model.ops import fp8_kernels as kernels

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0  # of e4m3
# In the place of a row's largest magnitude where that is smaller: its scale stays a normal number.
MIN_MAGNITUDE = 1e-30
GPU_MULTIPLE = 16  # of both sizes of a weight, in a GPU's product


class Rows8(NamedTuple):
    """A quantized tensor [T, K]: the numbers times their row's scale."""

    numbers_TK: Tensor  # e4m3
    scale_T1: Tensor  # fp32
    dtype: torch.dtype  # of the tensor that was quantized, and of its products


@dataclass(frozen=True)
class Weight8:
    """A quantized weight [N, K], as linear layers use one; `t()` is for the gradient."""

    by_output: Rows8  # [N, K]
    by_input: Rows8  # [K, N]
    # In 14 bits on Hopper, between the sums in fp32: for forward, as is usual.
    is_accumulated_fast: bool = True

    def t(self) -> "Weight8":
        return Weight8(self.by_input, self.by_output, not self.is_accumulated_fast)

    @property
    def num_bytes(self) -> int:
        tensors = (*self.by_output[:2], *self.by_input[:2])
        return sum(tensor.nbytes for tensor in tensors)


def quantize_weight(weight_NK: Tensor) -> Weight8:
    return Weight8(quantize_rows(weight_NK), quantize_rows(weight_NK.t().contiguous()))


def quantize_rows(x_TK: Tensor) -> Rows8:
    """Each row over its scale, which makes its largest magnitude 448, rounded to e4m3.

    A row that is not finite has a product that is not finite.
    """
    if can_run_kernels(x_TK):
        rows = _empty_rows(x_TK)
        kernels.quantize_kernel[(len(x_TK),)](x_TK.contiguous(), *_codes(rows), **_sizes(x_TK))
        return rows
    magnitude_T1 = x_TK.abs().amax(dim=-1, keepdim=True).float().clamp_(min=MIN_MAGNITUDE)
    numbers_TK = (x_TK * (magnitude_T1.reciprocal() * LARGEST)).to(E4M3)  # multiplied in fp32
    return Rows8(numbers_TK, magnitude_T1.div_(LARGEST), x_TK.dtype)


def can_run_kernels(x_TK: Tensor) -> bool:
    return triton_ops.can_run(x_TK) and len(x_TK) > 0


def rms_norm(x_TD: Tensor, weight: Tensor, eps: float) -> tuple[Rows8, Tensor]:
    """triton_ops.rms_norm with a quantized result: the norm is read once, and never written."""
    rows, factor_T1 = _empty_rows(x_TD), x_TD.new_empty((len(x_TD), 1), dtype=torch.float32)
    kernels.norm_quantize_kernel[(len(x_TD),)](
        x_TD.contiguous(), weight, *_codes(rows), factor_T1, eps, **_sizes(x_TD)
    )
    return rows, factor_T1


def swiglu(a_TF: Tensor, b_TF: Tensor) -> Rows8:
    """triton_ops.swiglu with a quantized result."""
    rows = _empty_rows(a_TF)
    inputs = (a_TF.contiguous(), b_TF.contiguous())
    kernels.swiglu_quantize_kernel[(len(a_TF),)](*inputs, *_codes(rows), **_sizes(a_TF))
    return rows


def swiglu_backward(gradient: Tensor, a_TF: Tensor, b_TF: Tensor) -> tuple[Rows8, Rows8]:
    """triton_ops.swiglu_backward with quantized results."""
    da, db = _empty_rows(a_TF), _empty_rows(a_TF)
    inputs = (gradient.contiguous(), a_TF.contiguous(), b_TF.contiguous())
    kernels.swiglu_backward_quantize_kernel[(len(a_TF),)](
        *inputs, *_codes(da), *_codes(db), **_sizes(a_TF)
    )
    return da, db


def _empty_rows(x_TK: Tensor) -> Rows8:
    scale_T1 = x_TK.new_empty((len(x_TK), 1), dtype=torch.float32)
    return Rows8(torch.empty(x_TK.shape, dtype=E4M3, device=x_TK.device), scale_T1, x_TK.dtype)


def _codes(rows: Rows8) -> tuple[Tensor, Tensor]:
    """What the kernels write: the numbers' bits, and the scales."""
    return rows.numbers_TK.view(torch.uint8), rows.scale_T1


def _sizes(x_TK: Tensor) -> dict[str, int]:
    """The kernels' constants: one program holds a whole row, on more warps where it is long."""
    dim = x_TK.shape[-1]
    block = 1 << (dim - 1).bit_length()
    return {"dim": dim, "BLOCK": block, "num_warps": max(8, min(32, block // 1024))}


def dequantized(weight: Tensor | Weight8) -> Tensor:
    """The weight [N, K] as a tensor of its type."""
    if isinstance(weight, Tensor):
        return weight
    numbers_NK, scale_N1, dtype = weight.by_output
    return numbers_NK.to(dtype).mul_(scale_N1)  # multiplied in fp32, rounded once


def scaled_product(x: Tensor | Rows8, weight: Weight8) -> Tensor:
    """x W^T [T, N]; x is quantized here unless it is already."""
    rows = quantize_rows(x) if isinstance(x, Tensor) else x
    numbers_NK, scale_N1, _ = weight.by_output
    if not len(rows.numbers_TK):  # which torch's product refuses
        return scale_N1.new_empty((0, len(scale_N1)), dtype=rows.dtype)
    return torch._scaled_mm(
        rows.numbers_TK,
        numbers_NK.t(),
        scale_a=rows.scale_T1,
        scale_b=scale_N1.t(),
        out_dtype=rows.dtype,
        use_fast_accum=weight.is_accumulated_fast,
    )


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why `scaled_product` cannot run there, in words; None: it can."""
    where = "a CPU (2.12 does)"
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
        if torch.cuda.get_device_capability(device) < (8, 9):
            return f"{where} has no fp8 units (compute capability 8.9 or newer has them)"
    try:
        ones = torch.ones(GPU_MULTIPLE, GPU_MULTIPLE, dtype=dtype, device=device)
        scaled_product(ones, quantize_weight(ones))
    except (RuntimeError, ValueError):
        return (
            f"torch {torch.__version__} computes no fp8 products with scales by row and results "
            f"in {dtype} on {where}"
        )
    return None
