"""What a user would take instead: transformers' LLaMA with PEFT's adapters, on the same samples.

The backbone has the weights under test, the video enters by the same projection, and the adapters
start as PEFT makes them: LoRA's product and AdaptionPrompt's gate are 0. A peer then computes what
ViCo computes with its gates at 0, which `models.gates_at_zero` checks peers against. PEFT has
neither a gate for each head nor a gate on the video, so a peer's losses are not those of plain.
"""

import importlib.util
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baseline.models import ADAPTER_LEN
from benchmarks.baseline.plain import IGNORE, pad
from benchmarks.baseline.variants import CAPTION_WEIGHT
from benchmarks.measure.lengths import ANSWER_TARGETS
from benchmarks.measure.workload import ScoringWork, TrainingWork
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.config import LlamaConfig
from vico.model.ops.autograd import FrozenLinearFunction
from vico.model.vico import ViCo
from vico.model.weights.hf import stored_name, stored_rows

PACKAGES = ("transformers", "peft")
LORA_RANK = 8  # PEFT's default, of the queries and values; about as many trainables as ViCo's
LETTERS = "letters' logits only"
GROUP = 8  # sequences of a forward that are sorted by length


def why_no_peers() -> str:
    """What is missing, or "" where the peers can run."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)}; pip install -e '.[dev]'" if missing else ""


class Row(NamedTuple):
    """One sequence to run, its clip and its task."""

    sequence: TokenSequence
    clip: int
    task: int


@dataclass(frozen=True)
class PeerKind:
    """How a peer computes.

    `layout` of a training step: "longest" pads each task to its longest sequence and computes all
    logits, as transformers' collators and losses do; "sorted" pads groups of sequences of like
    length; "packed" has all sequences in one row. The last two run the head at the targets alone.
    """

    name: str
    adapter: str  # "LoRA" or "AdaptionPrompt"
    layout: str
    attention: str = "sdpa"
    own_products: bool = False  # ViCo's frozen products in place of torch's


class HfModel(nn.Module):
    """transformers' LLaMA with ViCo's frozen weights, PEFT's adapter, and the video's projection.

    Only wq and wk are copies: transformers stores their rows in another order.
    """

    def __init__(self, fast: ViCo, kind: PeerKind) -> None:
        super().__init__()
        llama = _llama(fast, kind)
        self.peft = _with_adapter(llama, kind.adapter, fast.config)
        self.backbone, self.head = llama.model, llama.lm_head
        self.visual_proj = nn.Parameter(fast.visual_proj.weight.detach().clone())
        self.temporal_emb = nn.Parameter(fast.temporal_emb.weight.detach().clone())

    def video(self, features_VFC: Tensor) -> Tensor:
        """[V, F, D]"""
        return F.linear(features_VFC, self.visual_proj) + self.temporal_emb

    def embed(self, ids_BS: Tensor, slots_BS: Tensor, video_NFD: Tensor) -> Tensor:
        """[B, S, D]. `video_NFD`: the frames of the sequences in the order of their slots."""
        x_BSD: Tensor = self.backbone.embed_tokens(ids_BS)
        frames = video_NFD.flatten(0, 1).to(x_BSD.dtype)
        return x_BSD.masked_scatter(slots_BS.unsqueeze(-1), frames)


def _llama(fast: ViCo, kind: PeerKind) -> Any:
    """transformers' model over `fast`'s tensors."""
    # transformers takes seconds to import.
    from transformers import LlamaConfig as HfConfig
    from transformers import LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config: LlamaConfig = fast.config
    settings: dict[str, Any] = {"attn_implementation": kind.attention, "use_cache": False}
    hf_config = HfConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        **settings,
    )
    with torch.device("meta"):
        llama = LlamaForCausalLM(hf_config)
    weights = {name: p for name, p in fast.named_parameters() if not p.requires_grad}
    device = weights["output.weight"].device
    llama.model.rotary_emb = LlamaRotaryEmbedding(hf_config).to(device)
    for name, weight in weights.items():
        value = weight.detach()
        if name.endswith(("wq.weight", "wk.weight")):
            value = stored_rows(value, config.head_dim)
        owner, _, leaf = stored_name(name).rpartition(".")
        setattr(llama.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    if kind.own_products:
        for module in llama.modules():
            if isinstance(module, nn.Linear):
                module.__class__ = _OwnLinear
    return llama


class _OwnLinear(nn.Linear):
    """A frozen product as ViCo computes it: the rows of all sequences are one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = FrozenLinearFunction.apply(x.flatten(0, -2), self.weight)
        return out.unflatten(0, x.shape[:-1])


def _with_adapter(llama: Any, adapter: str, config: LlamaConfig) -> Any:
    import peft

    settings: Any
    if adapter == "LoRA":
        settings = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=LORA_RANK,
            lora_alpha=2 * LORA_RANK,
            target_modules=["q_proj", "v_proj"],
        )
    else:
        settings = peft.AdaptionPromptConfig(
            task_type="CAUSAL_LM", adapter_len=ADAPTER_LEN, adapter_layers=config.n_layers
        )
    with warnings.catch_warnings():
        # PEFT asks transformers by a name of its own past.
        warnings.simplefilter("ignore", FutureWarning)
        return peft.get_peft_model(llama, settings)


