"""Attention over a packed stream: out = softmax_k(s q.k + gate2 [query behind the video, key in the video]) V.

Two implementations of one function. `attend_plain` builds the whole score matrix and is the definition; `attend_fused`
calls PyTorch's fused kernel once per segment, which keeps no score matrix for backward. gate2 enters the fused kernel as
extra dimensions of q and k, exactly: their product is gate2 where it applies and 0 elsewhere.

The adapter's ten keys have a softmax of their own (`attend_adapter`), added by the caller.
"""

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vico.records import PackedBatch, Segment

MAX_SIBLING_ROWS = 64  # leaves of one parent run as one kernel call while their masked square stays this small


@dataclass(frozen=True, slots=True)
class Visibility:
    """Who sees whom in one packed stream, and where gate2 applies; made once per micro-batch, used by every layer."""

    calls: tuple["KernelCall", ...]
    segments: tuple[Segment, ...]
    after_video_T: Tensor  # bool
    is_video_T: Tensor  # bool


@dataclass(frozen=True, slots=True)
class KernelCall:
    """One fused call: the queries of `own` segments against the keys of `ancestors`, then their own."""

    own: tuple[int, ...]
    ancestors: tuple[int, ...]
    mask: Tensor | None  # bool [queries, keys], True: visible; None: plain causal


def visibility(batch: PackedBatch) -> Visibility:
    device = batch.token_ids_T.device
    calls = tuple(_kernel_call(batch.segments, own, device) for own in _sibling_groups(batch.segments))
    return Visibility(calls, batch.segments, batch.after_video_T, batch.is_video_T)


def _ancestors(segments: Items[Segment], segment: int) -> tuple[int, ...]:
    chain: list[int] = []
    parent = segments[segment].parent
    while parent is not None:
        chain.append(parent)
        parent = segments[parent].parent
    return tuple(reversed(chain))


def _sibling_groups(segments: Items[Segment]) -> list[tuple[int, ...]]:
    """Segments in order, small neighbouring children of one parent taken together."""
    groups: list[list[int]] = []
    for i, segment in enumerate(segments):
        if groups and segment.parent is not None:
            first = segments[groups[-1][0]]
            if first.parent == segment.parent and segment.stop - first.start <= MAX_SIBLING_ROWS:
                groups[-1].append(i)
                continue
        groups.append([i])
    return [tuple(group) for group in groups]


def _kernel_call(segments: Items[Segment], own: tuple[int, ...], device: torch.device) -> KernelCall:
    ancestors = _ancestors(segments, own[0])
    if not ancestors:
        return KernelCall(own, ancestors, None)
    lengths = [segments[i].stop - segments[i].start for i in own]
    num_before = sum(segments[i].stop - segments[i].start for i in ancestors)
    square = torch.block_diag(*(torch.ones(n, n).tril_() for n in lengths)).bool()
    return KernelCall(own, ancestors, torch.cat([torch.ones(sum(lengths), num_before, dtype=torch.bool), square], dim=1).to(device))


def attend_plain(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, seen: Visibility) -> Tensor:
    """The definition (METHOD section 1), in fp32, with the whole [H, T, T] score matrix. Returns [T, H, d]."""
    num_rows, _, width = q_THd.shape
    scores_HTT = torch.einsum("qhd,khd->hqk", q_THd.float(), k_THd.float()) / math.sqrt(width)
    if gate2_H is not None:
        gated_TT = seen.after_video_T[:, None] & seen.is_video_T[None, :]
        scores_HTT = scores_HTT + gate2_H.float()[:, None, None] * gated_TT
    visible_TT = torch.zeros(num_rows, num_rows, dtype=torch.bool, device=q_THd.device)
    for i, segment in enumerate(seen.segments):
        rows = slice(segment.start, segment.stop)
        for ancestor in _ancestors(seen.segments, i):
            visible_TT[rows, seen.segments[ancestor].start : seen.segments[ancestor].stop] = True
        visible_TT[rows, rows] = torch.ones_like(visible_TT[rows, rows]).tril_()
    scores_HTT = scores_HTT.masked_fill(~visible_TT, -math.inf)
    return torch.einsum("hqk,khd->qhd", scores_HTT.softmax(dim=-1), v_THd.float()).to(q_THd.dtype)


def attend_fused(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, seen: Visibility) -> Tensor:
    """The same by PyTorch's fused kernel, segment by segment. Returns [T, H, d]."""
    width, dtype = q_THd.shape[-1], q_THd.dtype
    if q_THd.device.type == "cpu" and dtype != torch.float32:
        q_THd, k_THd, v_THd = q_THd.float(), k_THd.float(), v_THd.float()  # the CPU's half-precision kernel is the slower one
    if gate2_H is not None:
        q_THd, k_THd, v_THd = _with_gate_dimensions(q_THd, k_THd, v_THd, gate2_H, seen)
    lengths = [segment.stop - segment.start for segment in seen.segments]
    # split, not slices: its backward is one concatenation, where each slice would make a zero tensor of full size.
    q_s, k_s, v_s = (x.split(lengths) for x in (q_THd, k_THd, v_THd))
    outs = []
    for call in seen.calls:
        keys = call.ancestors + call.own
        q, k, v = _heads_first(q_s, call.own), _heads_first(k_s, keys), _heads_first(v_s, keys)
        # The scale is that of the real head width, not of the widened one.
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=call.mask, is_causal=call.mask is None, scale=1 / math.sqrt(width))
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)[..., :width].to(dtype)


def _heads_first(pieces: tuple[Tensor, ...], chosen: tuple[int, ...]) -> Tensor:
    """[1, H, rows, d] of the chosen segments."""
    rows = pieces[chosen[0]] if len(chosen) == 1 else torch.cat([pieces[i] for i in chosen])
    return rows.transpose(0, 1).unsqueeze(0)


def _with_gate_dimensions(q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor, seen: Visibility) -> tuple[Tensor, Tensor, Tensor]:
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
    # CUDA's kernels want head widths that are multiples of 8.
    extra = 2 if q_THd.device.type == "cpu" else 2 + -(width + 2) % 8
    pad = q_THd.new_zeros(num_heads, extra - 2)
    q_extra_HE = torch.cat([hi_H[:, None], lo_H[:, None], pad], dim=1)
    q_extra_THE = seen.after_video_T[:, None, None] * q_extra_HE
    k_extra_THE = (seen.is_video_T.to(k_THd.dtype) * c)[:, None, None].expand(num_rows, num_heads, extra)
    widened_v = F.pad(v_THd, (0, extra))
    return torch.cat([q_THd, q_extra_THE], dim=-1), torch.cat([k_THd, k_extra_THE], dim=-1), widened_v


def attend_adapter(q_THd: Tensor, k_AHd: Tensor, v_AHd: Tensor) -> Tensor:
    """softmax_a(s q.Kad_a) Vad, the same few keys for every row (METHOD section 1). Returns [T, H, d]."""
    scores_HTA = torch.einsum("thd,ahd->hta", q_THd, k_AHd).float() / math.sqrt(q_THd.shape[-1])
    return torch.einsum("hta,ahd->thd", scores_HTA.softmax(dim=-1).to(v_AHd.dtype), v_AHd)
