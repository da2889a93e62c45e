"""The published way of computing: the baseline that ViCo's speed is measured against.

One padded batch and one forward per task, eager attention with the whole score matrix and an fp32
softmax, all logits, a loss over all positions that ignores the context, and a full sequence for
every answer option. It follows the published code (Meta's LLaMA, LLaMA-Adapter, Flipped-VQA)
operation by operation, in its order and with its views, so that it costs what that code costs. It
computes METHOD section 1, as the packed stream does. It leaves out the key/value caches that the
published code allocates and never uses.

Shape letters: B sequences, S positions, plus those of vico/model/batch.py.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.config import FEATURE_WIDTH, LlamaConfig

IGNORE = -100  # label of a position that is context or padding


def rotary_factors(head_dim: int, length: int, theta: float) -> Tensor:
    """cos + i sin of each position's angles, complex [length, head_dim / 2]."""
    frequencies = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary_emb(x_BSHd: Tensor, factors: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x_BSHd.float().reshape(*x_BSHd.shape[:-1], -1, 2))
    rotated = pairs * factors.view(1, pairs.shape[1], 1, pairs.shape[3])
    return torch.view_as_real(rotated).flatten(3).type_as(x_BSHd)


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        scale = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return (x32 * scale).type_as(x) * self.weight


def linear(num_in: int, num_out: int, dtype: torch.dtype) -> nn.Linear:
    return nn.Linear(num_in, num_out, bias=False, dtype=dtype)