@dataclass
class Peer:
    """A variant that is timed beside plain and fast, and checked apart from them."""

    kind: PeerKind
    model: HfModel
    device: torch.device
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.kind.name

    def train(self, work: TrainingWork) -> list[float]:
        """Forward and backward of one micro-batch; the loss of each task."""
        video_VFD = self.model.video(work.features_VFC.to(self.device))
        rows = []
        for task, sequences in enumerate((work.vqa, work.cap)):
            rows += [Row(sequence, clip, task) for clip, sequence in enumerate(sequences)]
        sums = torch.zeros(2, device=self.device)
        for group in self._groups(rows):
            losses_N, tasks_N = self._losses(group, video_VFD)
            sums = sums.index_add(0, tasks_N, losses_N)
        counts = torch.zeros(2)
        for row in rows:
            counts[row.task] += len(row.sequence.targets)
        means = sums / counts.clamp(min=1).to(self.device)
        (means[0] + CAPTION_WEIGHT * means[1]).backward()
        losses: list[float] = means.tolist()
        return losses

    def _groups(self, rows: list[Row]) -> list[list[Row]]:
        if self.kind.layout == "packed":
            return [rows]
        if self.kind.layout == "sorted":
            rows = sorted(rows, key=lambda row: len(row.sequence.tokens))
            return [rows[first : first + GROUP] for first in range(0, len(rows), GROUP)]
        by_task: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            by_task[row.task].append(row)
        return list(by_task.values())

    def _losses(self, rows: Sequence[Row], video_VFD: Tensor) -> tuple[Tensor, Tensor]:
        """(losses [N], tasks [N]) of the targets."""
        tasks = torch.tensor([row.task for row in rows], device=self.device)
        clips = torch.tensor([row.clip for row in rows], device=self.device)
        if self.kind.layout == "packed":
            batch = _packed(rows, self.device)
        else:
            batch = _padded([row.sequence for row in rows], self.device)
        x_BSD = self.model.embed(batch.ids_BS, batch.slots_BS, video_VFD[clips])
        mask = batch.real_BS if self.kind.layout == "longest" else None
        h_BSD = self._hidden(x_BSD, attention_mask=mask, position_ids=batch.positions_BS)
        next_BS = F.pad(batch.labels_BS[:, 1:], (0, 1), value=IGNORE)
        wanted_BS = next_BS != IGNORE
        if self.kind.layout == "longest":
            logits_BSV = self.model.head(h_BSD).float()
            losses = F.cross_entropy(
                logits_BSV.flatten(0, 1), next_BS.flatten(), ignore_index=IGNORE, reduction="none"
            )[wanted_BS.flatten()]
        else:
            logits_NV = self.model.head(h_BSD[wanted_BS]).float()
            losses = F.cross_entropy(logits_NV, next_BS[wanted_BS], reduction="none")
        return losses, tasks[batch.owners_BS[wanted_BS]]

    def _hidden(self, x_BSD: Tensor, **keywords: Any) -> Tensor:
        out: Tensor = self.model.backbone(inputs_embeds=x_BSD, **keywords).last_hidden_state
        return out


class _Batch(NamedTuple):
    ids_BS: Tensor
    labels_BS: Tensor
    slots_BS: Tensor  # where the video is
    real_BS: Tensor  # 0 in padding
    owners_BS: Tensor  # the number of the sequence
    positions_BS: Tensor | None = None


def _padded(sequences: Sequence[TokenSequence], device: torch.device) -> _Batch:
    """One row per sequence, as long as the longest. Without a mask, rows see nothing behind them:
    padding behind a sequence changes nothing in it.
    """
    width = max(len(s.tokens) for s in sequences)
    ids_BS, labels_BS = pad(sequences, width)
    slots_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    real_BS = torch.zeros_like(ids_BS)
    for i, sequence in enumerate(sequences):
        slots_BS[i, : len(sequence.tokens)] = torch.tensor(sequence.tokens) == VIDEO_SLOT
        real_BS[i, : len(sequence.tokens)] = 1
    owners_BS = torch.arange(len(sequences)).unsqueeze(1).expand(ids_BS.shape)
    tensors = [t.to(device) for t in (ids_BS, labels_BS, slots_BS, real_BS, owners_BS)]
    return _Batch(*tensors)


def _packed(rows: Sequence[Row], device: torch.device) -> _Batch:
    """All sequences in one row. Positions that begin again tell transformers where each starts."""
    parts: list[_Batch] = []
    for i, row in enumerate(rows):
        part = _padded([row.sequence], torch.device("cpu"))
        positions = torch.arange(part.ids_BS.shape[1]).unsqueeze(0)
        # A sequence's first token is no target of the one before it.
        part.labels_BS[0, 0] = IGNORE
        parts.append(part._replace(owners_BS=part.owners_BS + i, positions_BS=positions))
    columns = [torch.cat(column, dim=1).to(device) for column in zip(*parts, strict=True)]
    return _Batch(*columns)


