# mypy: ignore-errors
"""The Triton kernels of fp8.py, which says what each computes and launches it.

One program holds a row, so that its largest magnitude is known before a number is written. What is
quantized is first rounded to the type that the tensor would have had. A factor is by column.
"""

import triton
import triton.language as tl


@triton.jit
def _codes(value):
    """The bits of `value`, at most 448, in e4m3: rounded to the nearest, half to even.

    By hand, since Triton's interpreter (3.9) loses a carry into the exponent where it casts.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # The exponent's offset is 7 and no longer 127; three bits of the mantissa stay.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6, multiples of 2^-9: what the last bits of a sum with 1.5 * 2^14 count.
    counted = (tl.abs(value) + 24576.0).to(tl.int32, bitcast=True) - 0x46C00000
    code = tl.where(magnitude < 0x3C800000, counted, normal)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store_quantized(value, numbers, scale, row, columns, mask, dim: tl.constexpr):
    magnitude = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-30)
    tl.store(scale + row, tl.div_rn(magnitude, 448.0))
    codes = _codes(value * (tl.div_rn(1.0, magnitude) * 448.0))
    tl.store(numbers + row * dim + columns, codes, mask=mask)


@triton.jit
def quantize_kernel(
    x,
    factor,
    numbers,
    scale,
    has_factor: tl.constexpr,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    value = tl.load(x + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    if has_factor:
        value *= tl.load(factor + columns, mask=mask, other=0.0)
    _store_quantized(value, numbers, scale, row, columns, mask, dim)


@triton.jit
def norm_quantize_kernel(
    x, weight, numbers, scale, factors, eps, dim: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    value = tl.load(x + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(tl.sum(value * value, axis=0) / dim + eps)
    tl.store(factors + row, factor)
    w = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    rounded = (value * factor).to(x.dtype.element_ty).to(tl.float32)
    normed = (rounded * w).to(x.dtype.element_ty).to(tl.float32)
    _store_quantized(normed, numbers, scale, row, columns, mask, dim)


@triton.jit
def swiglu_quantize_kernel(a, b, numbers, scale, dim: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    x = tl.load(a + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(b + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    value = (x * tl.sigmoid(x) * y).to(a.dtype.element_ty).to(tl.float32)
    _store_quantized(value, numbers, scale, row, columns, mask, dim)


@triton.jit
def swiglu_backward_quantize_kernel(
    gradient,
    a,
    b,
    da_factor,
    db_factor,
    da_numbers,
    da_scale,
    db_numbers,
    db_scale,
    dim: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < dim
    g = tl.load(gradient + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(a + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(b + row * dim + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(x)
    silu = x * sigmoid
    db = (silu * g).to(a.dtype.element_ty).to(tl.float32)
    db *= tl.load(db_factor + columns, mask=mask, other=0.0)
    _store_quantized(db, db_numbers, db_scale, row, columns, mask, dim)
    da = ((sigmoid + silu * (1.0 - sigmoid)) * g * y).to(a.dtype.element_ty).to(tl.float32)
    da *= tl.load(da_factor + columns, mask=mask, other=0.0)
    _store_quantized(da, da_numbers, da_scale, row, columns, mask, dim)
