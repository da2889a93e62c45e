"""The frozen LLaMA backbone on one page (Meta's layout and names), with the adapter's places in its attention.

This is what is computed; block.py has the same block once more as one Function, and graphs.py the blocks as one, for GPUs.

A layer that is adapted owns two gates; what flows to it besides the stream is its prompt and who sees whom.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vico.model import fused_block
from vico.model.attention.masks import Attend, AttentionMask, restrict_queries
from vico.model.config import LlamaConfig, RopeScaling
from vico.model.ops.autograd import (
    AdapterAttention,
    FrozenLinearFunction,
    FrozenRMSNorm,
    FusedLinearCrossEntropy,
    RotaryEmbedding,
    SwiGLU,
)

if TYPE_CHECKING:
    from vico.model.cuda_graphs import GraphedBlocks


def _frozen(*size: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(size, dtype=dtype), requires_grad=False)


class FrozenLinear(nn.Module):
    """x W^T with a weight that is never trained."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(num_out, num_in, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenLinearFunction.apply(x, self.weight)


class LinearModule(Protocol):
    """x W^T: FrozenLinear, or quantized.py's, which makes its weight at every look at it."""

    @property
    def weight(self) -> Tensor: ...

    def __call__(self, x: Tensor) -> Any: ...


Linear = Callable[[int, int, torch.dtype], LinearModule]


