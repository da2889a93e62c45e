"""From questions to the micro-batches of an optimizer step, for one rank.

Which questions a step takes, and every random choice, are functions of (seed, epoch, step). The
only state to save is a counter, and the ranks only divide the work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from vico.data.bin_packing import best_fill, first_fit, greedy_balance
from vico.data.epoch_order import EpochOrder
from vico.data.micro_batches import (
    DatasetInputs,
    MicroBatchBuilder,
    TaskSequence,
    num_tokens,
    question_characters,
)
from vico.data.mixture import DatasetChoice
from vico.data.prompts import crop_candidates
from vico.data.text_windows import KeptTexts
from vico.data.types import Question, TokenSequence
from vico.errors import UserError
from vico.model.batch import PackedBatch

TEXTS = 2  # tells the seed of a window of text from the others
# Questions that `longest` encodes at least: by characters it only guesses which are the longest.
MIN_CANDIDATES = 32


@dataclass(frozen=True, slots=True)
class Step:
    """A rank's share of one optimizer step, or the error that preparing it met.

    `dummy` has no targets. A rank with fewer micro-batches than another runs it instead, because
    under ZeRO-3 every rank must run as many forwards.
    """

    micro_batches: tuple[PackedBatch, ...]
    dummy: PackedBatch | None
    target_counts: torch.Tensor  # int64 [tasks] of this rank
    num_real_tokens: int
    names: tuple[str, ...] = ()  # "video/qid" of its questions, for messages
    error: UserError | None = None

    def pin_memory(self) -> "Step":
        pinned = tuple(batch.pin_memory() for batch in self.micro_batches)
        return replace(self, micro_batches=pinned, dummy=self.dummy and self.dummy.pin_memory())


class TrainingSteps(MicroBatchBuilder, Dataset[Step]):
    """Item (epoch, step): this rank's micro-batches of that step.

    A step takes the next batch_size * accum_iter * ranks questions of the epoch's order, which
    follows from `choices`; the last step of an epoch takes the rest. A question brings one
    sequence per task. The ranks get questions of about equal total length. A micro-batch holds
    `micro_batch_size` questions, or as many as fit `max_tokens`.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        datasets: Mapping[str, DatasetInputs],
        choices: Sequence[DatasetChoice],
        *,
        num_slots: int,
        tasks: tuple[str, ...],
        micro_batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
        shuffle: bool,
        crop: bool,
        max_tokens: int | None = None,
        share: bool = True,
        kept: KeptTexts | None = None,
    ) -> None:
        """`kept`: of the task "keep"."""
        super().__init__(questions, datasets, num_slots, share)
        self._tasks = tasks
        self._micro_batch_size, self._accumulation = micro_batch_size, accumulation
        self._max_tokens = max_tokens
        self._rank, self._world_size = rank, world_size
        self._seed, self._crop, self._kept = seed, crop, kept
        self._order = EpochOrder([q.dataset for q in questions], choices, seed, shuffle)
        self.questions_per_step = micro_batch_size * accumulation * world_size
        self.steps_per_epoch = -(-len(self._order) // self.questions_per_step)

    def order(self, epoch: int) -> np.ndarray:
        """Positions of the questions in the order of the epoch."""
        return self._order.places(epoch)

    def __getitem__(self, item: tuple[int, int]) -> Step:
        epoch, step = item
        first = step * self.questions_per_step
        places = self.order(epoch)[first : first + self.questions_per_step].tolist()
        try:
            return self._step([self.questions[place] for place in places], epoch)
        except UserError as error:
            # A value, not an exception: the loader would wrap it, and the ranks must agree on it
            # first.
            return Step((), None, self._no_targets(), 0, error=error)

    def _step(self, questions: list[Question], epoch: int) -> Step:
        """This rank's share of a step over `questions`, which are those of all ranks."""
        # A crop begins anywhere in the caption, so half of it is left on average.
        caption_share = 2 if self._crop else 1
        characters = [self._characters(question, caption_share) for question in questions]
        own = greedy_balance(characters, self._world_size)[self._rank]
        own_questions = [questions[i] for i in own]
        sequences = [self._sequences(question, epoch) for question in own_questions]
        batches = tuple(self._pack(group) for group in self._micro_batches(sequences))
        dummy = self._dummy(questions[0]) if self._world_size > 1 else None
        target_counts = self._no_targets()
        for batch in batches:
            target_counts += torch.bincount(batch.target_tasks, minlength=len(self._tasks))
        num_real_tokens = sum(batch.num_real_tokens for batch in batches)
        names = tuple(map(self._name, own_questions))
        return Step(batches, dummy, target_counts, num_real_tokens, names)

    def _name(self, question: Question) -> str:
        name = f"{question.video}/{question.qid}"
        return name if len(self._datasets) == 1 else f"{question.dataset}/{name}"

    def _no_targets(self) -> torch.Tensor:
        return torch.zeros(len(self._tasks), dtype=torch.int64)

    def _dummy(self, question: Question) -> PackedBatch:
        """A micro-batch whose targets belong to no task: step.sums_by_task leaves them out."""
        sequence = self._fitted_sequence("vqa", question, _answer(question))
        sequences = [TaskSequence(question, sequence, task=len(self._tasks))]
        if self._kept is not None:  # as many forwards: also of the frozen model
            text = self._text(question, epoch=0)
            sequences.append(TaskSequence(question, text, task=len(self._tasks)))
        return self._pack(sequences)

    def longest(self) -> tuple[PackedBatch, int]:
        """(about the largest micro-batch that a step can have, its number of questions).

        It holds long questions with whole captions. Under a token budget, cropped captions are
        candidates too, because some of them fill the budget better.
        """
        max_questions = self._micro_batch_size
        epochs: tuple[int | None, ...] = (None,)
        if self._max_tokens is not None:
            max_questions *= self._accumulation
            epochs = (None, 0, 1)
        by_characters = sorted(self.questions, key=lambda q: -self._characters(q, 1))
        candidates = []
        for question in by_characters[: max(max_questions, MIN_CANDIDATES)]:
            candidates += [self._sequences(question, epoch) for epoch in epochs]
        sizes = [num_tokens(sequences) for sequences in candidates]
        chosen = best_fill(sizes, max_questions, self._max_tokens)
        return self._pack(_joined(candidates, chosen)), len(chosen)

    def _characters(self, question: Question, caption_share: int) -> int:
        """A guess at the length of a question's sequences, with 1 / `caption_share` of the
        caption.
        """
        caption = self._datasets[question.dataset].captions.get(question.video, "")
        return question_characters(question) + len(caption) // caption_share

    def _micro_batches(self, sequences: list[list[TaskSequence]]) -> list[list[TaskSequence]]:
        """The sequences of each micro-batch. `sequences`: those of each question."""
        if not sequences:
            return []
        sizes = [num_tokens(of_question) for of_question in sequences]
        if self._max_tokens is None:
            num_batches = -(-len(sizes) // self._micro_batch_size)
            groups = greedy_balance(sizes, num_batches)
        else:
            groups = first_fit(sizes, self._max_tokens)
        return [_joined(sequences, group) for group in groups]

    def _sequences(self, question: Question, epoch: int | None) -> list[TaskSequence]:
        """One per task; none for the caption of a video without one.

        Captions are cropped for this epoch; None: they are whole.
        """
        sequences = []
        for column, task in enumerate(self._tasks):
            if task == "cap":
                if question.video not in self._datasets[question.dataset].captions:
                    continue
                sequence = self._caption(question, epoch)
            elif task == "keep":
                sequence = self._text(question, epoch or 0)
            else:
                sequence = self._fitted_sequence(task, question, _answer(question))
            sequences.append(TaskSequence(question, sequence, column))
        return sequences

    def _text(self, question: Question, epoch: int) -> TokenSequence:
        """The window of plain text that the question brings in this epoch."""
        assert self._kept is not None, "the task keep has texts"
        return self._kept.draw(np.random.default_rng([self._seed, epoch, question.index, TEXTS]))

    def _caption(self, question: Question, epoch: int | None) -> TokenSequence:
        inputs = self._datasets[question.dataset]
        caption = inputs.captions[question.video]
        if self._crop and epoch is not None:
            rng = np.random.default_rng([self._seed, epoch, question.index])
            candidates = crop_candidates(caption)
            caption = caption[candidates[rng.integers(len(candidates))] :]
        return inputs.prompts.caption(caption)


def _joined(sequences: list[list[TaskSequence]], chosen: list[int]) -> list[TaskSequence]:
    """The sequences of the chosen questions in one list."""
    joined: list[TaskSequence] = []
    for i in chosen:
        joined += sequences[i]
    return joined


def _answer(question: Question) -> int:
    assert question.answer is not None, "readers give every training question an answer"
    return question.answer
