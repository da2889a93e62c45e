"""The implementations of attention that --attention names, and which of them a device gets."""

import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vico.errors import UserError
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend
from vico.model.attention.reference import attend_plain
from vico.model.attention.segment import SegmentAttention
from vico.model.attention.segment_layout import VarlenLayout
from vico.model.attention.varlen import PackedAttention, Qkv, VarlenKernel
from vico.model.ops import triton_ops

AttentionFunction = Callable[[Tensor, Tensor, Tensor, VarlenLayout, float], Tensor]


class AutogradKernel:
    """A kernel from a function that autograd differentiates.

    The function runs again in backward, which takes 0.5 % of a step; nothing is saved.
    """

    can_be_captured = False

    def __init__(self, function: AttentionFunction) -> None:
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
        saved: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> Qkv:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        with torch.enable_grad():
            out = self._function(q, k, v, layout, scale)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), gradient)
        return dq, dk, dv


def sdpa(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """A call of scaled_dot_product_attention per segment.

    Runs anywhere. Slow on a GPU: the host waits for the lengths.
    """
    q_lengths, k_lengths = layout.cu_seqlens_q.diff().tolist(), layout.cu_seqlens_k.diff().tolist()
    segments = zip(q.split(q_lengths), k.split(k_lengths), v.split(k_lengths), strict=True)
    outs = [_sdpa_segment(*inputs, scale) for inputs in segments]
    return torch.cat(outs)


def _sdpa_segment(q_QHd: Tensor, k_KHd: Tensor, v_KHd: Tensor, scale: float) -> Tensor:
    num_rows, num_keys = len(q_QHd), len(k_KHd)
    mask_QK = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q_QHd.device)
    mask_QK = mask_QK.tril_(num_keys - num_rows)
    q_1HQd, k_1HKd, v_1HKd = (x.transpose(0, 1).unsqueeze(0) for x in (q_QHd, k_KHd, v_KHd))
    out_1HQd = F.scaled_dot_product_attention(
        q_1HQd, k_1HKd, v_1HKd, attn_mask=mask_QK, scale=scale
    )
    return out_1HQd[0].transpose(0, 1)


def flash_attn(q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """The flash-attn package (extra `flash`)."""
    from flash_attn import flash_attn_varlen_func  # optional: few machines have it

    out: Tensor = flash_attn_varlen_func(q, k, v, *layout.lengths, softmax_scale=scale, causal=True)
    return out


class TorchVarlenKernel:
    """PyTorch's own FlashAttention-2 for packed sequences (CUDA).

    By the operators below torch.nn.attention.varlen.varlen_attn (torch 2.13): that function hides
    its log-sum-exp from a gradient that is written out, and takes 0.1 ms of the host's time per
    call. The operators' schemas are the same from torch 2.11 on.
    """

    can_be_captured = True

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout, scale: float
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        out, log_sum_exp, rng_state, unused, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *layout.lengths, 0.0, True, False, scale=scale
        )
        return out, (out, log_sum_exp, rng_state, unused)

    def backward(
        self,
        gradient: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        saved: tuple[Tensor, ...],
        layout: VarlenLayout,
        scale: float,
    ) -> Qkv:
        out, log_sum_exp, *state = saved
        forward = (gradient, q, k, v, out, log_sum_exp)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            *forward, *layout.lengths, 0.0, True, *state, scale=scale
        )
        return dq, dk, dv


KERNELS: dict[str, VarlenKernel] = {
    "sdpa": AutogradKernel(sdpa),
    "varlen": TorchVarlenKernel(),
    "flash_attn": AutogradKernel(flash_attn),
}


def choose_attention(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Attend, str]:
    """(the function that attends, what it is and why) for `--attention` NAME.

    Raises UserError for one that cannot run on `device` or in `dtype`.
    """
    is_cuda, is_half = device.type == "cuda", dtype in (torch.bfloat16, torch.float16)
    can_fuse = is_cuda and is_half and torch.cuda.get_device_capability(device) >= (8, 0)
    why = "--attention says so"
    if name == "auto":
        name, why = _automatic(is_cuda, can_fuse)
    if name in ("varlen", "flash_attn") and not can_fuse:
        raise UserError(
            f"--attention {name}: needs a GPU of compute capability 8.0 or newer and "
            "--precision bf16 or fp16"
        )
    if name == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "--attention flash_attn: the package is not installed; pip install '.[flash]', "
            "or leave --attention out"
        )
    if name == "segment" and not triton_ops.can_run_on(device):
        raise UserError(
            "--attention segment: needs Triton and a GPU of compute capability 8.0 or newer; "
            "leave --attention out"
        )
    if name == "blocks" and is_cuda:
        raise UserError("--attention blocks: is for CPUs; leave --attention out")
    others: dict[str, Attend] = {
        "plain": attend_plain,
        "blocks": attend_blocks,
        "segment": SegmentAttention(),
    }
    attend = others[name] if name in others else PackedAttention(KERNELS[name])
    return attend, f"attention {name} ({why})"


def _automatic(is_cuda: bool, can_fuse: bool) -> tuple[str, str]:
    """(name, why)."""
    if can_fuse:
        return "varlen", "half precision on this GPU"
    if is_cuda:
        return "sdpa", "packed kernels want half precision on a recent GPU"
    return "blocks", "a CPU"