class FrozenEmbedding(nn.Module):
    def __init__(self, num: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _frozen(num, dim, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class OutputHead(FrozenLinear):
    """The product with the vocabulary, never whole: straight to the losses of targets."""

    def forward(self, h_RD: Tensor, heads_N: Tensor, ids_N: Tensor) -> Tensor:  # type: ignore[override]
        """Cross-entropy [N], fp32, of token ids_N[n] at row heads_N[n] of h_RD."""
        return FusedLinearCrossEntropy.apply(h_RD, self.weight, heads_N, ids_N)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, then the frozen weight."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _frozen(dim, dtype=dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return FrozenRMSNorm.apply(x_TD, self.weight, self.eps)


def rotary_angles(
    positions_T: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> Tensor:
    """exp(i angle), complex64 [T, 1, head_dim / 2], of each row's position."""
    frequencies = theta ** (
        -torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim
    )
    if scaling is not None:
        frequencies = _stretched(frequencies, scaling)
    angles = positions_T.float()[:, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def _stretched(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Fast frequencies stay, slow ones are divided by the factor, those between are blended by their turns in the old context."""
    turns = scaling.old_context * frequencies / (2 * math.pi)
    kept = ((turns - scaling.low_factor) / (scaling.high_factor - scaling.low_factor)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling.factor)


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer sees besides the stream: rotary of each row, who sees whom, and the function that attends."""

    rotary_T: Tensor
    mask: AttentionMask
    attend: Attend
    query_rows_Q: Tensor | None = None  # mask.queries on the device

    def restrict_queries(self, rows: Tensor) -> "Context":
        """The same where only `rows` (host int64, ascending, pinned where a GPU is: nobody waits for the copy) ask."""
        return Context(
            self.rotary_T,
            restrict_queries(self.mask, rows),
            self.attend,
            rows.to(self.rotary_T.device, non_blocking=True),
        )


class Attention(nn.Module):
    """wo(softmax over the visible rows, plus tanh(gate1) times the softmax over the prompt)."""

    def __init__(
        self, shape: LlamaConfig, adapted: bool, dtype: torch.dtype, linear: Linear
    ) -> None:
        super().__init__()
        self.head_dim, self.group = shape.head_dim, shape.n_heads // shape.kv_heads
        self.wq = linear(shape.dim, shape.dim, dtype)
        self.wk = linear(shape.dim, shape.kv_heads * shape.head_dim, dtype)
        self.wv = linear(shape.dim, shape.kv_heads * shape.head_dim, dtype)
        self.wo = linear(shape.dim, shape.dim, dtype)
        if adapted:
            self.gate1 = nn.Parameter(torch.empty(1, shape.n_heads, 1, 1, dtype=torch.float32))
            self.gate2 = nn.Parameter(torch.empty(1, shape.n_heads, 1, 1, dtype=torch.float32))

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        """[Q, D] for the Q rows that ask: all T, or context.mask.queries."""
        asking = context.query_rows_Q
        # Together, so that their gradients come together and in this order: DeepSpeed sums ranks' gradients in the order they come.
        gates = (self.gate1.flatten(), self.gate2.flatten()) if prompt_AD is not None else None
        x_QD, rotary_Q = (
            (x_TD, context.rotary_T) if asking is None else (x_TD[asking], context.rotary_T[asking])
        )
        q_QHd, k_THd, v_THd = (
            self.heads(w(x)) for w, x in ((self.wq, x_QD), (self.wk, x_TD), (self.wv, x_TD))
        )
        q_QHd, k_THd = (
            RotaryEmbedding.apply(q_QHd, rotary_Q),
            RotaryEmbedding.apply(k_THd, context.rotary_T),
        )
        k_THd, v_THd = self._for_every_head(k_THd), self._for_every_head(v_THd)
        if prompt_AD is None or gates is None:
            return self.wo(context.attend(q_QHd, k_THd, v_THd, None, context.mask).flatten(-2))
        out_QHd = context.attend(q_QHd, k_THd, v_THd, gates[1], context.mask)
        k_AHd, v_AHd = (self._for_every_head(self.heads(w(prompt_AD))) for w in (self.wk, self.wv))
        out_QHd = AdapterAttention.apply(out_QHd, q_QHd, k_AHd, v_AHd, gates[0])
        return self.wo(out_QHd.flatten(-2))

    def heads(self, x_TD: Tensor) -> Tensor:
        return x_TD.unflatten(-1, (-1, self.head_dim))

    def _for_every_head(self, x_TKd: Tensor) -> Tensor:
        """Grouped keys or values, one for each query head; nothing is copied where every head has its own."""
        return x_TKd if self.group == 1 else x_TKd.repeat_interleave(self.group, dim=1)


class FeedForward(nn.Module):
    def __init__(self, shape: LlamaConfig, dtype: torch.dtype, linear: Linear) -> None:
        super().__init__()
        self.w1 = linear(shape.dim, shape.hidden_dim, dtype)
        self.w2 = linear(shape.hidden_dim, shape.dim, dtype)
        self.w3 = linear(shape.dim, shape.hidden_dim, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(SwiGLU.apply(self.w1(x_TD), self.w3(x_TD)))


class Block(nn.Module):
    def __init__(
        self, shape: LlamaConfig, adapted: bool, dtype: torch.dtype, linear: Linear
    ) -> None:
        super().__init__()
        self.attention = Attention(shape, adapted, dtype, linear)
        self.feed_forward = FeedForward(shape, dtype, linear)
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps, dtype)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, dtype)

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        """The rows that ask, [Q, D]; where only some do, the others end here."""
        if (out_TD := fused_block.run(self, x_TD, prompt_AD, context)) is not None:
            return out_TD
        residual = x_TD if context.query_rows_Q is None else x_TD[context.query_rows_Q]
        h_QD = residual + self.attention(self.attention_norm(x_TD), prompt_AD, context)
        return h_QD + self.feed_forward(self.ffn_norm(h_QD))


def _checkpointed(
    layer: nn.Module, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
) -> Tensor:
    """The layer, of which only the input is kept until backward, when it runs again.

    Again means without the hooks of the layer itself: under ZeRO-3 backward has gathered its weights by then, and the hook
    behind a forward would let go of them. To its end: the hooks of modules inside must come in pairs.
    """
    calls = itertools.count()

    def run(x_TD: Tensor, prompt_AD: Tensor | None, context: Context) -> Tensor:
        return (layer if next(calls) == 0 else layer.forward)(x_TD, prompt_AD, context)

    out: Tensor = checkpoint(
        run,
        x_TD,
        prompt_AD,
        context,
        use_reentrant=False,
        preserve_rng_state=False,
        early_stop=False,
    )
    return out


class Llama(nn.Module):
    """Embeddings, blocks, final norm and output head; the top `num_adapted` blocks carry gates."""

    def __init__(
        self,
        shape: LlamaConfig,
        num_adapted: int,
        dtype: torch.dtype,
        linear: Linear = FrozenLinear,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.num_adapted = shape, dtype, num_adapted
        self.num_checkpointed = (
            0  # so many of the lower layers keep only their input, and run again in backward
        )
        self.graphed: GraphedBlocks | None = None  # what runs all layers but the last where it can
        self.tok_embeddings = FrozenEmbedding(shape.vocab_size, shape.dim, dtype)
        self.layers = nn.ModuleList(
            Block(shape, i >= shape.n_layers - num_adapted, dtype, linear)
            for i in range(shape.n_layers)
        )
        self.norm = RMSNorm(shape.dim, shape.norm_eps, dtype)
        self.output = OutputHead(shape.dim, shape.vocab_size, dtype)

    def trunk(
        self, x_TD: Tensor, prompts_GAD: Tensor, context: Context, wanted_R: Tensor
    ) -> Tensor:
        """Hidden states [R, D] behind the final norm, of the rows `wanted_R` (host int64, ascending).

        All layers run, the lower ones without prompt and gates; the last one only where its output is wanted.
        """
        *lower, last = self.layers
        # unbind: one gradient for all; a slice's would be as large as the whole, for each layer.
        prompts: list[Tensor | None] = [None] * (len(self.layers) - self.num_adapted) + [
            *prompts_GAD.unbind(0)
        ]
        if self.graphed is not None and self.graphed.serves(x_TD):
            x_TD = self.graphed(x_TD, prompts[:-1], context)
        else:
            for i, (layer, prompt_AD) in enumerate(zip(lower, prompts[:-1], strict=True)):
                x_TD = self._run(i, layer, x_TD, prompt_AD, context)
        return self.norm(
            self._run(len(lower), last, x_TD, prompts[-1], context.restrict_queries(wanted_R))
        )

    def _run(
        self, place: int, layer: nn.Module, x_TD: Tensor, prompt_AD: Tensor | None, context: Context
    ) -> Tensor:
        twice = place < self.num_checkpointed and torch.is_grad_enabled()
        out: Tensor = (
            _checkpointed(layer, x_TD, prompt_AD, context)
            if twice
            else layer(x_TD, prompt_AD, context)
        )
        return out
