"""Attention by fused kernels for packed sequences (CUDA): one call per layer, gate2 as extra dimensions of q and k.

Each segment is a sequence of the kernel whose keys are its ancestors' rows and its own, gathered; kernels align the
causal triangle at the bottom right. The same by PyTorch's scaled_dot_product_attention, a call per segment, runs anywhere.

What is gathered and widened for the kernel is made again in backward, the kernel's forward with it: that adds half a
percent of a step's products and keeps q, k and v alone, instead of another copy of each and the output.
"""

import importlib.util
import math
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vico.errors import UserError
from vico.model.attention import Attend, Visibility, attend_blocks, attend_plain
from vico.model.chains import chain
from vico.records import Segment

# (q, k, v, q_starts, k_starts, longest q, longest k, scale) -> out; k_starts etc. as cumulative row numbers, int32.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A stream's segments as the kernels want them, on the device. K: keys of all segments, ancestors' rows again for each."""

    key_rows_K: Tensor  # int64: of each segment in turn, its ancestors' rows and its own
    own_keys_T: Tensor  # int64: where in K each row stands as a row of its own segment
    shared_rows_S: Tensor  # int64: the rows that stand in K more than once
    shared_keys_SM: Tensor  # int64: where; padded
    shared_mask_SM: Tensor  # fp32: 1, and 0 where padded
    q_starts: Tensor  # int32 [segments + 1]
    k_starts: Tensor
    longest_q: int
    longest_k: int
    after_video_T: Tensor  # bool
    is_video_T: Tensor  # bool


class PackedAttention:
    """`attend` by a kernel; remembers the layout of the micro-batch under way, which every layer asks for."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._made_for: Visibility | None = None
        self._layout: _Layout | None = None

    def __call__(self, q_QHd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, seen: Visibility) -> Tensor:
        if seen.queries is not None:  # one layer of many: asking for all rows costs less than a layout of its own
            rows = seen.queries.to(q_QHd.device)
            q_THd = k_THd.new_zeros(k_THd.shape).index_copy(0, rows, q_QHd)
            return self(q_THd, k_THd, v_THd, gate2_H, Visibility(seen.segments, ())).index_select(0, rows)
        if self._made_for is None or self._made_for.segments is not seen.segments:
            self._made_for, self._layout = seen, _layout(seen, q_QHd.device)
        out: Tensor = _PackedAttention.apply(q_QHd, k_THd, v_THd, gate2_H, self._layout, self._kernel)
        return out


class _PackedAttention(Function):
    """A kernel between widening and gathering, all of which backward makes again, so that q, k and v alone are kept.

    A row that several segments see gets its gradient as one sum in fp32, in a fixed order, where autograd would add in half
    precision and as they come.
    """

    @staticmethod
    def forward(ctx: Any, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, layout: _Layout, kernel: Kernel) -> Tensor:
        ctx.save_for_backward(q_THd, k_THd, v_THd, gate2_H)
        ctx.layout, ctx.kernel = layout, kernel
        out = _call(kernel, _kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout), layout, q_THd.shape[-1])
        return out[..., : q_THd.shape[-1]]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_THd, v_THd, gate2_H = ctx.saved_tensors
        layout, width = ctx.layout, q_THd.shape[-1]
        inputs = [x.requires_grad_() for x in _kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout)]
        with torch.enable_grad():
            out = _call(ctx.kernel, inputs, layout, width)[..., :width]
        dq, dk, dv = torch.autograd.grad(out, inputs, gradients[0])
        del out, inputs  # six widened tensors, in the worst moment of a step's memory
        gate2_gradient = None
        if gate2_H is not None:
            # hi and lo are parts of one number, of which each row's score takes hi's share once and lo's correction of it.
            gate2_gradient = dq[..., width].float().mul_(layout.after_video_T[:, None]).sum(dim=0).mul_(math.sqrt(width) / _unit(width))
        return dq[..., :width], _by_row(dk[..., :width], layout), _by_row(dv[..., :width], layout), gate2_gradient, None, None


def _call(kernel: Kernel, inputs: Items[Tensor], layout: _Layout, width: int) -> Tensor:
    # The scale is that of the real head width, not of the widened one.
    q, k, v = inputs
    return kernel(q, k, v, layout.q_starts, layout.k_starts, layout.longest_q, layout.longest_k, 1 / math.sqrt(width))


def _kernel_inputs(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, layout: _Layout) -> list[Tensor]:
    """q [T, H, d'], k and v [K, H, d'], as the kernels want them."""
    if gate2_H is None:
        return [q_THd.detach(), k_THd.detach().index_select(0, layout.key_rows_K), v_THd.detach().index_select(0, layout.key_rows_K)]
    return list(_widened(q_THd, k_THd, v_THd, gate2_H, layout.after_video_T, layout.is_video_T, layout.key_rows_K))


def _unit(width: int) -> float:
    """A power of two near sqrt(d)."""
    return 2.0 ** round(math.log2(math.sqrt(width)))


@chain
def _widened(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor, after_video_T: Tensor, is_video_T: Tensor, key_rows_K: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k widened so that q'.k' = q.k + sqrt(d) gate2 where a row behind the video meets a video key; v by zeros.

    With c = _unit(d), q gets [hi, lo] = gate2 sqrt(d) / c in two parts of the arithmetic's precision (together about 16 bits
    in bf16) and k gets [c, c].
    """
    num_rows, num_heads, width = k_THd.shape
    extra = 2 + -(width + 2) % 8  # CUDA's kernels want head widths that are multiples of 8
    c = _unit(width)
    x_H = gate2_H.float() * (math.sqrt(width) / c)
    hi_H = x_H.to(q_THd.dtype)
    lo_H = (x_H - hi_H.float()).to(q_THd.dtype)
    q_extra_HE = torch.cat([hi_H[:, None], lo_H[:, None], q_THd.new_zeros(num_heads, extra - 2)], dim=1)
    q_extra_THE = after_video_T[:, None, None] * q_extra_HE
    k_extra_THE = (is_video_T.to(k_THd.dtype) * c)[:, None, None].expand(num_rows, num_heads, extra)
    wide_q, wide_k = torch.cat([q_THd, q_extra_THE], dim=-1), torch.cat([k_THd, k_extra_THE], dim=-1)
    return wide_q, wide_k.index_select(0, key_rows_K), F.pad(v_THd, (0, extra)).index_select(0, key_rows_K)


