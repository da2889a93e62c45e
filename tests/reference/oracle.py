"""A deliberately plain reference of the method in METHOD.md, sections 1 to 5: one sequence at a time, explicit [H, S, S] scores,
all logits, every option a full sequence. It shares no code with the package it is held against. Computes in fp32 or float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from sentencepiece import SentencePieceProcessor as Tokenizer
from torch import Tensor

FEATURE_DIM = 768
VIDEO_SLOT = -1
Model = tuple[
    dict[str, Any], dict[str, Tensor]
]  # params.json and the frozen weights under Meta's names
Trainables = dict[str, Tensor]  # under the checkpoint keys of section 1


@dataclass
class Question:
    """One multiple-choice question; `features` is the video's [T, 768], `caption` the text as it is trained on (already cropped)."""

    question: str
    options: list[str]
    answer: int
    features: Tensor = field(repr=False)
    caption: str | None = None
    dialogue: str = ""
    dataset: str = "nextqa"


@dataclass
class OracleSequence:
    """Tokens of one sequence: `targets` are the positions t whose token (QAV: frame) is predicted from the hidden state at t-1."""

    task: str
    ids: list[int]
    targets: list[int]
    video_start: int


@dataclass
class Hyper:
    """The flags that change the numbers. `lr` is absolute; `adapter_layer` None means all layers."""

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
    """What one optimizer step did. `losses` and `targets` are per task; `grad_norm` is the L2 norm over all trainables."""

    losses: dict[str, float]
    targets: dict[str, int]
    total: float
    grad_norm: float
    lr: float


def encode_pieces(tokenizer: Tokenizer, text: str) -> list[int]:
    """`enc`: sentencepiece encode without BOS/EOS."""
    return list(tokenizer.encode(text, add_bos=False, add_eos=False))


def split_pieces(tokenizer: Tokenizer, head: str, rest: str) -> tuple[list[int], int]:
    """enc(head + " " + rest), and how many of its pieces belong to head: the two encoded apart, or offsets where that is not the same."""
    whole, head_ids = encode_pieces(tokenizer, head + " " + rest), encode_pieces(tokenizer, head)
    if head_ids + encode_pieces(tokenizer, rest) == whole:
        return whole, len(head_ids)
    offsets = tokenizer.encode(head + " " + rest, return_type="offset_mapping")["offsets"]
    return whole, sum(end <= len(head) for _, end in offsets)


def question_text(question: str) -> str:
    """q = "Question: {question}\\n"."""
    text = question.capitalize().strip()
    return f"Question: {text if text.endswith('?') else text + '?'}\n"


def letter(index: int) -> str:
    """(A) for 0, (B) for 1, ..."""
    return f"({'ABCDEFGHIJ'[index]})"


def choices_text(options: Sequence[str]) -> str:
    """o + a without its trailing blank: options are taken verbatim, blanks included."""
    return (
        "Choices: \n"
        + "".join(f"{letter(i)} {option}\n" for i, option in enumerate(options))
        + "Answer: The answer is"
    )


def instruction_text(task: str, dataset: str) -> str:
    """The instruction line without its newline; TVQA's always names the dialogue, except in the caption task."""
    if task == "caption":
        return "Instruction: describe the what happens in the video."
    dialogue = "dialogue, " if dataset == "tvqa" else ""
    wording = {
        "vqa": ("answer", "video and question"),
        "vaq": ("question", "video and answer"),
        "qav": ("video", "question and answer"),
    }
    return f"Instruction: Predict the {wording[task][0]} based on the {dialogue}{wording[task][1]}."


def text_sequence(
    tokenizer: Tokenizer,
    task: str,
    item: Question,
    n_feats: int,
    head: str,
    rest: str,
    skip: int = 0,
    cut: int | None = None,
) -> OracleSequence:
    """BOS, enc(instruction), slots, nl, the dialogue (not in captions), enc(head + " " + rest), EOS, cut to `cut`;
    targets are the pieces of rest but the first `skip`, and EOS."""
    nl = encode_pieces(tokenizer, "\n")[-1]
    assert tokenizer.decode([nl]) == "\n", "this tokenizer has no newline token"
    start = [
        tokenizer.bos_id(),
        *encode_pieces(tokenizer, instruction_text(task, item.dataset) + "\nVideo:"),
    ]
    dialogue = (
        encode_pieces(tokenizer, f"Dialogue: {item.dialogue}\n")
        if item.dialogue and task != "caption"
        else []
    )
    pieces, context = split_pieces(tokenizer, head, rest)
    before = start + [VIDEO_SLOT] * n_feats + [nl] + dialogue
    ids = (before + pieces + [tokenizer.eos_id()])[:cut]
    return OracleSequence(
        task, ids, list(range(len(before) + context + skip, len(ids))), len(start)
    )


