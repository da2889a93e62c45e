"""The variants that are compared: the plain baseline, and ViCo's packed stream, whole or in part.

Each trains and scores the same work from the same weights, so that losses, gradients and scores
can be compared.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from benchmarks.baseline.plain import PlainViCo
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN, NUM_OPTIONS
from benchmarks.measure.time_split import PACKING
from benchmarks.measure.workload import ScoringWork, TrainingWork
from vico.data.evaluation_batches import EVALUATION_TOKENS
from vico.data.packing import Example, pack
from vico.data.types import TokenSequence
from vico.model.batch import PackedBatch
from vico.model.vico import ViCo
from vico.train.step import sums_by_task

CAPTION_WEIGHT = 0.5
# Questions that the baseline scores per forward: the published batch.
PLAIN_QUESTIONS = 8


class Variant(Protocol):
    """A way of computing training steps and scores."""

    name: str

    @property
    def model(self) -> nn.Module: ...

    def train(self, work: TrainingWork) -> list[float]:
        """Forward and backward of one micro-batch. Adds to the model's gradients.

        Returns the loss of each task.
        """
        ...

    def score(self, work: ScoringWork) -> Tensor:
        """[questions, options]; the lowest score is the prediction."""
        ...


class Plain:
    """The published way. `longest` pads to the longest sequence of the batch, not to the limit."""

    def __init__(
        self, model: PlainViCo, device: torch.device, longest: bool = False, name: str = "plain"
    ) -> None:
        self.model, self._device, self.longest, self.name = model, device, longest, name

    def width(self, sequences: Sequence[TokenSequence], limit: int) -> int:
        """The length that the sequences are padded to."""
        return max(len(s.tokens) for s in sequences) if self.longest else limit

    def train(self, work: TrainingWork) -> list[float]:
        features = work.features_VFC.to(self._device)
        losses = []
        for sequences, limit in ((work.vqa, MAX_SEQ_LEN), (work.cap, MAX_CAP_LEN)):
            if sequences:
                loss = self.model.loss(sequences, features, self.width(sequences, limit))
            else:
                loss = torch.zeros((), device=self._device)
            losses.append(loss)
        (losses[0] + CAPTION_WEIGHT * losses[1]).backward()
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def score(self, work: ScoringWork) -> Tensor:
        features = work.features_VFC.to(self._device)[list(work.clips)]
        scores = []
        for first in range(0, len(work.questions), PLAIN_QUESTIONS):
            batch = slice(first, first + PLAIN_QUESTIONS)
            questions = work.questions[batch]
            options = [option for question in questions for option in question]
            width = self.width(options, MAX_SEQ_LEN)
            scores.append(self.model.scores(questions, features[batch], width))
        return torch.cat(scores).cpu()


class Packed:
    """ViCo's packed stream. With `share` off, sequences do not share their common prefixes."""

    def __init__(
        self,
        model: ViCo,
        device: torch.device,
        share: bool = True,
        name: str = "fast",
        score_tokens: int = EVALUATION_TOKENS,
    ) -> None:
        self.model, self._device, self.share, self.name = model, device, share, name
        self._score_tokens = score_tokens

    def train(self, work: TrainingWork) -> list[float]:
        return self.train_batch(training_batch(work, self.share))

    def train_batch(self, batch: PackedBatch) -> list[float]:
        # Counted on the host, as a training run does: on the device it would wait for the device.
        # A batch of one task counts 1 for the other, whose loss is 0.
        counts = torch.bincount(batch.target_tasks, minlength=2).clamp(min=1)
        counts = counts.to(self._device, torch.float32, non_blocking=True)
        batch = batch.to(self._device)
        means = sums_by_task(self.model(batch), batch, 2).float() / counts
        (means[0] + CAPTION_WEIGHT * means[1]).backward()
        losses: list[float] = means.tolist()
        return losses

    def score(self, work: ScoringWork) -> Tensor:
        return self.score_batches(scoring_batches(work, self.share, self._score_tokens))

    @torch.no_grad()
    def score_batches(self, batches: Sequence[PackedBatch]) -> Tensor:
        """[questions, options]. Waits for the device only after all batches are launched."""
        losses = [self.model(batch.to(self._device)) for batch in batches]
        scores = []
        for batch, target_losses in zip(batches, losses, strict=True):
            sums = torch.bincount(batch.target_sequences, target_losses.double().cpu())
            scores.append(sums / torch.bincount(batch.target_sequences))
        return torch.cat(scores).view(-1, NUM_OPTIONS)


def training_batch(work: TrainingWork, share: bool = True) -> PackedBatch:
    """The packed stream of a micro-batch, on the host, as a data worker makes it."""
    examples = []
    for task, sequences in enumerate((work.vqa, work.cap)):
        examples += [Example(sequence, clip, task) for clip, sequence in enumerate(sequences)]
    return _pack(examples, work.features_VFC, share)


def scoring_batches(
    work: ScoringWork, share: bool = True, score_tokens: int = EVALUATION_TOKENS
) -> list[PackedBatch]:
    """Packed streams of whole questions, on the host.

    A batch ends with the question whose prompt makes the sum of the prompts reach `score_tokens`.
    """
    batches, examples, num_tokens = [], list[Example](), 0
    for options, clip in zip(work.questions, work.clips, strict=True):
        examples += [Example(option, clip, 0) for option in options]
        num_tokens += len(options[0].tokens)
        if num_tokens >= score_tokens:
            batches.append(_pack(examples, work.features_VFC, share))
            examples, num_tokens = [], 0
    if examples:
        batches.append(_pack(examples, work.features_VFC, share))
    return batches


def _pack(examples: list[Example], features_VFC: Tensor, share: bool) -> PackedBatch:
    with record_function(PACKING):
        return pack(examples, features_VFC, share)
