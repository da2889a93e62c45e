"""Triton kernels of what is done element by element, each beside the Function (functions.py) whose plain operations it replaces.

On a GPU the products of a 7B take half of an eager step: the rest is intermediate results that are written and read again,
and starting thousands of small kernels. torch.compile makes the same kernels, but its checks before every call take 0.1 ms of
the host's time, 40 ms of a step (benchmarks/LOG.md). Rows differ from batch to batch: no kernel is compiled for their number.

Tests run these on a CPU through Triton's interpreter, against the plain operations.
"""

import importlib.util
import math
import os
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

USED = os.environ.get("VICO_KERNELS", "triton") != "plain"  # the one switch, for comparisons
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # tests: kernels run on the CPU
_FOUND = importlib.util.find_spec("triton") is not None
ROWS = 64  # of queries that a program of the adapter's attention takes
HEADS = 8  # that a program of the rotary embedding, or of widening, takes


def serve(x: Tensor) -> bool:
    """Whether kernels take `x`, whose last dimension is a model's or a head's width."""
    return (
        USED
        and _FOUND
        and ((x.is_cuda and _is_recent(x.device.index)) or INTERPRETED)
        and x.stride(-1) == 1
    )


@lru_cache
def _is_recent(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)


def describe(device: torch.device) -> str:
    reasons = (
        (device.type != "cuda", "a CPU"),
        (not _FOUND, "no Triton here"),
        (not USED, "VICO_KERNELS=plain"),
        (
            device.type == "cuda" and not _is_recent(device.index or 0),
            "a GPU before compute capability 8.0",
        ),
    )
    why = next((why for is_so, why in reasons if is_so), None)
    return (
        "elementwise work by Triton kernels"
        if why is None
        else f"elementwise work by plain operations ({why})"
    )


def serve_heads(x_THd: Tensor) -> bool:
    """Of the kernels that work on heads: their width is a tile's, 16 (what a product takes) or more."""
    width = x_THd.shape[-1]
    return serve(x_THd) and width >= 16 and width & (width - 1) == 0


if _FOUND and (INTERPRETED or torch.cuda.is_available()):  # importing it takes a second
    import triton

    from vico.model.ops import triton_kernels as programs


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(w x / rms(x) [T, D], 1 / rms(x) [T, 1])."""
    x, dim = x.contiguous(), x.shape[-1]
    out, scale = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    programs.norm_kernel[(x.numel() // dim,)](
        x, weight, out, scale, eps, dim, BLOCK=triton.next_power_of_2(dim), num_warps=8
    )
    return out, scale


def norm_backward(gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    x, dim = x.contiguous(), x.shape[-1]
    out = torch.empty_like(x)
    programs.norm_backward_kernel[(x.numel() // dim,)](
        gradient.contiguous(),
        x,
        scale,
        weight,
        out,
        dim,
        BLOCK=triton.next_power_of_2(dim),
        num_warps=8,
    )
    return out


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    a, out = a.contiguous(), torch.empty_like(a, memory_format=torch.contiguous_format)
    programs.swiglu_kernel[(triton.cdiv(a.numel(), 1024),)](
        a, b.contiguous(), out, a.numel(), BLOCK=1024
    )
    return out


def swiglu_backward(gradient: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.contiguous(), b.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(b)
    programs.swiglu_backward_kernel[(triton.cdiv(a.numel(), 1024),)](
        gradient.contiguous(), a, b, da, db, a.numel(), BLOCK=1024
    )
    return da, db


def rotate(x_THd: Tensor, angles_Th2: Tensor, sign: float) -> Tensor:
    """Pairs turned by sign times their angle; angles as (cosine, sine). Rows and heads of x may lie apart."""
    rows, heads, width = x_THd.shape
    out = torch.empty((rows, heads, width), dtype=x_THd.dtype, device=x_THd.device)
    programs.rotate_kernel[(rows, triton.cdiv(heads, HEADS), 1)](
        x_THd,
        x_THd,
        angles_Th2,
        out,
        out,
        x_THd.stride(0),
        x_THd.stride(1),
        sign,
        heads,
        WIDTH=width,
        HEADS=HEADS,
    )
    return out


def rotate_qk(
    x_THd: Tensor, y_THd: Tensor, angles_Th2: Tensor, sign: float
) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape in one start."""
    x_THd, y_THd, (rows, heads, width) = x_THd.contiguous(), y_THd.contiguous(), x_THd.shape
    outs = torch.empty_like(x_THd), torch.empty_like(y_THd)
    programs.rotate_kernel[(rows, triton.cdiv(heads, HEADS), 2)](
        x_THd, y_THd, angles_Th2, *outs, heads * width, width, sign, heads, WIDTH=width, HEADS=HEADS
    )
    return outs