def vqa_sequence(
    tokenizer: Tokenizer, item: Question, n_feats: int, answer: int | None = None
) -> OracleSequence:
    """VQA row of section 2, with the right answer or with option `answer`; targets are the pieces of "(X)" and EOS."""
    prompt = question_text(item.question) + choices_text(item.options)
    return text_sequence(
        tokenizer, "vqa", item, n_feats, prompt, letter(item.answer if answer is None else answer)
    )


def caption_sequence(
    tokenizer: Tokenizer, item: Question, n_feats: int, max_cap_len: int = 384
) -> OracleSequence:
    """Caption row of section 2: "Description", ":" and 3 caption tokens are context; what does not fit is cut, EOS with it."""
    assert item.caption is not None
    return text_sequence(
        tokenizer,
        "caption",
        item,
        n_feats,
        "Description:",
        f"{item.caption}\n",
        skip=3,
        cut=max_cap_len,
    )


def vaq_sequence(tokenizer: Tokenizer, item: Question, n_feats: int) -> OracleSequence:
    """VAQ row of section 2: targets are everything after "Question:", EOS included."""
    head = f"{choices_text(item.options)} {letter(item.answer)}\nQuestion:"
    return text_sequence(
        tokenizer,
        "vaq",
        item,
        n_feats,
        head,
        question_text(item.question).strip().removeprefix("Question: "),
    )


def qav_sequence(tokenizer: Tokenizer, item: Question, n_feats: int) -> OracleSequence:
    """QAV row of section 2: the targets are the slots; a dialogue stands, encoded apart, after the instruction line."""
    line = instruction_text("qav", item.dataset) + "\n"
    text = (
        f"{question_text(item.question)}{choices_text(item.options)} {letter(item.answer)}\nVideo:"
    )
    parts = [line, f"Dialogue: {item.dialogue}\n", text] if item.dialogue else [line + text]
    head = [
        tokenizer.bos_id(),
        *(piece for part in parts for piece in encode_pieces(tokenizer, part)),
    ]
    slots = list(range(len(head), len(head) + n_feats))
    return OracleSequence(
        "qav", head + [VIDEO_SLOT] * n_feats + [tokenizer.eos_id()], slots, len(head)
    )


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
    cos, sin, even, odd = (
        angle.cos().to(x.dtype),
        angle.sin().to(x.dtype),
        x[..., 0::2],
        x[..., 1::2],
    )
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def attention(
    model: Model,
    trainables: Trainables,
    layer: int,
    x: Tensor,
    prompts: Tensor | None,
    video_bias: Tensor,
) -> Tensor:
    """The formula of section 1 for [S, D]; `prompts` is None in a layer without adapter; `video_bias` [S, S] is 1 where gate2 acts."""
    name = f"layers.{layer}.attention"
    (params, weights), (length, _) = model, x.shape
    n_heads = params["n_heads"]

    def heads(tokens: Tensor, matrix: str) -> Tensor:
        return (
            (tokens @ weights[f"{name}.{matrix}.weight"].T)
            .view(tokens.shape[0], n_heads, -1)
            .transpose(0, 1)
        )

    q, k, v = rotary(heads(x, "wq")), rotary(heads(x, "wk")), heads(x, "wv")
    scale = 1 / math.sqrt(q.shape[-1])
    scores = scale * q @ k.transpose(1, 2)
    if prompts is not None:
        scores = scores + trainables[f"{name}.gate2"].view(n_heads, 1, 1) * video_bias
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    out = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
    if prompts is not None:
        adapter = (scale * q @ heads(prompts, "wk").transpose(1, 2)).softmax(-1) @ heads(
            prompts, "wv"
        )
        out = out + trainables[f"{name}.gate1"].view(n_heads, 1, 1).tanh() * adapter
    return out.transpose(0, 1).reshape(length, -1) @ weights[f"{name}.wo.weight"].T


