"""The frozen LLaMA backbone on one page (Meta's layout and names), with the adapter's places in its attention.

A layer that is adapted owns two gates; what flows to it besides the stream is its prompt and who sees whom.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vico.model.attention import Visibility, attend_adapter

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None, Visibility], Tensor]


@dataclass(frozen=True)
class LlamaShape:
    """Dimensions of a backbone, as its params.json states them."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """SwiGLU's width: two thirds of 4 * dim, rounded up to a multiple."""
        return -(-int(2 * (4 * self.dim) / 3) // self.multiple_of) * self.multiple_of


class FrozenLinear(nn.Module):
    """x W^T with a weight that is never trained."""

    def __init__(self, num_in: int, num_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class FrozenEmbedding(nn.Module):
    def __init__(self, num: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num, dim, dtype=dtype), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, then the frozen weight."""

    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype), requires_grad=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD.float(), (x_TD.shape[-1],), eps=self.eps).to(x_TD.dtype) * self.weight


def rotary_angles(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """(cos, sin), each fp32 [T, 1, head_dim / 2], of each row's position."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32) / head_dim)
    angles = positions_T.float()[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs (x0, x1), (x2, x3), ..., in fp32."""
    even, odd = x_THd.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x_THd.dtype)


class Attention(nn.Module):
    """wo(softmax over the visible rows, plus tanh(gate1) times the softmax over the prompt)."""

    def __init__(self, shape: LlamaShape, adapted: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = shape.n_heads
        self.wq = FrozenLinear(shape.dim, shape.dim, dtype)
        self.wk = FrozenLinear(shape.dim, shape.dim, dtype)
        self.wv = FrozenLinear(shape.dim, shape.dim, dtype)
        self.wo = FrozenLinear(shape.dim, shape.dim, dtype)
        if adapted:
            self.gate1 = nn.Parameter(torch.empty(1, shape.n_heads, 1, 1, dtype=torch.float32))
            self.gate2 = nn.Parameter(torch.empty(1, shape.n_heads, 1, 1, dtype=torch.float32))

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, rotary: tuple[Tensor, Tensor], seen: Visibility, attend: Attend) -> Tensor:
        q_THd, k_THd, v_THd = (w(x_TD).unflatten(-1, (self.num_heads, -1)) for w in (self.wq, self.wk, self.wv))
        q_THd, k_THd = rotate(q_THd, *rotary), rotate(k_THd, *rotary)
        if prompt_AD is None:
            return self.wo(attend(q_THd, k_THd, v_THd, None, seen).flatten(-2))
        out_THd = attend(q_THd, k_THd, v_THd, self.gate2.flatten(), seen)
        k_AHd, v_AHd = (w(prompt_AD).unflatten(-1, (self.num_heads, -1)) for w in (self.wk, self.wv))
        gate_H1 = self.gate1.tanh().flatten()[:, None].to(out_THd.dtype)
        return self.wo((out_THd + gate_H1 * attend_adapter(q_THd, k_AHd, v_AHd)).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, shape: LlamaShape, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = FrozenLinear(shape.dim, shape.hidden_dim, dtype)
        self.w2 = FrozenLinear(shape.hidden_dim, shape.dim, dtype)
        self.w3 = FrozenLinear(shape.dim, shape.hidden_dim, dtype)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x_TD)) * self.w3(x_TD))


class Block(nn.Module):
    def __init__(self, shape: LlamaShape, adapted: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(shape, adapted, dtype)
        self.feed_forward = FeedForward(shape, dtype)
        self.attention_norm = RMSNorm(shape.dim, shape.norm_eps, dtype)
        self.ffn_norm = RMSNorm(shape.dim, shape.norm_eps, dtype)

    def forward(self, x_TD: Tensor, prompt_AD: Tensor | None, rotary: tuple[Tensor, Tensor], seen: Visibility, attend: Attend) -> Tensor:
        h_TD = x_TD + self.attention(self.attention_norm(x_TD), prompt_AD, rotary, seen, attend)
        return h_TD + self.feed_forward(self.ffn_norm(h_TD))


class Llama(nn.Module):
    """Embeddings, blocks, final norm and output head; the top `num_adapted` blocks carry gates."""

    def __init__(self, shape: LlamaShape, num_adapted: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.num_adapted = shape, dtype, num_adapted
        self.tok_embeddings = FrozenEmbedding(shape.vocab_size, shape.dim, dtype)
        self.layers = nn.ModuleList(Block(shape, i >= shape.n_layers - num_adapted, dtype) for i in range(shape.n_layers))
        self.norm = RMSNorm(shape.dim, shape.norm_eps, dtype)
        self.output = FrozenLinear(shape.dim, shape.vocab_size, dtype)

    def trunk(self, x_TD: Tensor, prompts_GAD: Tensor, positions_T: Tensor, seen: Visibility, attend: Attend) -> Tensor:
        """Hidden states behind the final norm, [T, D]. All layers run; the lower ones without prompt and gates."""
        rotary = rotary_angles(positions_T, self.shape.head_dim, self.shape.rope_theta)
        num_plain = len(self.layers) - self.num_adapted
        for i, layer in enumerate(self.layers):
            x_TD = layer(x_TD, prompts_GAD[i - num_plain] if i >= num_plain else None, rotary, seen, attend)
        normed: Tensor = self.norm(x_TD)
        return normed
