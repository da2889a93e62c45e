"""From questions to the micro-batches of a step, or of an evaluation, for one rank.

Which questions a step takes, and what is random about them, are functions of (seed, epoch, step): there is no state to
save but a counter, and the ranks only divide the work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import Dataset

from vico.data.features import Features
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts, crop_candidates
from vico.data.types import Question, TokenSequence
from vico.errors import UserError
from vico.model.batch import PackedBatch

EVALUATION_TOKENS = 2048  # prompts of about this many tokens are scored in one forward, whatever the flags and the ranks


@dataclass(frozen=True, slots=True)
class Step:
    """A rank's share of one optimizer step, or the error that preparing it met.

    `dummy` has no targets: a rank with fewer micro-batches than another runs it instead, since under ZeRO-3 every rank
    must run as many forwards.
    """

    micro_batches: tuple[PackedBatch, ...]
    dummy: PackedBatch | None
    target_counts: torch.Tensor  # int64 [tasks] of this rank
    num_real_tokens: int
    names: tuple[str, ...] = ()  # of its questions, "video/qid", for messages
    error: UserError | None = None

    def pin_memory(self) -> "Step":
        pinned = tuple(b.pin_memory() for b in self.micro_batches)
        return replace(self, micro_batches=pinned, dummy=self.dummy and self.dummy.pin_memory())


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some questions of an evaluation with all their options, scored in one forward."""

    questions: tuple[
        int, ...
    ]  # places in the list of questions, one per group of sequences; empty: a dummy
    batch: PackedBatch | None
    error: UserError | None = None

    def pin_memory(self) -> "Chunk":
        return Chunk(self.questions, self.batch and self.batch.pin_memory(), self.error)


Triple = tuple[Question, TokenSequence, int]  # with the place of its task


class _Builder:
    """What training and evaluation share: clips are sampled once per micro-batch, sequences refer to them."""

    def __init__(
        self,
        questions: Sequence[Question],
        features: Features,
        prompts: Prompts,
        num_slots: int,
        share: bool = True,
    ) -> None:
        self.questions, self._features, self._prompts = questions, features, prompts
        self._num_slots, self._share = num_slots, share

    def _pack(self, sequences: Sequence[Triple]) -> PackedBatch:
        """One micro-batch."""
        clips: dict[tuple[str, tuple[int, int] | None], int] = {}
        examples = [
            Example(s, clips.setdefault((q.video, q.feature_rows), len(clips)), task)
            for q, s, task in sequences
        ]
        features_VFC = torch.stack(
            [self._features.sample(video, rows, self._num_slots) for video, rows in clips]
        )
        if not features_VFC.isfinite().all():
            bad = next(
                video
                for (video, _), f in zip(clips, features_VFC, strict=True)
                if not f.isfinite().all()
            )
            raise UserError(
                f"{self._features.path}: the features of video '{bad}' hold NaN or infinite values; extract them again"
            )
        return pack(examples, features_VFC, self._share)

    def _sequence(self, task: str, question: Question, answer: int) -> TokenSequence:
        return self._prompts.question_sequence(task, self._prompts.fit(question, task), answer)


