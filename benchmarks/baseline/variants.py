"""The ways of computing that are compared: the plain baseline, and ViCo's packed stream with and without its parts.

Each trains and scores the same work from the same weights, so that losses, gradients and scores can be held against each other.
"""

import copy
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.baseline.plain import PlainViCo
from benchmarks.measure.workload import NUM_OPTIONS, ScoringWork, TrainingWork
from vico.data.packing import Example, pack
from vico.data.types import TokenSequence
from vico.model.batch import PackedBatch
from vico.model.config import LlamaConfig
from vico.model.llama import FrozenLinear
from vico.model.vico import ViCo
from vico.train.step import sums_by_task

CAPTION_WEIGHT = 0.5
MAX_SEQ_LEN, MAX_CAP_LEN = 160, 384
PLAIN_QUESTIONS = 8  # questions that the plain baseline scores per forward, the published batch
GAINS = {
    "wq": 1.4,
    "wk": 1.4,
    "wo": 2.0,
}  # of random weights: attention sharp enough to matter, not so sharp that rounding grows
SCORE_TOKENS = (
    2048  # prompts of about this many tokens per packed scoring forward, as vico evaluates
)
# The published LLaMA's dimensions, and a toy that shows that everything runs.
MODELS = {
    "7B": LlamaConfig(4096, 32, 32, 32000),
    "13B": LlamaConfig(5120, 40, 40, 32000),
    "33B": LlamaConfig(6656, 60, 52, 32000),
    "65B": LlamaConfig(8192, 80, 64, 32000),
    "toy": LlamaConfig(128, 2, 2, 600, multiple_of=32),
}


class Variant(Protocol):
    name: str

    @property
    def model(self) -> nn.Module: ...

    def train(self, work: TrainingWork) -> list[float]:
        """Forward and backward of one micro-batch; the gradients add up in the model. Returns the loss per task."""
        ...

    def score(self, work: ScoringWork) -> Tensor:
        """[questions, options]; the lowest is the prediction."""
        ...


class Plain:
    """The published way; `longest` pads to the longest sequence of the batch instead of the limit."""

    def __init__(
        self, model: PlainViCo, device: torch.device, longest: bool = False, name: str = "plain"
    ) -> None:
        self.model, self._device, self.longest, self.name = model, device, longest, name

    def width(self, sequences: Sequence[TokenSequence], limit: int) -> int:
        return max(len(s.tokens) for s in sequences) if self.longest else limit

    def train(self, work: TrainingWork) -> list[float]:
        features = work.features_VFC.to(self._device)
        none = torch.zeros((), device=self._device)
        losses = [
            self.model.loss(sequences, features, self.width(sequences, limit))
            if sequences
            else none
            for sequences, limit in ((work.vqa, MAX_SEQ_LEN), (work.cap, MAX_CAP_LEN))
        ]
        (losses[0] + CAPTION_WEIGHT * losses[1]).backward()
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def score(self, work: ScoringWork) -> Tensor:
        features = work.features_VFC.to(self._device)[list(work.clips)]
        scores = []
        for first in range(0, len(work.questions), PLAIN_QUESTIONS):
            questions = work.questions[first : first + PLAIN_QUESTIONS]
            width = self.width([s for question in questions for s in question], MAX_SEQ_LEN)
            scores.append(
                self.model.scores(questions, features[first : first + PLAIN_QUESTIONS], width)
            )
        return torch.cat(scores).cpu()


class Packed:
    """ViCo; `share` off packs every sequence on its own."""

    def __init__(
        self,
        model: ViCo,
        device: torch.device,
        share: bool = True,
        name: str = "fast",
        score_tokens: int = SCORE_TOKENS,
    ) -> None:
        self.model, self._device, self.share, self.name = model, device, share, name
        self._score_tokens = score_tokens

    def train(self, work: TrainingWork) -> list[float]:
        return self.train_batch(training_batch(work, self.share))

    def train_batch(self, batch: PackedBatch) -> list[float]:
        # Counted on the host, as a run does; a work of one task alone has a loss of 0 for the other.
        counts = (
            torch.bincount(batch.target_tasks, minlength=2)
            .clamp(min=1)
            .to(self._device, torch.float32, non_blocking=True)
        )
        batch = batch.to(self._device)
        means = sums_by_task(self.model(batch), batch, 2).float() / counts
        (means[0] + CAPTION_WEIGHT * means[1]).backward()
        losses: list[float] = means.tolist()
        return losses

    def score(self, work: ScoringWork) -> Tensor:
        return self.score_batches(scoring_batches(work, self.share, self._score_tokens))

    @torch.no_grad()
    def score_batches(self, batches: Sequence[PackedBatch]) -> Tensor:
        """[questions, options]; waits for the device once, at the end."""
        losses = [self.model(batch.to(self._device)) for batch in batches]
        scores = []
        for batch, found in zip(batches, losses, strict=True):
            scores.append(
                torch.bincount(batch.target_sequences, found.double().cpu())
                / torch.bincount(batch.target_sequences)
            )
        return torch.cat(scores).view(-1, NUM_OPTIONS)


