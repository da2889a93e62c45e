"""Attention by fused kernels for packed sequences (CUDA): one call per layer, gate2 as extra dimensions of q and k.

Each segment is a sequence of the kernel whose keys are its ancestors' rows and its own, gathered; kernels align the
causal triangle at the bottom right. The same by PyTorch's scaled_dot_product_attention, a call per segment, runs anywhere.

What is gathered and widened for the kernel is made again in backward: another copy of q, k and v is not kept.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from vico.errors import UserError
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend, AttentionMask
from vico.model.attention.reference import attend_plain
from vico.model.attention.segment_layout import VarlenLayout, varlen_layout
from vico.model.batch import Segment
from vico.model.ops import triton_ops


class Kernel(Protocol):
    """Attention of each segment's queries [T, H, d'] to its own keys [K, H, d'], causal at the bottom right."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(out, what backward wants to be kept)."""
        ...

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class PackedAttention:
    """`attend` by a kernel; remembers the layout of the micro-batch under way, which every layer asks for.

    `forward` and `backward` are for who writes a gradient out (block.py); a call is for autograd.
    """

    def __init__(self, kernel: Kernel, layout: VarlenLayout | None = None) -> None:
        """`layout`: of whatever is mask, for who has made it (graphs.py)."""
        self.kernel, self._given = kernel, layout
        self._made_for: tuple[Segment, ...] | None = None
        self._layout: VarlenLayout | None = None

    def __call__(
        self,
        q_QHd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        mask: AttentionMask,
    ) -> Tensor:
        if (
            mask.queries is not None
        ):  # one layer of many: asking for all rows costs less than a layout of its own
            rows = mask.queries.to(q_QHd.device, non_blocking=True)
            q_THd = k_THd.new_zeros(k_THd.shape).index_copy(0, rows, q_QHd)
            return self(
                q_THd, k_THd, v_THd, gate2_H, AttentionMask(mask.segments, ())
            ).index_select(0, rows)
        out: Tensor = _PackedAttention.apply(
            q_QHd, k_THd, v_THd, gate2_H, self, self.varlen_layout(mask, q_QHd)
        )
        return out

    def varlen_layout(self, mask: AttentionMask, like: Tensor) -> VarlenLayout:
        """On the device and in the type of `like`; ready for `backward` where autograd is on."""
        if self._given is not None:
            return self._given
        made, gradient = self._layout, torch.is_grad_enabled()
        if (
            made is None
            or self._made_for is not mask.segments
            or (gradient and made.sharing_SK is None)
        ):
            made = varlen_layout(mask.segments, like.device, like.dtype, gradient)
            self._made_for, self._layout = mask.segments, made
        return made

    def forward(
        self,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        layout: VarlenLayout,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(out [T, H, d], what `backward` wants to be kept besides the inputs)."""
        width = q_THd.shape[-1]
        # The scale is that of the real head width, not of the widened one.
        out, kept = self.kernel.forward(
            *_kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout), layout, width**-0.5
        )
        return out[..., :width], kept

    def backward(
        self,
        g_THd: Tensor,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        kept: tuple[Tensor, ...],
        layout: VarlenLayout,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k, v and gate2. Rows that several segments see get one sum in fp32, in a fixed order."""
        width = q_THd.shape[-1]
        q, k, v = _kernel_inputs(q_THd, k_THd, v_THd, gate2_H, layout)
        dq, dk, dv = self.kernel.backward(
            F.pad(g_THd, (0, q.shape[-1] - width)), q, k, v, kept, layout, width**-0.5
        )
        del q, k, v  # widened tensors, in the worst moment of a step's memory
        gate2_gradient = None
        if gate2_H is not None:
            # hi and lo are parts of one number: each row's score moves with hi alone, of which lo is but the rounding.
            gate2_gradient = (dq[..., width].float() * layout.after_video_T[:, None]).sum(dim=0) * (
                math.sqrt(width) / _unit(width)
            )
        return (
            dq[..., :width],
            _by_row(dk, layout, width),
            _by_row(dv, layout, width),
            gate2_gradient,
        )


class _PackedAttention(Function):
    """Keeps q, k, v and the kernel's own; what is gathered and widened is made again."""

    @staticmethod
    def forward(
        ctx: Any,
        q_THd: Tensor,
        k_THd: Tensor,
        v_THd: Tensor,
        gate2_H: Tensor | None,
        attend: PackedAttention,
        layout: VarlenLayout,
    ) -> Tensor:
        out, kept = attend.forward(q_THd, k_THd, v_THd, gate2_H, layout)
        ctx.save_for_backward(q_THd, k_THd, v_THd, gate2_H, *kept)
        ctx.attend, ctx.layout = attend, layout
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q_THd, k_THd, v_THd, gate2_H, *kept = ctx.saved_tensors
        return (
            *ctx.attend.backward(
                gradients[0], q_THd, k_THd, v_THd, gate2_H, tuple(kept), ctx.layout
            ),
            None,
            None,
        )


def _kernel_inputs(
    q_THd: Tensor, k_THd: Tensor, v_THd: Tensor, gate2_H: Tensor | None, layout: VarlenLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """q [T, H, d'], k and v [K, H, d'], as the kernels want them."""
    rows = layout.key_rows_K
    if gate2_H is None:
        return q_THd, k_THd.index_select(0, rows), v_THd.index_select(0, rows)
    unit, extra = (
        _unit(k_THd.shape[-1]),
        2 + -(k_THd.shape[-1] + 2) % 8,
    )  # CUDA's kernels want head widths that are multiples of 8
    widen = triton_ops.widen if triton_ops.serve_heads(q_THd) else _widened
    return widen(
        q_THd, k_THd, v_THd, gate2_H, layout.after_video_T, layout.is_video_T, rows, unit, extra
    )


def _unit(width: int) -> float:
    """A power of two near sqrt(d)."""
    return 2.0 ** round(math.log2(math.sqrt(width)))


def _widened(
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
    """q and k widened so that q'.k' = q.k + sqrt(d) gate2 where a row behind the video meets a video key; v by zeros.

    With c the unit, q gets [hi, lo] = gate2 sqrt(d) / c in two parts of the arithmetic's precision (together about 16 bits in
    bf16) and k gets [c, c].
    """
    num_rows, num_heads, width = k_THd.shape
    x_H = gate2_H.float() * (math.sqrt(width) / unit)
    hi_H = x_H.to(q_THd.dtype)
    lo_H = (x_H - hi_H.float()).to(q_THd.dtype)
    q_extra_HE = torch.cat(
        [hi_H[:, None], lo_H[:, None], q_THd.new_zeros(num_heads, extra - 2)], dim=1
    )
    q_extra_THE = after_T[:, None, None] * q_extra_HE
    k_extra_E = k_THd.new_zeros(extra)
    k_extra_E[:2] = unit
    k_extra_THE = (video_T.to(k_THd.dtype)[:, None, None] * k_extra_E).expand(
        num_rows, num_heads, extra
    )
    wide_q, wide_k = (
        torch.cat([q_THd, q_extra_THE], dim=-1),
        torch.cat([k_THd, k_extra_THE], dim=-1),
    )
    return wide_q, wide_k.index_select(0, rows_K), F.pad(v_THd, (0, extra)).index_select(0, rows_K)


def _by_row(gradient_KHd: Tensor, layout: VarlenLayout, width: int) -> Tensor:
    """[T, H, width]: of each row, the sum over the places where it stands among the keys."""
    out_THd = gradient_KHd[..., :width].index_select(0, layout.own_keys_T)
    if layout.sharing_SK is not None and len(layout.sharing_SK):
        # As a product with zeros and ones: half precision is summed in fp32, and always in the same order.
        sums_SHd = (layout.sharing_SK @ gradient_KHd.flatten(1)).unflatten(
            1, gradient_KHd.shape[1:]
        )
        out_THd.index_copy_(0, layout.shared_rows_S, sums_SHd[..., :width])
    return out_THd


class Differentiated:
    """A kernel with a gradient of its own, for which its forward runs again: half a percent of a step, and nothing is kept."""

    def __init__(
        self, function: Callable[[Tensor, Tensor, Tensor, VarlenLayout, float], Tensor]
    ) -> None:
        self._function = function

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return self._function(q, k, v, layout, scale), ()

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = self._function(inputs[0], inputs[1], inputs[2], layout, scale)
        dq, dk, dv = torch.autograd.grad(out, inputs, gradient)
        return dq, dk, dv


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """A call of scaled_dot_product_attention per segment: slow on a GPU (it waits for the device), right everywhere."""
    outs = []
    starts = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.cu_seqlens_k)
    pieces = zip(
        *(x.split(at.diff().tolist()) for x, at in zip((q, k, v), starts, strict=True)), strict=True
    )
    for q_s, k_s, v_s in pieces:
        mask = torch.ones(len(q_s), len(k_s), dtype=torch.bool, device=q.device).tril_(
            len(k_s) - len(q_s)
        )
        q_1Hrd, k_1Hrd, v_1Hrd = (x.transpose(0, 1).unsqueeze(0) for x in (q_s, k_s, v_s))
        outs.append(
            F.scaled_dot_product_attention(q_1Hrd, k_1Hrd, v_1Hrd, attn_mask=mask, scale=scale)[
                0
            ].transpose(0, 1)
        )
    return torch.cat(outs)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """The flash-attn package (extra `flash`)."""
    from flash_attn import flash_attn_varlen_func

    lengths = (layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k)
    out: Tensor = flash_attn_varlen_func(q, k, v, *lengths, softmax_scale=scale, causal=True)
    return out


class Varlen:
    """PyTorch's own FlashAttention-2 for packed sequences (CUDA).

    By the operators below torch.nn.attention.varlen.varlen_attn (torch 2.13): that one hides its log-sum-exp from a gradient
    that is written out, and takes 0.1 ms of the host's time per call. Their schemas are the same from torch 2.11 on.
    """

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        lengths = (
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
        )
        out, log_sum_exp, state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *lengths, 0.0, True, False, scale=scale
        )
        return out, (out, log_sum_exp, state, unused)

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        kept: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lengths = (
            layout.cu_seqlens_q,
            layout.cu_seqlens_k,
            layout.max_seqlen_q,
            layout.max_seqlen_k,
        )
        out, log_sum_exp, state, unused = kept
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            gradient, q, k, v, out, log_sum_exp, *lengths, 0.0, True, state, unused, scale=scale
        )
        return dq, dk, dv


KERNELS: dict[str, Kernel] = {
    "sdpa": Differentiated(sdpa),
    "varlen": Varlen(),
    "flash_attn": Differentiated(flash_attn),
}


def choose(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Attend, str]:
    """(the function that attends, what it is and why) for `--attention` NAME. Raises UserError for one that cannot run here."""
    half, cuda = dtype in (torch.bfloat16, torch.float16), device.type == "cuda"
    fused = cuda and half and torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "auto":
        name = "varlen" if fused else "sdpa" if cuda else "blocks"
        why = {
            "varlen": "half precision on this GPU",
            "sdpa": "packed kernels want half precision on a recent GPU",
            "blocks": "a CPU",
        }[name]
    else:
        why = "--attention says so"
    if name in ("varlen", "flash_attn") and not fused:
        raise UserError(
            f"--attention {name}: needs a GPU of compute capability 8.0 or newer and --precision bf16 or fp16"
        )
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "--attention flash_attn: the package is not installed; pip install '.[flash]', or leave --attention out"
        )
    if name == "blocks" and cuda:
        raise UserError("--attention blocks: is for CPUs; leave --attention out")
    attend: Attend = {"plain": attend_plain, "blocks": attend_blocks}.get(name) or PackedAttention(
        KERNELS[name]
    )
    return attend, f"attention {name} ({why})"