class Attention(nn.Module):
    """Attention with adapter prompts (gate1) and the video gate (gate2)."""

    def __init__(self, config: LlamaConfig, num_slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_slots = config.n_heads, config.head_dim, num_slots
        dim = config.dim
        self.wq, self.wk, self.wv, self.wo = (linear(dim, dim, dtype) for _ in range(4))
        self.gate1 = nn.Parameter(torch.zeros(1, config.n_heads, 1, 1))
        self.gate2 = nn.Parameter(torch.zeros(1, config.n_heads, 1, 1))

    def forward(
        self, x_BSD: Tensor, factors: Tensor, mask: Tensor, prompt_1AD: Tensor, video_start: int
    ) -> Tensor:
        batch_size, length, _ = x_BSD.shape
        num_prompts = prompt_1AD.shape[1]
        heads = (batch_size, length, self.num_heads, self.head_dim)
        q, k, v = (w(x_BSD).view(heads) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rotary_emb(q, factors), apply_rotary_emb(k, factors)
        prompt_heads = (1, num_prompts, self.num_heads, self.head_dim)
        prompt_k = self.wk(prompt_1AD).view(prompt_heads).repeat(batch_size, 1, 1, 1)
        prompt_v = self.wv(prompt_1AD).view(prompt_heads).repeat(batch_size, 1, 1, 1)
        k, v = torch.cat([prompt_k, k], dim=1), torch.cat([prompt_v, v], dim=1)
        mask = torch.cat([torch.zeros(1, 1, length, num_prompts).to(mask), mask], dim=-1)

        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        scores = torch.matmul(q, k.transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores + mask
        to_prompt = F.softmax(scores[..., :num_prompts].float(), dim=-1).type_as(q)
        to_prompt = to_prompt * self.gate1.tanh().type_as(q)
        to_text = scores[..., num_prompts:].clone()
        video_stop = video_start + self.num_slots
        gated = (slice(None), slice(None), slice(video_stop, None), slice(video_start, video_stop))
        to_text[gated] = to_text[gated] + self.gate2.type_as(q)
        to_text = F.softmax(to_text.float(), dim=-1).type_as(q)
        out = torch.matmul(torch.cat([to_prompt, to_text], dim=-1), v)
        projected: Tensor = self.wo(out.transpose(1, 2).contiguous().view(batch_size, length, -1))
        return projected


class FeedForward(nn.Module):
    def __init__(self, config: LlamaConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.w1 = linear(config.dim, config.hidden_dim, dtype)
        self.w2 = linear(config.hidden_dim, config.dim, dtype)
        self.w3 = linear(config.dim, config.hidden_dim, dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(F.silu(self.w1(x)) * self.w3(x))
        return out


class Block(nn.Module):
    def __init__(self, config: LlamaConfig, num_slots: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention = Attention(config, num_slots, dtype)
        self.feed_forward = FeedForward(config, dtype)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, dtype)

    def forward(
        self, x_BSD: Tensor, factors: Tensor, mask: Tensor, prompt_1AD: Tensor, video_start: int
    ) -> Tensor:
        context = (factors, mask, prompt_1AD, video_start)
        h_BSD: Tensor = x_BSD + self.attention(self.attention_norm(x_BSD), *context)
        return h_BSD + self.feed_forward(self.ffn_norm(h_BSD))


class PlainViCo(nn.Module):
    """All layers have adapters. Parameters have the names of ViCo's; the backbone is frozen."""

    def __init__(
        self, config: LlamaConfig, adapter_len: int, num_slots: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        self.adapter_len, self.num_slots = adapter_len, num_slots
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim, dtype=dtype)
        self.layers = nn.ModuleList(Block(config, num_slots, dtype) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, dtype)
        self.output = linear(config.dim, config.vocab_size, dtype)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_("gate" in name)
        self.adapter_query = nn.Embedding(config.n_layers * adapter_len, config.dim)
        self.visual_proj = linear(FEATURE_WIDTH, config.dim, torch.float32)
        self.temporal_emb = nn.Embedding(num_slots, config.dim)

    def logits(self, ids_BS: Tensor, features_BFC: Tensor, video_start: int) -> Tensor:
        """[B, S, V]: every position of every sequence, padding included."""
        config, device, length = self.config, ids_BS.device, ids_BS.shape[1]
        with torch.no_grad():
            h_BSD = self.tok_embeddings(ids_BS)
        factors = rotary_factors(config.head_dim, length, config.rope_theta).to(device)
        mask = torch.full((1, 1, length, length), -math.inf, device=device)
        mask = torch.triu(mask, diagonal=1).type_as(h_BSD)
        prompts_LAD = self.adapter_query.weight.reshape(-1, self.adapter_len, config.dim)
        prompts_L1AD = prompts_LAD.unsqueeze(1).to(self.dtype)
        video_BFD = self.visual_proj(features_BFC) + self.temporal_emb.weight[None]
        video_BFD = video_BFD.to(self.dtype)
        h_BSD = h_BSD.clone()
        h_BSD[:, video_start : video_start + self.num_slots] = video_BFD
        for i, layer in enumerate(self.layers):
            h_BSD = layer(h_BSD, factors, mask, prompts_L1AD[i], video_start)
        out: Tensor = self.output(self.norm(h_BSD))
        return out

    def loss(
        self, sequences: Sequence[TokenSequence], features_BFC: Tensor, max_len: int
    ) -> Tensor:
        """Mean cross-entropy of one task's batch over its targets."""
        ids_BS, labels_BS = pad(sequences, max_len)
        device = features_BFC.device
        logits = self.logits(ids_BS.to(device), features_BFC, common_video_start(sequences))
        logits_NV = logits[:, :-1, :].reshape(-1, self.config.vocab_size).float()
        labels_N = labels_BS[:, 1:].flatten().to(device)
        return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE)

    def scores(
        self, questions: Sequence[Sequence[TokenSequence]], features_BFC: Tensor, max_len: int
    ) -> Tensor:
        """[questions, options]: mean cross-entropy of each option's targets, one row per option."""
        num_options = len(questions[0])
        flat = [sequence for question in questions for sequence in question]
        ids_BS, labels_BS = pad(flat, max_len)
        features = features_BFC.unsqueeze(1).repeat(1, num_options, 1, 1).flatten(0, 1)
        logits = self.logits(ids_BS.to(features.device), features, common_video_start(flat))
        labels = labels_BS[:, 1:].to(logits.device)
        logits_NV = logits[:, :-1, :].reshape(-1, self.config.vocab_size).float()
        losses_N = F.cross_entropy(
            logits_NV, labels.flatten(), ignore_index=IGNORE, reduction="none"
        )
        losses = losses_N.view(labels.shape)
        # Divides by the number of targets. The published code counts the losses that are not
        # exactly zero (METHOD section 6, item 9).
        return (losses.sum(-1) / (labels != IGNORE).sum(-1)).view(len(questions), num_options)


def pad(sequences: Sequence[TokenSequence], max_len: int) -> tuple[Tensor, Tensor]:
    """(ids, labels), int64 [B, max_len].

    Ids are 0 in video slots and padding; labels are IGNORE except at the targets.
    """
    ids = torch.zeros(len(sequences), max_len, dtype=torch.int64)
    labels = torch.full((len(sequences), max_len), IGNORE)
    for i, sequence in enumerate(sequences):
        tokens = torch.tensor(sequence.tokens)
        assert len(tokens) <= max_len, f"a sequence of {len(tokens)} tokens does not fit {max_len}"
        ids[i, : len(tokens)] = tokens.where(tokens != VIDEO_SLOT, 0)
        targets = slice(sequence.targets.start, sequence.targets.stop)
        labels[i, targets] = tokens[targets]
    return ids, labels


def common_video_start(sequences: Sequence[TokenSequence]) -> int:
    """One start for the whole batch, as in the published code.

    This is correct because a task's instruction is always the same.
    """
    (start,) = {sequence.video_start for sequence in sequences}
    return start
