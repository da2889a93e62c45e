"""Triton kernels of the elementwise work.

They take the place of plain operations in autograd.py and attention/varlen.py. On a GPU the matrix
products of a 7B take half of an eager step: the rest is intermediate results that are written and
read again, and the launch of thousands of small kernels. torch.compile makes the same kernels, but
its checks before every call take 0.1 ms of the host's time, 40 ms of a step (benchmarks/LOG.md).
The number of rows differs from batch to batch: no kernel is compiled for it.

The tests run the kernels on a CPU too, through Triton's interpreter, against the plain operations.
"""

import importlib.util
import math
import os
from functools import lru_cache

import torch
from torch import Tensor

ENABLED = os.environ.get("VICO_KERNELS", "triton") != "plain"  # the one switch, for comparisons
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests: kernels run on the CPU
_INSTALLED = importlib.util.find_spec("triton") is not None
ELEMENTS = 1024  # of one program of SwiGLU
ROWS = 64  # query rows of one program of the adapter's attention
HEADS = 8  # heads of one program of the rotary embedding, or of widening

# Only where it can run: importing Triton takes a second.
IMPORTED = _INSTALLED and (INTERPRETED or torch.cuda.is_available())
if IMPORTED:
    import triton

    from vico.model.ops import triton_kernels as kernels


def can_run(x: Tensor) -> bool:
    """Whether kernels take `x`, whose last dimension is a model's or a head's width."""
    if not ENABLED or not _INSTALLED or x.stride(-1) != 1:
        return False
    return INTERPRETED or (x.is_cuda and _is_recent(x.device.index))


