"""The oracle: a plain reference of METHOD.md, sections 1, 3 and 4. It shares no code with vico/.

One sequence at a time, explicit [H, S, S] scores, all logits, every option a full sequence.
Computes in fp32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor as Tokenizer
from torch import Tensor

from reference.oracle_sequences import (
    VIDEO_SLOT,
    OracleSequence,
    Question,
    caption_sequence,
    qav_sequence,
    vaq_sequence,
    vqa_sequence,
)

FEATURE_DIM = 768
# params.json, and the frozen weights under Meta's names.
Model = tuple[dict[str, Any], dict[str, Tensor]]
# Under the names of a checkpoint (METHOD.md, section 1).
Trainables = dict[str, Tensor]


@dataclass
class Hyper:
    """The flags that change the numbers. `lr` is absolute. `adapter_layer` None: all layers."""

    max_feats: int = 10
    adapter_len: int = 10
    adapter_layer: int | None = None
    bias: float = 3.0
    tau: float = 100.0
    cap: float = 0.5
    vaq: bool = False
    qav: bool = False
    max_seq_len: int = 512
    max_cap_len: int = 384
    lr: float = 1e-3
    min_lr: float = 0.0
    warmup_epochs: float = 40
    epochs: float = 400
    weight_decay: float = 0.05


@dataclass
class StepReport:
    """One optimizer step. `losses` and `targets` are per task.

    `grad_norm` is the L2 norm over all trainables.
    """

    losses: dict[str, float]
    targets: dict[str, int]
    total: float
    grad_norm: float
    lr: float


def frames(features: Tensor, n_feats: int) -> Tensor:
    """[T, 768] -> [F, 768]: rows (j*T)//F of a longer video, zero rows after a shorter one."""
    n_rows = features.shape[0]
    if n_rows > n_feats:
        return features[[(j * n_rows) // n_feats for j in range(n_feats)]]
    return torch.cat([features, features.new_zeros(n_feats - n_rows, features.shape[1])])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight."""
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotary(x: Tensor) -> Tensor:
    """Rotate the pairs (x[2i], x[2i+1]) of [H, S, d] by position * 10000^(-2i/d)."""
    _, length, width = x.shape
    freqs = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * freqs[None, :]
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attention(
    model: Model,
    trainables: Trainables,
    layer: int,
    x: Tensor,
    prompts: Tensor | None,
    video_bias: Tensor,
) -> Tensor:
    """The formula of section 1 for x [S, D].

    `prompts` [A, D] is None in a layer without adapter. `video_bias` [S, S] is 1 where gate2 acts.
    """
    name = f"layers.{layer}.attention"
    (params, weights), (length, _) = model, x.shape
    n_heads = params["n_heads"]

    def heads(tokens: Tensor, matrix: str) -> Tensor:
        projected = tokens @ weights[f"{name}.{matrix}.weight"].T
        return projected.view(tokens.shape[0], n_heads, -1).transpose(0, 1)

    q, k, v = rotary(heads(x, "wq")), rotary(heads(x, "wk")), heads(x, "wv")
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scale * q @ k.transpose(1, 2)
    if prompts is not None:
        scores = scores + trainables[f"{name}.gate2"].view(n_heads, 1, 1) * video_bias
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    out = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
    if prompts is not None:
        prompt_scores = scale * q @ heads(prompts, "wk").transpose(1, 2)
        adapter = prompt_scores.softmax(-1) @ heads(prompts, "wv")
        out = out + trainables[f"{name}.gate1"].view(n_heads, 1, 1).tanh() * adapter
    return out.transpose(0, 1).reshape(length, -1) @ weights[f"{name}.wo.weight"].T


def trunk(
    model: Model, trainables: Trainables, sequence: OracleSequence, video: Tensor, hyper: Hyper
) -> Tensor:
    """All L layers over one sequence with `video` [F, 768] in its slots: [S, D], normalised."""
    params, w = model
    eps, n_layers, n_prompts = params["norm_eps"], params["n_layers"], hyper.adapter_len
    first_adapted = n_layers - trainables["adapter_query.weight"].shape[0] // n_prompts
    slots = video @ trainables["visual_proj.weight"].T + trainables["temporal_emb.weight"]
    start, end = sequence.video_start, sequence.video_start + slots.shape[0]
    slot_places = [i for i, token in enumerate(sequence.ids) if token == VIDEO_SLOT]
    assert slot_places == list(range(start, end))
    embed = w["tok_embeddings.weight"]
    x = torch.cat([embed[sequence.ids[:start]], slots, embed[sequence.ids[end:]]])
    position = torch.arange(len(sequence.ids))
    after_video, is_slot = position >= end, (position >= start) & (position < end)
    video_bias = (after_video[:, None] & is_slot[None, :]).to(x.dtype)
    if sequence.task == "qav":
        video_bias = torch.zeros_like(video_bias)
    for n in range(n_layers):
        prompts = None
        if n >= first_adapted:
            row = (n - first_adapted) * n_prompts
            prompts = trainables["adapter_query.weight"][row : row + n_prompts]
        normed = rms_norm(x, w[f"layers.{n}.attention_norm.weight"], eps)
        x = x + attention(model, trainables, n, normed, prompts, video_bias)
        normed = rms_norm(x, w[f"layers.{n}.ffn_norm.weight"], eps)
        w1, w2, w3 = (w[f"layers.{n}.feed_forward.{m}.weight"] for m in ("w1", "w2", "w3"))
        x = x + (F.silu(normed @ w1.T) * (normed @ w3.T)) @ w2.T
    return rms_norm(x, w["norm.weight"], eps)


def init_trainables(
    params: dict[str, Any],
    hyper: Hyper,
    seed: int = 0,
    random_gates: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Trainables:
    """Section 1's table, in the published order. `random_gates` makes every gate matter."""
    gen = torch.Generator().manual_seed(seed)
    dim, n_heads, n_layers = params["dim"], params["n_heads"], params["n_layers"]
    n_adapted = hyper.adapter_layer or n_layers
    assert 0 < n_adapted <= n_layers
    query = torch.randn(n_adapted * hyper.adapter_len, dim, generator=gen)
    uniform = torch.rand(dim, FEATURE_DIM, generator=gen) * 2 - 1
    out = {
        "adapter_query.weight": query,
        "visual_proj.weight": uniform / math.sqrt(FEATURE_DIM),
        "temporal_emb.weight": torch.randn(hyper.max_feats, dim, generator=gen),
    }
    for n in range(n_layers - n_adapted, n_layers):
        noise = torch.randn(2, 1, n_heads, 1, 1, generator=gen) * float(random_gates)
        out[f"layers.{n}.attention.gate1"] = noise[0]
        out[f"layers.{n}.attention.gate2"] = noise[1] - hyper.bias
    return {key: value.to(dtype).requires_grad_() for key, value in out.items()}


def target_losses(
    model: Model, trainables: Trainables, sequence: OracleSequence, features: Tensor, hyper: Hyper
) -> Tensor:
    """The cross-entropy of every target of one sequence, in the order of `sequence.targets`."""
    max_length = hyper.max_cap_len if sequence.task == "caption" else hyper.max_seq_len
    assert len(sequence.ids) <= max_length, "the oracle does not shorten"
    weights = model[1]
    video = frames(features.to(weights["norm.weight"].dtype), hyper.max_feats)
    hidden = trunk(model, trainables, sequence, video, hyper)
    if sequence.task == "qav":
        logits = hidden @ (video @ trainables["visual_proj.weight"].T).T / hyper.tau
        wanted = [t - sequence.video_start for t in sequence.targets]
    else:
        logits = hidden @ weights["output.weight"].T
        wanted = [sequence.ids[t] for t in sequence.targets]
    rows = [t - 1 for t in sequence.targets]
    wanted_ids = torch.tensor(wanted, dtype=torch.long)
    return F.cross_entropy(logits[rows], wanted_ids, reduction="none")


@torch.no_grad()
def score_options(
    model: Model, tokenizer: Tokenizer, trainables: Trainables, item: Question, hyper: Hyper
) -> list[float]:
    """The mean cross-entropy of each option's targets (section 4); the lowest wins."""
    scores = []
    for n in range(len(item.options)):
        sequence = vqa_sequence(tokenizer, item, hyper.max_feats, n)
        losses = target_losses(model, trainables, sequence, item.features, hyper)
        scores.append(losses.mean().item())
    return scores


def sequences_of(tokenizer: Tokenizer, item: Question, hyper: Hyper) -> list[OracleSequence]:
    """A question's sequences in a step: VQA, its caption unless `cap` is 0, VAQ and QAV if set."""
    n_feats = hyper.max_feats
    sequences = [vqa_sequence(tokenizer, item, n_feats)]
    if hyper.cap != 0:
        sequences.append(caption_sequence(tokenizer, item, n_feats, hyper.max_cap_len))
    if hyper.vaq:
        sequences.append(vaq_sequence(tokenizer, item, n_feats))
    if hyper.qav:
        sequences.append(qav_sequence(tokenizer, item, n_feats))
    return sequences


def step_losses(
    model: Model,
    tokenizer: Tokenizer,
    trainables: Trainables,
    items: Sequence[Question],
    hyper: Hyper,
) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """(total, mean per task over all targets of the step, number of targets per task).

    The mean is 0 where a task has no target.
    """
    parts: dict[str, list[Tensor]] = {}
    for item in items:
        for sequence in sequences_of(tokenizer, item, hyper):
            losses = target_losses(model, trainables, sequence, item.features, hyper)
            parts.setdefault(sequence.task, []).append(losses)
    flat = {task: torch.cat(losses) for task, losses in parts.items()}
    means = {task: x.mean() if len(x) else x.sum() for task, x in flat.items()}
    weighted = [mean * (hyper.cap if task == "caption" else 1.0) for task, mean in means.items()]
    return torch.stack(weighted).sum(), means, {task: len(x) for task, x in flat.items()}


def lr_at(epoch: float, hyper: Hyper) -> float:
    """Linear warm-up from 0, then half a cosine to min_lr, at a fractional epoch."""
    if epoch < hyper.warmup_epochs:
        return hyper.lr * epoch / hyper.warmup_epochs
    done = (epoch - hyper.warmup_epochs) / max(hyper.epochs - hyper.warmup_epochs, 1e-12)
    return hyper.min_lr + (hyper.lr - hyper.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(trainables: Trainables, hyper: Hyper) -> torch.optim.AdamW:
    """AdamW of section 3; the learning rate is set before every step."""
    return torch.optim.AdamW(
        trainables.values(),
        lr=0.0,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=hyper.weight_decay,
        foreach=False,
    )


def train_steps(
    model: Model,
    tokenizer: Tokenizer,
    trainables: Trainables,
    steps: Sequence[Sequence[Question]],
    hyper: Hyper,
    steps_per_epoch: int,
    steps_done: int = 0,
    optimizer: torch.optim.AdamW | None = None,
) -> list[StepReport]:
    """One optimizer step for each list of questions, changing `trainables` in place."""
    optimizer = optimizer or make_optimizer(trainables, hyper)
    reports = []
    for n, items in enumerate(steps):
        lr = lr_at((steps_done + n) / steps_per_epoch, hyper)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        total, losses, counts = step_losses(model, tokenizer, trainables, items, hyper)
        total.backward()
        gradients = [value.grad for value in trainables.values() if value.grad is not None]
        squares = [gradient.double().pow(2).sum().item() for gradient in gradients]
        norm = math.sqrt(sum(squares))
        optimizer.step()
        numbers = {task: loss.item() for task, loss in losses.items()}
        reports.append(StepReport(numbers, counts, total.item(), norm, lr))
    return reports