def trunk(
    model: Model, trainables: Trainables, sequence: OracleSequence, video: Tensor, hyper: Hyper
) -> Tensor:
    """All L layers over one sequence, `video` [F, 768] in its slots: hidden states [S, D] after the final norm."""
    params, w = model
    eps, n_layers, n_prompts = params["norm_eps"], params["n_layers"], hyper.adapter_len
    first_adapted = n_layers - trainables["adapter_query.weight"].shape[0] // n_prompts
    slots = video @ trainables["visual_proj.weight"].T + trainables["temporal_emb.weight"]
    start, end = sequence.video_start, sequence.video_start + slots.shape[0]
    assert [i for i, token in enumerate(sequence.ids) if token == VIDEO_SLOT] == list(
        range(start, end)
    )
    embed = w["tok_embeddings.weight"]
    x = torch.cat([embed[sequence.ids[:start]], slots, embed[sequence.ids[end:]]])
    position = torch.arange(len(sequence.ids))
    after_video, is_slot = position >= end, (position >= start) & (position < end)
    video_bias = (after_video[:, None] & is_slot[None, :]).to(x.dtype) * float(
        sequence.task != "qav"
    )
    for n in range(n_layers):
        row = (n - first_adapted) * n_prompts
        prompts = (
            trainables["adapter_query.weight"][row : row + n_prompts]
            if n >= first_adapted
            else None
        )
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
    """Section 1's table under the checkpoint keys, in the lineage's order; `random_gates` makes every gate visible."""
    gen = torch.Generator().manual_seed(seed)
    dim, n_heads, n_layers = params["dim"], params["n_heads"], params["n_layers"]
    n_adapted = hyper.adapter_layer or n_layers
    assert 0 < n_adapted <= n_layers
    out = {
        "adapter_query.weight": torch.randn(n_adapted * hyper.adapter_len, dim, generator=gen),
        "visual_proj.weight": (torch.rand(dim, FEATURE_DIM, generator=gen) * 2 - 1)
        / math.sqrt(FEATURE_DIM),
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
    assert len(sequence.ids) <= (
        hyper.max_cap_len if sequence.task == "caption" else hyper.max_seq_len
    ), "the oracle does not shorten"
    weights = model[1]
    video = frames(features.to(weights["norm.weight"].dtype), hyper.max_feats)
    hidden = trunk(model, trainables, sequence, video, hyper)
    if sequence.task == "qav":
        logits = hidden @ (video @ trainables["visual_proj.weight"].T).T / hyper.tau
        wanted = [t - sequence.video_start for t in sequence.targets]
    else:
        logits = hidden @ weights["output.weight"].T
        wanted = [sequence.ids[t] for t in sequence.targets]
    return F.cross_entropy(
        logits[[t - 1 for t in sequence.targets]],
        torch.tensor(wanted, dtype=torch.long),
        reduction="none",
    )


@torch.no_grad()
def score_options(
    model: Model, tokenizer: Tokenizer, trainables: Trainables, item: Question, hyper: Hyper
) -> list[float]:
    """Mean cross-entropy of each option's targets, every option a sequence of its own (section 4); the lowest wins."""
    rows = [vqa_sequence(tokenizer, item, hyper.max_feats, n) for n in range(len(item.options))]
    return [
        target_losses(model, trainables, row, item.features, hyper).mean().item() for row in rows
    ]


def sequences_of(tokenizer: Tokenizer, item: Question, hyper: Hyper) -> list[OracleSequence]:
    """The sequences one question brings to a step: VQA, its caption once when `cap` is not 0, VAQ and QAV where asked for."""
    out, n_feats = [vqa_sequence(tokenizer, item, hyper.max_feats)], hyper.max_feats
    out += [caption_sequence(tokenizer, item, n_feats, hyper.max_cap_len)] if hyper.cap != 0 else []
    out += [vaq_sequence(tokenizer, item, n_feats)] if hyper.vaq else []
    out += [qav_sequence(tokenizer, item, n_feats)] if hyper.qav else []
    return out


def step_losses(
    model: Model,
    tokenizer: Tokenizer,
    trainables: Trainables,
    items: Sequence[Question],
    hyper: Hyper,
) -> tuple[Tensor, dict[str, Tensor], dict[str, int]]:
    """Total, mean per task over all target tokens of the step (0 where there is none), and the number of targets per task."""
    each: dict[str, list[Tensor]] = {}
    for item in items:
        for sequence in sequences_of(tokenizer, item, hyper):
            each.setdefault(sequence.task, []).append(
                target_losses(model, trainables, sequence, item.features, hyper)
            )
    flat = {task: torch.cat(parts) for task, parts in each.items()}
    losses = {task: x.mean() if len(x) else x.sum() for task, x in flat.items()}
    total = torch.stack(
        [loss * (hyper.cap if task == "caption" else 1.0) for task, loss in losses.items()]
    ).sum()
    return total, losses, {task: len(x) for task, x in flat.items()}


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
        norm = math.sqrt(
            sum(
                p.grad.double().pow(2).sum().item()
                for p in trainables.values()
                if p.grad is not None
            )
        )
        optimizer.step()
        reports.append(
            StepReport(
                {task: loss.item() for task, loss in losses.items()}, counts, total.item(), norm, lr
            )
        )
    return reports