def widen(
    q_THd: Tensor,
    k_THd: Tensor,
    v_THd: Tensor,
    gate2_H: Tensor,
    after_T: Tensor,
    video_T: Tensor,
    rows_K: Tensor,
    unit: float,
    extra: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """attention_packed._widened."""
    q_THd, k_THd, v_THd = q_THd.contiguous(), k_THd.contiguous(), v_THd.contiguous()
    (rows, heads, width), keys = k_THd.shape, len(rows_K)
    out_q, out_k, out_v = (
        q_THd.new_empty((num, heads, width + extra)) for num in (rows, keys, keys)
    )
    flags = after_T.view(torch.uint8), video_T.view(torch.uint8)
    programs.widen_kernel[(max(rows, keys), triton.cdiv(heads, HEADS), 3)](
        q_THd,
        k_THd,
        v_THd,
        rows_K,
        *flags,
        gate2_H.float().contiguous(),
        out_q,
        out_k,
        out_v,
        rows,
        keys,
        math.sqrt(width) / unit,
        unit,
        heads=heads,
        WIDTH=width,
        EXTRA=extra,
        HEADS=HEADS,
    )
    return out_q, out_k, out_v


def _keys(k_AHd: Tensor) -> int:
    return max(16, triton.next_power_of_2(len(k_AHd)))


def adapter(
    base_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> Tensor:
    """base + gate softmax(q.K / sqrt d) V; the gate is tanh(gate1) already. Rows and heads of `base` may lie apart."""
    q_THd, (rows, heads, width) = q_THd.contiguous(), q_THd.shape
    out = torch.empty_like(q_THd)
    sizes: dict[str, Any] = {
        "heads": heads,
        "length": len(k_AHd),
        "WIDTH": width,
        "KEYS": _keys(k_AHd),
        "ROWS": ROWS,
    }
    programs.adapter_kernel[(triton.cdiv(rows, ROWS), heads)](
        base_THd,
        q_THd,
        k_AHd.contiguous(),
        v_AHd.contiguous(),
        gate_H,
        out,
        rows,
        base_THd.stride(0),
        base_THd.stride(1),
        width**-0.5,
        **sizes,
    )
    return out


def adapter_backward(
    g_THd: Tensor, q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor, gate_H: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, and of tanh(gate1). Sums over rows are sums of blocks' sums, in a fixed order."""
    q_THd, (rows, heads, width) = q_THd.contiguous(), q_THd.shape
    blocks, keys, length = triton.cdiv(rows, ROWS), _keys(k_AHd), len(k_AHd)
    dq, gate_parts = torch.empty_like(q_THd), gate_H.new_empty((blocks, heads))
    parts = gate_H.new_empty((blocks, heads, 2, keys, width))
    programs.adapter_backward_kernel[(blocks, heads)](
        g_THd.contiguous(),
        q_THd,
        k_AHd.contiguous(),
        v_AHd.contiguous(),
        gate_H,
        dq,
        parts,
        gate_parts,
        rows,
        width**-0.5,
        heads=heads,
        length=length,
        WIDTH=width,
        KEYS=keys,
        ROWS=ROWS,
    )
    dk, dv = parts.sum(dim=0)[:, :, :length].permute(1, 2, 0, 3).to(k_AHd.dtype).unbind(0)
    return dq, dk, dv, gate_parts.sum(dim=0)