class TrainingSteps(_Builder, Dataset[Step]):
    """Item (epoch, step): this rank's micro-batches of that step.

    A step takes the next batch_size * accum_iter * ranks questions of the epoch's order; the last one of an epoch takes
    what is left. A question brings one sequence per task. Ranks get questions of about equal length in all; micro-batches
    hold `micro_batch_size` questions, or as many as fit `max_tokens`.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        captions: dict[str, str],
        features: Features,
        prompts: Prompts,
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
    ) -> None:
        super().__init__(questions, features, prompts, num_slots, share)
        self._captions, self._tasks, self._seed, self._shuffle, self._crop = (
            captions,
            tasks,
            seed,
            shuffle,
            crop,
        )
        self._micro_batch_size, self._accumulation, self._max_tokens = (
            micro_batch_size,
            accumulation,
            max_tokens,
        )
        self._rank, self._world_size = rank, world_size
        self.questions_per_step = micro_batch_size * accumulation * world_size
        self.steps_per_epoch = -(-len(questions) // self.questions_per_step)

    def order(self, epoch: int) -> np.ndarray:
        """Places of the questions in the order in which the epoch takes them."""
        if not self._shuffle:
            return np.arange(len(self.questions))
        return np.random.default_rng([self._seed, epoch]).permutation(len(self.questions))

    def __getitem__(self, item: tuple[int, int]) -> Step:
        epoch, step = item
        places = self.order(epoch)[step * self.questions_per_step :][
            : self.questions_per_step
        ].tolist()
        nothing = torch.zeros(len(self._tasks), dtype=torch.int64)
        try:
            part = 2 if self._crop else 1  # a crop begins anywhere
            mine = greedy_balance(
                [self._characters(place, part) for place in places], self._world_size
            )[self._rank]
            sequences = [self._sequences(self.questions[places[i]], epoch) for i in mine]
            batches = tuple(
                self._pack([triple for i in group for triple in sequences[i]])
                for group in self._groups(sequences)
            )
            dummy = None
            if self._world_size > 1:
                question = self.questions[places[0]]
                dummy = self._pack(
                    [
                        (
                            question,
                            self._sequence("vqa", question, _answer(question)),
                            len(self._tasks),
                        )
                    ]
                )
        except UserError as error:  # a value, not an exception: the loader would wrap it, and the ranks must agree on it first
            return Step((), None, nothing, 0, error=error)
        counts = sum(
            (torch.bincount(b.target_tasks, minlength=len(self._tasks)) for b in batches),
            start=nothing,
        )
        names = tuple(f"{q.video}/{q.qid}" for q in (self.questions[places[i]] for i in mine))
        return Step(batches, dummy, counts, sum(b.num_real_tokens for b in batches), names)

    def longest(self) -> tuple[PackedBatch, int]:
        """(the largest micro-batch that a step can bring, or nearly: of long questions, captions whole; how many they are)."""
        by_characters = sorted(
            range(len(self.questions)), key=lambda place: -self._characters(place, 1)
        )
        most = self._micro_batch_size * (1 if self._max_tokens is None else self._accumulation)
        # More than are taken: characters only guess tokens. A budget is filled best by some that are cropped, as in a step.
        epochs = (None,) if self._max_tokens is None else (None, 0, 1)
        found = [
            self._sequences(self.questions[place], epoch)
            for place in by_characters[: max(most, 32)]
            for epoch in epochs
        ]
        chosen = best_fill([_tokens(triples) for triples in found], most, self._max_tokens)
        return self._pack([triple for i in chosen for triple in found[i]]), len(chosen)

    def _characters(self, place: int, part: int) -> int:
        """How long a question's sequences are with one `part`-th of the caption: about, but before anything is encoded."""
        question = self.questions[place]
        return question_characters(question) + len(self._captions.get(question.video, "")) // part

    def _groups(self, sequences: list[list[Triple]]) -> list[list[int]]:
        """Which questions go into which micro-batch."""
        tokens = [_tokens(triples) for triples in sequences]
        if self._max_tokens is None:
            return (
                greedy_balance(tokens, -(-len(tokens) // self._micro_batch_size)) if tokens else []
            )
        groups: list[list[int]] = []
        sizes: list[int] = []
        for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
            fitting = next(
                (g for g, size in enumerate(sizes) if size + tokens[i] <= self._max_tokens), None
            )
            if fitting is None:
                groups.append([i])
                sizes.append(tokens[i])
            else:
                groups[fitting].append(i)
                sizes[fitting] += tokens[i]
        return groups

    def _sequences(self, question: Question, epoch: int | None) -> list[Triple]:
        """One per task; captions as the epoch crops them, or whole."""
        return [
            (question, self._task_sequence(task, question, epoch), t)
            for t, task in enumerate(self._tasks)
        ]

    def _task_sequence(self, task: str, question: Question, epoch: int | None) -> TokenSequence:
        if task != "cap":
            return self._sequence(task, question, _answer(question))
        caption = self._captions[question.video]
        if self._crop and epoch is not None:
            candidates = crop_candidates(caption)
            caption = caption[
                candidates[
                    np.random.default_rng([self._seed, epoch, question.index]).integers(
                        len(candidates)
                    )
                ] :
            ]
        return self._prompts.caption(caption)


def _tokens(triples: Sequence[Triple]) -> int:
    return sum(len(sequence.tokens) for _, sequence, _ in triples)


def best_fill(sizes: Sequence[int], most: int, budget: int | None) -> list[int]:
    """Places of at most `most` of `sizes`, whose sum is the largest that the budget allows; of one alone where each is too large."""
    by_size = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    if budget is None:
        return by_size[:most]
    sums: dict[int, tuple[int, ...]] = {0: ()}
    for i in by_size:
        sums |= {
            s + sizes[i]: (*of, i)
            for s, of in sums.items()
            if s + sizes[i] <= budget and len(of) < most and s + sizes[i] not in sums
        }
    return list(sums[max(sums)] if sizes[by_size[0]] <= budget else by_size[:1])


def greedy_balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Places of `sizes` dealt to bins, the longest first onto the lightest bin that has room; counts differ by at most one."""
    room = -(-len(sizes) // num_bins)
    full_bins = (
        len(sizes) - (room - 1) * num_bins
    )  # so many may hold `room`; the others hold one less
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for place in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        at_room = sum(len(b) == room for b in bins)
        open_bins = [
            b for b in range(num_bins) if len(bins[b]) < (room if at_room < full_bins else room - 1)
        ]
        lightest = min(open_bins, key=lambda b: (loads[b], b))
        bins[lightest].append(place)
        loads[lightest] += sizes[place]
    return [sorted(b) for b in bins]


def question_characters(question: Question) -> int:
    return len(question.question) + sum(map(len, question.options)) + len(question.dialogue)


def _answer(question: Question) -> int:
    assert question.answer is not None, "readers give every training question an answer"
    return question.answer


class EvaluationChunks(_Builder, Dataset[Chunk]):
    """Item i: the i-th chunk of this rank. Chunks are the same for any number of ranks, and so are the scores, bit for bit."""

    def __init__(
        self,
        questions: Sequence[Question],
        features: Features,
        prompts: Prompts,
        *,
        num_slots: int,
        rank: int,
        world_size: int,
        share: bool = True,
    ) -> None:
        super().__init__(questions, features, prompts, num_slots, share)
        chunks = self._divide()
        per_rank = -(
            -len(chunks) // world_size
        )  # every rank runs as many forwards: under ZeRO-3 they are collective
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
                size += 32 + question_characters(question) // 4
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

    def _options(self, question: Question) -> list[TokenSequence]:
        fitted = self._prompts.fit(question, "vqa")
        return [self._prompts.vqa(fitted, answer) for answer in range(len(question.options))]
