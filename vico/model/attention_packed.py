"""Attention by fused kernels for packed sequences (CUDA): one call per layer, gate2 as extra dimensions of q and k.

Each segment is a sequence of the kernel whose keys are its ancestors' rows and its own, gathered; kernels align the
causal triangle at the bottom right. The same by PyTorch's scaled_dot_product_attention, a call per segment, runs anywhere.

What is gathered and widened for the kernel is made again in backward, the kernel's forward with it: that adds half a
percent of a step's products and keeps q, k and v alone, instead of another copy of each and the output.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vico.errors import UserError
from vico.model.attention import Attend, Visibility, attend_blocks, attend_plain

# (q, k, v, q_starts, k_starts, longest q, longest k, scale) -> out; k_starts etc. as cumulative row numbers, int32.
Kernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A stream's segments as the kernels want them, on the device."""

    key_rows: Tensor  # int64: of each segment in turn, its ancestors' rows and its own
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
        out: Tensor = checkpoint(self._attend, q_QHd, k_THd, v_THd, gate2_H, self._layout, use_reentrant=False, preserve_rng_state=False)
        return out

    def _attend(self, q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, layout: _Layout) -> Tensor:
        width = q_THd.shape[-1]
        if gate2_H is not None:
            q_THd, k_THd, v_THd = _with_gate_dimensions(q_THd, k_THd, v_THd, gate2_H, layout)
        keys, values = k_THd.index_select(0, layout.key_rows), v_THd.index_select(0, layout.key_rows)
        # The scale is that of the real head width, not of the widened one.
        scale = 1 / math.sqrt(width)
        out = self._kernel(q_THd, keys, values, layout.q_starts, layout.k_starts, layout.longest_q, layout.longest_k, scale)
        return out[..., :width]


def _layout(seen: Visibility, device: torch.device) -> _Layout:
    key_rows: list[Tensor] = []
    for segment in seen.segments:
        chain = [segment]
        while chain[0].parent is not None:
            chain.insert(0, seen.segments[chain[0].parent])
        key_rows.append(torch.cat([torch.arange(s.start, s.stop) for s in chain]))
    q_lengths = [s.stop - s.start for s in seen.segments]
    k_lengths = [len(rows) for rows in key_rows]
    starts = [torch.tensor([0, *lengths]).cumsum(0).int().to(device, non_blocking=True) for lengths in (q_lengths, k_lengths)]
    repeats = torch.tensor(q_lengths)
    flags = [torch.tensor([getattr(s, name) for s in seen.segments]).repeat_interleave(repeats) for name in ("after_video", "is_video")]
    # Rounded up: kernels are chosen by these, and a new value for every batch would mean a new compilation.
    longest = [-(-max(lengths) // 64) * 64 for lengths in (q_lengths, k_lengths)]
    on_device = [t.to(device, non_blocking=True) for t in (torch.cat(key_rows), *flags)]
    return _Layout(on_device[0], starts[0], starts[1], longest[0], longest[1], on_device[1], on_device[2])


def _with_gate_dimensions(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor, layout: _Layout) -> tuple[Tensor, Tensor, Tensor]:
    """q and k widened so that q'.k' = q.k + sqrt(d) gate2 where a row behind the video meets a video key; v by zeros.

    With c a power of two near sqrt(d), q gets [hi, lo] = gate2 sqrt(d) / c in two parts of the arithmetic's precision
    (together about 16 bits in bf16) and k gets [c, c]. hi is not detached in lo: its gradient cancels there, so that
    gate2 receives each row's gradient once.
    """
    num_rows, num_heads, width = q_THd.shape
    c = 2.0 ** round(math.log2(math.sqrt(width)))
    x_H = gate2_H.float() * (math.sqrt(width) / c)
    hi_H = x_H.to(q_THd.dtype)
    lo_H = (x_H - hi_H.float()).to(q_THd.dtype)
    extra = 2 + -(width + 2) % 8  # CUDA's kernels want head widths that are multiples of 8
    q_extra_HE = torch.cat([hi_H[:, None], lo_H[:, None], q_THd.new_zeros(num_heads, extra - 2)], dim=1)
    q_extra_THE = layout.after_video_T[:, None, None] * q_extra_HE
    k_extra_THE = (layout.is_video_T.to(k_THd.dtype) * c)[:, None, None].expand(num_rows, num_heads, extra)
    return torch.cat([q_THd, q_extra_THE], dim=-1), torch.cat([k_THd, k_extra_THE], dim=-1), F.pad(v_THd, (0, extra))


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