def training_batch(work: TrainingWork, share: bool = True) -> PackedBatch:
    """On the host, as a data worker makes it."""
    examples = [
        Example(s, clip, task)
        for task, sequences in enumerate((work.vqa, work.cap))
        for clip, s in enumerate(sequences)
    ]
    return _pack(examples, work.features_VFC, share)


def scoring_batches(
    work: ScoringWork, share: bool = True, score_tokens: int = SCORE_TOKENS
) -> list[PackedBatch]:
    """Whole questions, cut where the prompts of a batch reach `score_tokens`; on the host."""
    batches, examples, size = [], list[Example](), 0
    for question, clip in zip(work.questions, work.clips, strict=True):
        examples += [Example(s, clip, 0) for s in question]
        size += len(question[0].tokens)
        if size >= score_tokens:
            batches.append(_pack(examples, work.features_VFC, share))
            examples, size = [], 0
    return [*batches, _pack(examples, work.features_VFC, share)] if examples else batches


def _pack(examples: list[Example], features_VFC: Tensor, share: bool) -> PackedBatch:
    with record_function("host: packing"):
        return pack(examples, features_VFC, share)


def random_value(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Of one parameter, fp32 on the generator's device; every gate random and far from 0."""
    normal = torch.randn(shape, generator=generator, device=generator.device)
    if "norm" in name:
        return normal.mul_(0.1).add_(1)
    if "gate" in name or name in ("adapter_query.weight", "temporal_emb.weight"):
        return normal
    if (
        name == "tok_embeddings.weight"
    ):  # small beside what attention adds: predictions then depend on the question
        return normal.mul_(0.1)
    return normal.mul_(GAINS.get(name.split(".")[-2], 1.0) / shape[1] ** 0.5)


def random_weights(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Values for every parameter of `model` by name, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_value(name, parameter.shape, generator)
        for name, parameter in sorted(model.named_parameters())
    }


def fill(model: nn.Module, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])


def make_plain(
    shape: LlamaConfig, dtype: torch.dtype, adapter_len: int = 10, num_slots: int = 10
) -> PlainViCo:
    return PlainViCo(shape, adapter_len, num_slots, dtype)


def make_fast(
    shape: LlamaConfig, dtype: torch.dtype, adapter_len: int = 10, num_slots: int = 10
) -> ViCo:
    return ViCo(shape, shape.n_layers, adapter_len, num_slots, 100.0, dtype)


def make_pair(shape: LlamaConfig) -> tuple[PlainViCo, ViCo]:
    """Both models with the same fp32 weights, on the CPU."""
    plain, fast = make_plain(shape, torch.float32), make_fast(shape, torch.float32)
    values = random_weights(plain)
    fill(plain, values)
    fill(fast, values)
    return plain, fast


class _VicoProduct(FrozenLinear):
    """ViCo's product where the baseline has torch's; rows of all sequences as one matrix."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def with_vico_products(model: PlainViCo) -> PlainViCo:
    """A baseline with the same parameters and ViCo's frozen products: what of a ratio is the library's and the saved input's."""
    found = copy.deepcopy(model)
    for name, module in list(found.named_modules()):
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            owner, _, leaf = name.rpartition(".")
            new = _VicoProduct(module.in_features, module.out_features, module.weight.dtype)
            new.weight = nn.Parameter(module.weight, requires_grad=False)
            setattr(found.get_submodule(owner), leaf, new)
    return found


def make_shared_pair(
    shape: LlamaConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> tuple[PlainViCo, ViCo]:
    """Both models on `device` with the very same random parameters, made there and held once; frozen ones of `dtype`."""
    with device:
        plain = make_plain(shape, dtype)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(plain.named_parameters()):
            parameter.copy_(random_value(name, parameter.shape, generator))
    with torch.device("meta"):
        fast = make_fast(shape, dtype)
    for name, parameter in plain.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(fast.get_submodule(owner), leaf, parameter)
    return plain, fast


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The trainables' gradients by name; the model's are cleared."""
    gradients = {
        name: p.grad
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return gradients