Score = Callable[[ScoringWork], Tensor]


@dataclass
class PeerScoring:
    """Three ways to score options with a peer's model, [questions, options]; the lowest wins."""

    model: HfModel
    device: torch.device

    def ways(self) -> dict[str, Score]:
        return {
            "lm-eval's way": self.each_option,
            "cached prompt": self.cached_prompt,
            LETTERS: self.letters,
        }

    @property
    def _cache_word(self) -> str:
        """What this version of transformers calls the cache."""
        names = inspect.signature(self.model.backbone.forward).parameters
        return "cache" if "cache" in names else "past_key_values"

    @torch.no_grad()
    def each_option(self, work: ScoringWork) -> Tensor:
        """As lm-eval: a whole sequence for every option, sorted by length, all logits."""
        options = []
        for number, question in enumerate(work.questions):
            options += [(len(option.tokens), number, option) for option in question]
        order = sorted(range(len(options)), key=lambda i: -options[i][0])
        video_VFD = self.model.video(work.features_VFC.to(self.device))
        scores = torch.empty(len(options))
        size = GROUP * len(work.questions[0])
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            batch = _padded([options[i][2] for i in chosen], self.device)
            clips = [work.clips[options[i][1]] for i in chosen]
            x_BSD = self.model.embed(batch.ids_BS, batch.slots_BS, video_VFD[clips])
            h_BSD = self.model.backbone(
                inputs_embeds=x_BSD, attention_mask=batch.real_BS
            ).last_hidden_state
            log_p = self.model.head(h_BSD).float().log_softmax(-1)[:, :-1]
            next_BS = batch.labels_BS[:, 1:]
            wanted = next_BS != IGNORE
            chosen_p = log_p.gather(-1, next_BS.where(wanted, 0).unsqueeze(-1)).squeeze(-1)
            means = -(chosen_p * wanted).sum(-1) / wanted.sum(-1)
            scores[torch.tensor(chosen)] = means.cpu()
        return scores.view(len(work.questions), -1)

    @torch.no_grad()
    def cached_prompt(self, work: ScoringWork) -> Tensor:
        """A prompt once with its keys and values kept, then the few tokens of all options."""
        video_VFD = self.model.video(work.features_VFC.to(self.device))
        scores = []
        for options, clip in zip(work.questions, work.clips, strict=True):
            prompt, answers_ON = _split(options, self.device)
            x_1SD = self._embed_prompts([prompt], video_VFD[[clip]])
            out = self.model.backbone(inputs_embeds=x_1SD, use_cache=True)
            cache = out.past_key_values
            cache.batch_repeat_interleave(len(options))
            after = self.model.backbone(
                input_ids=answers_ON[:, :-1], **{self._cache_word: cache}, use_cache=True
            ).last_hidden_state
            first = out.last_hidden_state[:, -1:].expand(len(options), -1, -1)
            logits = self.model.head(torch.cat([first, after], dim=1)).float()
            losses = F.cross_entropy(logits.flatten(0, 1), answers_ON.flatten(), reduction="none")
            scores.append(losses.view(answers_ON.shape).mean(-1))
        return torch.stack(scores).cpu()

    @torch.no_grad()
    def letters(self, work: ScoringWork) -> Tensor:
        """The prompt and "(" once; minus the letters' logits. It reads one of four tokens."""
        video_VFD = self.model.video(work.features_VFC.to(self.device))
        scores = torch.empty(len(work.questions), len(work.questions[0]))
        order = sorted(range(len(work.questions)), key=lambda i: len(work.questions[i][0].tokens))
        for first in range(0, len(order), GROUP):
            chosen = order[first : first + GROUP]
            prompts, letters = [], []
            for i in chosen:
                prompt, answers_ON = _split(work.questions[i], torch.device("cpu"))
                prompts.append([*prompt, int(answers_ON[0, 0])])
                letters.append(answers_ON[:, 1])
            x_BSD = self._embed_prompts(prompts, video_VFD[[work.clips[i] for i in chosen]])
            h_BSD = self.model.backbone(inputs_embeds=x_BSD).last_hidden_state
            last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.device)
            h_BD = h_BSD[torch.arange(len(chosen), device=self.device), last]
            logits_BV = self.model.head(h_BD).float().cpu()
            scores[torch.tensor(chosen)] = -logits_BV.gather(1, torch.stack(letters))
        return scores

    def _embed_prompts(self, prompts: Sequence[Sequence[int]], video_NFD: Tensor) -> Tensor:
        """[B, S, D]: prompts padded to the longest."""
        sequences = [TokenSequence("vqa", tuple(p), range(0, 0), 0) for p in prompts]
        batch = _padded(sequences, self.device)
        return self.model.embed(batch.ids_BS, batch.slots_BS, video_NFD)


def _split(
    options: Sequence[TokenSequence], device: torch.device
) -> tuple[tuple[int, ...], Tensor]:
    """(the prompt that all options share, the options' answers [options, answer tokens])."""
    answers = [option.tokens[-ANSWER_TARGETS:] for option in options]
    return options[0].tokens[:-ANSWER_TARGETS], torch.tensor(answers, device=device)
