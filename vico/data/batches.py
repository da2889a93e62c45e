"""From questions to the micro-batches of a step, or of an evaluation, for one rank.

Which questions a step takes, and what is random about them, are functions of (seed, epoch, step): there is no state to
save but a counter, and the ranks only divide the work.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vico.data.features import Features
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts, crop_candidates
from vico.errors import UserError
from vico.records import PackedBatch, Question, Sequence

EVALUATION_TOKENS = 2048  # prompts of about this many tokens are scored in one forward, whatever the flags and the ranks


@dataclass(frozen=True, slots=True)
class Step:
    """A rank's share of one optimizer step; every rank has as many micro-batches. Or the error that preparing it met."""

    micro_batches: tuple[PackedBatch, ...]
    target_counts: torch.Tensor  # int64 [tasks] of this rank
    num_real_tokens: int
    error: UserError | None = None

    def pin_memory(self) -> "Step":
        return Step(tuple(b.pin_memory() for b in self.micro_batches), self.target_counts, self.num_real_tokens, self.error)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some questions of an evaluation with all their options, scored in one forward."""

    questions: tuple[int, ...]  # places in the list of questions, one per group of sequences; empty: a dummy
    batch: PackedBatch | None
    error: UserError | None = None

    def pin_memory(self) -> "Chunk":
        return Chunk(self.questions, self.batch and self.batch.pin_memory(), self.error)


class _Builder:
    """What training and evaluation share: clips are sampled once per micro-batch, sequences refer to them."""

    def __init__(self, questions: Items[Question], features: Features, prompts: Prompts, num_slots: int, share: bool = True) -> None:
        self.questions, self._features, self._prompts = questions, features, prompts
        self._num_slots, self._share = num_slots, share

    def _pack(self, sequences: list[tuple[Question, Sequence, int]]) -> PackedBatch:
        """One micro-batch from (question, sequence, task) triples."""
        clips: dict[tuple[str, tuple[int, int] | None], int] = {}
        examples = [Example(s, clips.setdefault((q.video, q.feature_rows), len(clips)), task) for q, s, task in sequences]
        features_VFC = torch.stack([self._features.sample(video, rows, self._num_slots) for video, rows in clips])
        if not features_VFC.isfinite().all():
            bad = next(video for (video, _), f in zip(clips, features_VFC, strict=True) if not f.isfinite().all())
            raise UserError(f"{self._features.path}: the features of video '{bad}' hold NaN or infinite values; extract them again")
        return pack(examples, features_VFC, self._share)

    def _sequence(self, task: str, question: Question, answer: int) -> Sequence:
        return self._prompts.question_sequence(task, self._prompts.fit(question, task), answer)


class TrainingSteps(_Builder, Dataset[Step]):
    """Item (epoch, step): this rank's micro-batches of that step.

    A step takes the next batch_size * accum_iter * ranks questions of the epoch's order; the last one of an epoch takes
    what is left. A question brings one sequence per task.
    """

    def __init__(
        self, questions: Items[Question], captions: dict[str, str], features: Features, prompts: Prompts, *, num_slots: int,
        tasks: tuple[str, ...], micro_batch_size: int, accumulation: int, rank: int, world_size: int, seed: int, shuffle: bool, crop: bool,
        share: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(questions, features, prompts, num_slots, share)
        self._captions, self._tasks, self._seed, self._shuffle, self._crop = captions, tasks, seed, shuffle, crop
        self._micro_batch_size, self._rank, self._world_size = micro_batch_size, rank, world_size
        self.questions_per_step = micro_batch_size * accumulation * world_size
        self.steps_per_epoch = -(-len(questions) // self.questions_per_step)

    def order(self, epoch: int) -> np.ndarray:
        """Places of the questions in the order in which the epoch takes them."""
        if not self._shuffle:
            return np.arange(len(self.questions))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.questions))

    def __getitem__(self, item: tuple[int, int]) -> Step:
        epoch, step = item
        places = self.order(epoch)[step * self.questions_per_step :][: self.questions_per_step]
        num_micro = -(-len(places) // (self._micro_batch_size * self._world_size))
        mine = np.array_split(places[self._rank :: self._world_size], num_micro)
        try:
            batches = tuple(self._micro_batch(part, epoch, dummy=places[0]) for part in mine)
        except UserError as error:  # a value, not an exception: the loader would wrap it, and the ranks must agree on it first
            return Step((), torch.zeros(len(self._tasks), dtype=torch.int64), 0, error)
        counts = sum(torch.bincount(b.target_tasks, minlength=len(self._tasks))[: len(self._tasks)] for b in batches)
        tokens = sum(b.num_real_tokens for b, part in zip(batches, mine, strict=True) if len(part))
        assert isinstance(counts, torch.Tensor)
        return Step(batches, counts, tokens)

    def _micro_batch(self, places: np.ndarray, epoch: int, dummy: int) -> PackedBatch:
        """The sequences of these questions; where the short last step left none, one whose targets belong to no task."""
        if not len(places):
            question = self.questions[dummy]
            return self._pack([(question, self._sequence("vqa", question, _answer(question)), len(self._tasks))])
        chosen = [self.questions[i] for i in places]
        return self._pack([(q, self._task_sequence(task, q, epoch), t) for t, task in enumerate(self._tasks) for q in chosen])

    def _task_sequence(self, task: str, question: Question, epoch: int) -> Sequence:
        if task != "cap":
            return self._sequence(task, question, _answer(question))
        caption = self._captions[question.video]
        if self._crop:
            candidates = crop_candidates(caption)
            caption = caption[candidates[np.random.default_rng([self._seed, epoch, question.index]).integers(len(candidates))] :]
        return self._prompts.caption(caption)


def _answer(question: Question) -> int:
    assert question.answer is not None, "readers give every training question an answer"
    return question.answer


class EvaluationChunks(_Builder, Dataset[Chunk]):
    """Item i: the i-th chunk of this rank. Chunks are the same for any number of ranks, and so are the scores, bit for bit."""

    def __init__(
        self, questions: Items[Question], features: Features, prompts: Prompts, *, num_slots: int, rank: int, world_size: int, share: bool = True
    ) -> None:  # fmt: skip
        super().__init__(questions, features, prompts, num_slots, share)
        chunks = self._divide()
        per_rank = -(-len(chunks) // world_size)  # every rank runs as many forwards: under ZeRO-3 they are collective
        self._mine = [*chunks[rank::world_size], *([[]] * per_rank)][:per_rank]

    def _divide(self) -> list[list[int]]:
        """Places of the questions, those of one video together, cut where a chunk's prompts reach EVALUATION_TOKENS."""
        by_video: dict[tuple[str, tuple[int, int] | None], list[int]] = {}
        for place, question in enumerate(self.questions):
            by_video.setdefault((question.video, question.feature_rows), []).append(place)
        chunks: list[list[int]] = []
        size = EVALUATION_TOKENS
        for places in by_video.values():
            for place in places:
                if size >= EVALUATION_TOKENS:
                    chunks.append([])
                    size = 0
                chunks[-1].append(place)
                question = self.questions[place]
                # A guess will do: a chunk's size is no promise, and encoding everything twice would take longer.
                size += 32 + (len(question.question) + sum(map(len, question.options)) + len(question.dialogue)) // 4
        return chunks

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, item: int) -> Chunk:
        places = self._mine[item]
        try:
            chosen = [self.questions[i] for i in places or [0]]
            batch = self._pack([(q, s, 0) for q in chosen for s in self._options(q)])
        except UserError as error:
            return Chunk((), None, error)
        return Chunk(tuple(places), batch)

    def _options(self, question: Question) -> list[Sequence]:
        fitted = self._prompts.fit(question, "vqa")
        return [self._prompts.vqa(fitted, answer) for answer in range(len(question.options))]


def loader(dataset: TrainingSteps | EvaluationChunks, items: Any, num_workers: int, pin: bool) -> DataLoader[Any]:
    """The dataset's `items` in this order, prepared ahead by `num_workers` processes."""
    ahead = 4 if num_workers else None
    return DataLoader(dataset, sampler=items, batch_size=None, num_workers=num_workers, pin_memory=pin, prefetch_factor=ahead)


def count_shortened(questions: Items[Question], prompts: Prompts, tasks: Items[str]) -> int:
    """Questions whose texts must be shortened to fit; raises UserError for one that cannot."""
    asked = [task for task in tasks if task != "cap"]
    return sum(any(prompts.fit(q, task) is not q for task in asked) for q in questions)