def _by_row(gradient_KHd: Tensor, layout: _Layout) -> Tensor:
    """[T, H, d]: of each row, the sum over the places where it stands among the keys."""
    out_THd = gradient_KHd.index_select(0, layout.own_keys_T)
    if len(layout.shared_rows_S):
        many = gradient_KHd.index_select(0, layout.shared_keys_SM.flatten()).unflatten(0, layout.shared_keys_SM.shape).float()
        out_THd.index_copy_(0, layout.shared_rows_S, many.mul_(layout.shared_mask_SM[..., None, None]).sum(dim=1).to(out_THd.dtype))
    return out_THd


def _layout(seen: Visibility, device: torch.device) -> _Layout:
    """Host work in numpy, once per micro-batch, and copies that nobody waits for."""
    chains: list[list[Segment]] = []
    for segment in seen.segments:  # parents stand before their children
        above = [] if segment.parent is None else chains[segment.parent]
        chains.append([*above, segment])
    key_rows = np.concatenate([np.arange(s.start, s.stop) for line in chains for s in line])
    q_lengths = np.array([s.stop - s.start for s in seen.segments])
    k_lengths = np.array([sum(s.stop - s.start for s in line) for line in chains])
    q_starts, k_starts = (np.concatenate([[0], lengths.cumsum()]) for lengths in (q_lengths, k_lengths))
    # A segment's own rows are the last of its keys, and rows stand in the order of segments.
    own_keys = np.concatenate([np.arange(stop - n, stop) for stop, n in zip(k_starts[1:], q_lengths, strict=True)])
    counts = np.bincount(key_rows, minlength=len(own_keys))
    shared_rows = np.flatnonzero(counts > 1)
    by_row, firsts = np.argsort(key_rows, kind="stable"), np.concatenate([[0], counts.cumsum()])[shared_rows]
    turns = np.arange(counts.max())
    mask = turns < counts[shared_rows, None]
    shared_keys = by_row[np.where(mask, firsts[:, None] + turns, 0)]
    flags = [np.repeat([getattr(s, name) for s in seen.segments], q_lengths) for name in ("after_video", "is_video")]
    # Rounded up: kernels are chosen by these, and a new value for every batch would mean a new compilation.
    longest = [-(-int(lengths.max()) // 64) * 64 for lengths in (q_lengths, k_lengths)]

    def to_device(values: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    return _Layout(
        to_device(key_rows), to_device(own_keys), to_device(shared_rows), to_device(shared_keys), to_device(mask.astype(np.float32)),
        to_device(q_starts.astype(np.int32)), to_device(k_starts.astype(np.int32)), longest[0], longest[1], *map(to_device, flags),
    )  # fmt: skip


def sdpa_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    """A call of scaled_dot_product_attention per segment: slow on a GPU (it waits for the device), right everywhere."""
    outs = []
    pieces = zip(*(x.split(starts.diff().tolist()) for x, starts in ((q, q_starts), (k, k_starts), (v, k_starts))), strict=True)
    for q_s, k_s, v_s in pieces:
        mask = torch.ones(len(q_s), len(k_s), dtype=torch.bool, device=q.device).tril_(len(k_s) - len(q_s))
        q_1Hrd, k_1Hrd, v_1Hrd = (x.transpose(0, 1).unsqueeze(0) for x in (q_s, k_s, v_s))
        outs.append(F.scaled_dot_product_attention(q_1Hrd, k_1Hrd, v_1Hrd, attn_mask=mask, scale=scale)[0].transpose(0, 1))
    return torch.cat(outs)


def varlen_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    """PyTorch's own FlashAttention-2 for packed sequences (CUDA, torch >= 2.11; causal by its window)."""
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(q, k, v, q_starts, k_starts, longest_q, longest_k, scale=scale, window_size=(-1, 0))
    assert isinstance(out, Tensor)
    return out


def flash_attn_kernel(
    q: Tensor, k: Tensor, v: Tensor, q_starts: Tensor, k_starts: Tensor, longest_q: int, longest_k: int, scale: float
) -> Tensor:
    """The flash-attn package (extra `flash`)."""
    from flash_attn import flash_attn_varlen_func

    out: Tensor = flash_attn_varlen_func(q, k, v, q_starts, k_starts, longest_q, longest_k, softmax_scale=scale, causal=True)
    return out


KERNELS: dict[str, Kernel] = {"sdpa": sdpa_kernel, "varlen": varlen_kernel, "flash_attn": flash_attn_kernel}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Attend, str]:
    """(the function that attends, what it is and why) for `--attention` NAME. Raises UserError for one that cannot run here."""
    half, cuda = dtype in (torch.bfloat16, torch.float16), device.type == "cuda"
    fused = cuda and half and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "varlen" if fused else "sdpa" if cuda else "blocks"
        why = {"varlen": "half precision on this GPU", "sdpa": "packed kernels want half precision on a recent GPU", "blocks": "a CPU"}[
            name
        ]
    else:
        why = "--attention says so"
    if name in ("varlen", "flash_attn") and not fused:
        raise UserError(f"--attention {name}: needs a GPU of compute capability 8.0 or newer and --precision bf16 or fp16")
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UserError("--attention flash_attn: the package is not installed; pip install '.[flash]', or leave --attention out")
    if name == "blocks" and cuda:
        raise UserError("--attention blocks: is for CPUs; leave --attention out")
    attend: Attend = {"plain": attend_plain, "blocks": attend_blocks}.get(name) or PackedAttention(KERNELS[name])
    return attend, f"attention {name} ({why})"
