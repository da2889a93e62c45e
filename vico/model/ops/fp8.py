"""Products of a frozen weight in 8-bit floating point: e4m3, with one fp32 scale per row.

Both sides of x W^T are quantized along the dimension that the product sums over: x by row (token),
W by output. The gradient's product g W sums over the outputs: their scales are multiplied into g,
which is then quantized by row, and W's numbers are the same in both products. Hopper wants them in
the order of the sum, so they are kept twice, in as many bytes as in bf16. ZeRO-3 gathers them once,
and the second order is made at use. Sums are fp32, results have the type of x.
"""

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


class Weight8(NamedTuple):
    """A quantized weight [N, K], as linear layers use one; `t()` is for the gradient.

    Holds parameters, not their values: ZeRO-3 gathers them again for backward.
    """

    codes_NK: Tensor  # the numbers' bits in uint8, which any backend of torch.distributed gathers
    scale_N1: Tensor  # fp32
    ones_K1: Tensor  # fp32: the scales of the transpose
    codes_KN: Tensor | None  # the transpose, where it is kept
    dtype: torch.dtype  # of the weight that was quantized
    is_transposed: bool = False

    def t(self) -> "Weight8":
        return self._replace(is_transposed=not self.is_transposed)

    @property
    def factor_K(self) -> Tensor | None:
        """By what the inputs' columns are multiplied before they are quantized; None: 1."""
        return self.scale_N1.flatten() if self.is_transposed else None

    @property
    def by_output(self) -> Rows8:
        """A row for each output of the product."""
        if not self.is_transposed:
            return Rows8(self.codes_NK.view(E4M3), self.scale_N1, self.dtype)
        codes_KN = self.codes_KN
        if codes_KN is None:
            codes_KN = self.codes_NK.t().contiguous()
        return Rows8(codes_KN.view(E4M3), self.ones_K1, self.dtype)


def quantize_weight(weight_NK: Tensor) -> Weight8:
    """With its transpose, on the weight's device."""
    numbers_NK, scale_N1, dtype = quantize_rows(weight_NK)
    codes_NK = numbers_NK.view(torch.uint8)
    ones_K1 = scale_N1.new_ones((weight_NK.shape[1], 1))
    return Weight8(codes_NK, scale_N1, ones_K1, codes_NK.t().contiguous(), dtype)


def quantize_rows(x_TK: Tensor, factor_K: Tensor | None = None) -> Rows8:
    """Each row over its scale, which makes its largest magnitude 448, rounded to e4m3.

    `factor_K`, in fp32: what the columns are multiplied by before that. A row that is not finite
    has a product that is not finite.
    """
    if can_run_kernels(x_TK):
        rows, factor = _empty_rows(x_TK), x_TK if factor_K is None else factor_K
        inputs = (x_TK.contiguous(), factor, *_codes(rows))
        kernels.quantize_kernel[(len(x_TK),)](
            *inputs, has_factor=factor_K is not None, **_sizes(x_TK)
        )
        return rows
    dtype = x_TK.dtype
    x_TK = x_TK if factor_K is None else x_TK * factor_K  # in fp32
    magnitude_T1 = x_TK.abs().amax(dim=-1, keepdim=True).float().clamp_(min=MIN_MAGNITUDE)
    numbers_TK = (x_TK * (magnitude_T1.reciprocal() * LARGEST)).to(E4M3)  # multiplied in fp32
    return Rows8(numbers_TK, magnitude_T1.div_(LARGEST), dtype)


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


def swiglu_backward(
    gradient: Tensor, a_TF: Tensor, b_TF: Tensor, factors: tuple[Tensor, Tensor]
) -> tuple[Rows8, Rows8]:
    """triton_ops.swiglu_backward with results that are quantized with these factors [F]."""
    da, db = _empty_rows(a_TF), _empty_rows(a_TF)
    inputs = (gradient.contiguous(), a_TF.contiguous(), b_TF.contiguous(), *factors)
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
    rows = quantize_rows(x, weight.factor_K) if isinstance(x, Tensor) else x
    numbers_NK, scale_N1, _ = weight.by_output
    if not len(rows.numbers_TK):  # which torch's product refuses
        return scale_N1.new_empty((0, len(scale_N1)), dtype=rows.dtype)
    return torch._scaled_mm(
        rows.numbers_TK,
        numbers_NK.t(),
        scale_a=rows.scale_T1,
        scale_b=scale_N1.t(),
        out_dtype=rows.dtype,
        # In 14 bits on Hopper, between the sums in fp32: for forward, as is usual.
        use_fast_accum=not weight.is_transposed,
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