def can_run_on(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`, whatever VICO_KERNELS says."""
    if not IMPORTED:
        return False
    return INTERPRETED or (device.type == "cuda" and _is_recent(device.index or 0))


def can_run_on_heads(x_THd: Tensor) -> bool:
    """Whether kernels that work on heads take `x_THd`.

    A tile's width is a power of two, and a product wants 16 or more.
    """
    width = x_THd.shape[-1]
    return can_run(x_THd) and width >= 16 and width & (width - 1) == 0


@lru_cache
def _is_recent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def describe(device: torch.device) -> str:
    """For the start line: what does the elementwise work, and why not the kernels."""
    reason = _why_not(device)
    if reason is None:
        return "elementwise work by Triton kernels"
    return f"elementwise work by plain operations ({reason})"


def _why_not(device: torch.device) -> str | None:
    if device.type != "cuda":
        return "a CPU"
    if not _INSTALLED:
        return "no Triton here"
    if not ENABLED:
        return "VICO_KERNELS=plain"
    if not _is_recent(device.index or 0):
        return "a GPU before compute capability 8.0"
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w x / rms(x) [T, D], 1 / rms(x) [T, 1])."""
    x, dim = x.contiguous(), x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    grid = (x.numel() // dim,)
    kernels.norm_kernel[grid](
        x, weight, out, scale, eps, dim, BLOCK=triton.next_power_of_2(dim), num_warps=8
    )
    return out, scale


def rms_norm_backward(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, residual: Tensor | None = None
) -> Tensor:
    """`residual` is added before the result is rounded."""
    x, dim = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    grid, block = (x.numel() // dim,), triton.next_power_of_2(dim)
    residual = None if residual is None else residual.contiguous()
    inputs = (gradient.contiguous(), x, scale, weight, residual)
    kernels.norm_backward_kernel[grid](*inputs, out, dim, BLOCK=block, num_warps=8)
    return out


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    grid = (triton.cdiv(a.numel(), ELEMENTS),)
    kernels.swiglu_kernel[grid](a, b, out, a.numel(), BLOCK=ELEMENTS)
    return out


def swiglu_backward(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.contiguous(), b.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(b)
    grid, inputs = (triton.cdiv(a.numel(), ELEMENTS),), (gradient.contiguous(), a, b)
    kernels.swiglu_backward_kernel[grid](*inputs, da, db, a.numel(), BLOCK=ELEMENTS)
    return da, db


def apply_rotary_emb(x_THd: Tensor, angles_T1h2: Tensor, sign: float) -> Tensor:
    """Pairs turned by sign times their angle; angles as (cosine, sine).

    Rows and heads of x may lie apart.
    """
    rows, heads, width = x_THd.shape
    out = torch.empty((rows, heads, width), dtype=x_THd.dtype, device=x_THd.device)
    grid = (rows, triton.cdiv(heads, HEADS))
    pointers = (x_THd, x_THd, angles_T1h2, out, out)
    strides = (x_THd.stride(0), x_THd.stride(1))
    kernels.rotate_kernel[grid](*pointers, *strides, sign, heads, WIDTH=width, HEADS=HEADS)
    return out


def apply_rotary_emb_qk(
    q_THd: Tensor, k_THd: Tensor, angles_T1h2: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    """`apply_rotary_emb` of two tensors of one shape, in one launch."""
    q_THd, k_THd, (rows, heads, width) = q_THd.contiguous(), k_THd.contiguous(), q_THd.shape
    outs = torch.empty_like(q_THd), torch.empty_like(k_THd)
    grid = (rows, triton.cdiv(heads, HEADS), 2)
    pointers, strides = (q_THd, k_THd, angles_T1h2, *outs), (heads * width, width)
    kernels.rotate_kernel[grid](*pointers, *strides, sign, heads, WIDTH=width, HEADS=HEADS)
    return outs


def widen(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    gate2_H: Tensor,
    after_video_T: Tensor,
    is_video_T: Tensor,
    rows_K: Tensor,
    unit: float,
    num_extra: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """varlen.widen_heads."""
    q_THd, k_THd, v_THd = q_THd.contiguous(), k_THd.contiguous(), v_THd.contiguous()
    (rows, heads, width), keys = k_THd.shape, len(rows_K)
    wide_q = q_THd.new_empty((rows, heads, width + num_extra))
    wide_k = q_THd.new_empty((keys, heads, width + num_extra))
    wide_v = q_THd.new_empty((keys, heads, width + num_extra))
    flags = after_video_T.view(torch.uint8), is_video_T.view(torch.uint8)
    inputs = (q_THd, k_THd, v_THd, rows_K, *flags, gate2_H.float().contiguous())
    grid = (max(rows, keys), triton.cdiv(heads, HEADS), 3)
    factor = math.sqrt(width) / unit
    sizes = {"heads": heads, "WIDTH": width, "EXTRA": num_extra, "HEADS": HEADS}
    kernels.widen_kernel[grid](*inputs, wide_q, wide_k, wide_v, rows, keys, factor, unit, **sizes)
    return wide_q, wide_k, wide_v


def adapter_attention(
    base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> Tensor:
    """base + gate softmax(q.K / sqrt d) V; gate_H is tanh(gate1).

    Rows and heads of `base` may lie apart.
    """
    q_THd, (rows, heads, width) = q_THd.contiguous(), q_THd.shape
    out = torch.empty_like(q_THd)
    grid = (triton.cdiv(rows, ROWS), heads)
    inputs = (base_THd, q_THd, k_AHd.contiguous(), v_AHd.contiguous(), gate_H)
    base_strides = (base_THd.stride(0), base_THd.stride(1))
    sizes = _adapter_sizes(q_THd, k_AHd)
    kernels.adapter_kernel[grid](*inputs, out, rows, *base_strides, width**-0.5, **sizes)
    return out


def adapter_attention_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of tanh(gate1).

    Sums over rows are sums of the programs' sums, in a fixed order.
    """
    q_THd, (rows, heads, width) = q_THd.contiguous(), q_THd.shape
    num_programs, sizes = triton.cdiv(rows, ROWS), _adapter_sizes(q_THd, k_AHd)
    dq = torch.empty_like(q_THd)
    gate_sums = gate_H.new_empty((num_programs, heads))
    kv_sums = gate_H.new_empty((num_programs, heads, 2, sizes["KEYS"], width))
    inputs = (g_THd.contiguous(), q_THd, k_AHd.contiguous(), v_AHd.contiguous(), gate_H)
    kernels.adapter_backward_kernel[(num_programs, heads)](
        *inputs, dq, kv_sums, gate_sums, rows, width**-0.5, **sizes
    )
    dkv_H2Ad = kv_sums.sum(dim=0)[:, :, : len(k_AHd)]
    dk, dv = dkv_H2Ad.permute(1, 2, 0, 3).to(k_AHd.dtype).unbind(0)
    return dq, dk, dv, gate_sums.sum(dim=0)


def _adapter_sizes(q_THd: Tensor, k_AHd: Tensor) -> dict[str, int]:
    """The constants of the adapter's kernels; keys are padded to a tile."""
    num_keys = max(16, triton.next_power_of_2(len(k_AHd)))
    heads, width = q_THd.shape[1:]
    return {"heads": heads, "length": len(k_AHd), "WIDTH": width, "KEYS": num_keys, "ROWS": ROWS}
