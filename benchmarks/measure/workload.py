"""The work of a benchmark: sequences with the lengths and the structure of the real data sets.

Synthetic: lengths from lengths.json, random ids; instructions, video slots, answers and questions
per video as the method makes them. The same seed gives the same work.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure.lengths import (
    ANSWER_TARGETS,
    MAX_CAP_LEN,
    NUM_OPTIONS,
    NUM_SLOTS,
    Lengths,
)
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.config import FEATURE_WIDTH

DESCRIPTION_HEAD = 2  # tokens of "Description:"
CAPTION_CONTEXT = 3  # tokens between the video and the first target of a caption
BOS, EOS, NEWLINE, FIRST_FREE = 1, 2, 13, 20


@dataclass(frozen=True)
class TrainingWork:
    """A micro-batch: question i and caption i belong to clip i. One task may be empty."""

    vqa: tuple[TokenSequence, ...]
    cap: tuple[TokenSequence, ...]
    features_VFC: Tensor

    @property
    def num_real_tokens(self) -> int:
        return sum(len(s.tokens) for s in (*self.vqa, *self.cap))


@dataclass(frozen=True)
class ScoringWork:
    """Questions with one sequence per option; the questions of a video are neighbours."""

    questions: tuple[tuple[TokenSequence, ...], ...]
    clips: tuple[int, ...]  # of each question
    features_VFC: Tensor

    @property
    def num_real_tokens(self) -> int:
        return sum(len(s.tokens) for options in self.questions for s in options)


class Workload(Protocol):
    """Batch `index` is a function of the seed and the index."""

    description: str

    def training(self, index: int, num_questions: int) -> TrainingWork: ...

    def scoring(self, index: int, num_videos: int) -> ScoringWork: ...


def random_features(generator: np.random.Generator, num_videos: int, num_slots: int) -> Tensor:
    """[V, F, C], distributed like CLIP's.

    Their norm is about 10. Most of it is a common mean with one outlier dimension; the frames of a
    video differ little.
    """
    mean = np.random.default_rng(0).standard_normal(FEATURE_WIDTH) * 0.28
    mean[133] = 5.0
    clip = generator.standard_normal((num_videos, 1, FEATURE_WIDTH)) * 0.14
    frame = generator.standard_normal((num_videos, num_slots, FEATURE_WIDTH)) * 0.06
    return torch.from_numpy(mean + clip + frame).float()


class SyntheticWorkload:
    """Random ids in the structure of the method."""

    def __init__(
        self,
        vocab_size: int,
        num_slots: int = NUM_SLOTS,
        seed: int = 0,
        lengths: Lengths | None = None,
    ) -> None:
        self._lengths = lengths or Lengths.load()
        self._vocab_size, self._num_slots, self._seed = vocab_size, num_slots, seed
        constants = np.random.default_rng([seed, 0])
        common = [BOS, *self._ids(constants, self._lengths.common_instruction - 1)]
        self._instructions = {
            "vqa": common + self._ids(constants, self._lengths.vqa_instruction - len(common)),
            "cap": common + self._ids(constants, self._lengths.cap_instruction - len(common)),
        }
        self._question_head = self._ids(constants, self._lengths.question_head)
        self._description_head = self._ids(constants, DESCRIPTION_HEAD)
        distinct = constants.permutation(np.arange(FIRST_FREE, vocab_size)).tolist()
        self._open, self._close = distinct[:2]
        self._letters = distinct[2 : 2 + NUM_OPTIONS]
        self.description = (
            f"synthetic ids, lengths of {self._lengths.source}, "
            f"captions of {self._lengths.caption} tokens"
        )

    @property
    def caption_tokens(self) -> tuple[int, int]:
        """Of the shortest and the longest caption's text, before it is cut."""
        return self._lengths.caption

    def training(self, index: int, num_questions: int) -> TrainingWork:
        generator = np.random.default_rng([self._seed, 1, index])
        vqa = []
        for _ in range(num_questions):
            options = self._question(generator)
            vqa.append(options[generator.integers(NUM_OPTIONS)])
        captions = tuple(self._caption(generator) for _ in range(num_questions))
        features = random_features(generator, num_questions, self._num_slots)
        return TrainingWork(tuple(vqa), captions, features)

    def scoring(self, index: int, num_videos: int) -> ScoringWork:
        generator = np.random.default_rng([self._seed, 2, index])
        clips: list[int] = []
        for video in range(num_videos):
            clips += [video] * _draw(generator, self._lengths.questions_per_video)
        questions = tuple(self._question(generator) for _ in clips)
        features = random_features(generator, num_videos, self._num_slots)
        return ScoringWork(questions, tuple(clips), features)

    def _ids(self, generator: np.random.Generator, num_tokens: int) -> list[int]:
        return generator.integers(FIRST_FREE, self._vocab_size, num_tokens).tolist()

    def _question(self, generator: np.random.Generator) -> tuple[TokenSequence, ...]:
        """One VQA sequence per option."""
        video = [VIDEO_SLOT] * self._num_slots
        head = [*self._instructions["vqa"], *video, NEWLINE, *self._question_head]
        # The lengths are measured with NUM_SLOTS slots; other numbers change them by as much.
        total = _draw(generator, self._lengths.vqa_total) + self._num_slots - NUM_SLOTS
        text = self._ids(generator, max(1, total - len(head) - ANSWER_TARGETS))
        return tuple(self._option(head + text, letter) for letter in self._letters)

    def _option(self, prompt: list[int], letter: int) -> TokenSequence:
        tokens = (*prompt, self._open, letter, self._close, EOS)
        targets = range(len(prompt), len(tokens))
        return TokenSequence("vqa", tokens, targets, len(self._instructions["vqa"]))

    def _caption(self, generator: np.random.Generator) -> TokenSequence:
        video = [VIDEO_SLOT] * self._num_slots
        head = [*self._instructions["cap"], *video, NEWLINE, *self._description_head]
        shortest, longest = self._lengths.caption
        num_tokens = int(generator.integers(shortest, longest + 1))
        # What is longer is cut, as a run cuts it.
        text = self._ids(generator, min(num_tokens, MAX_CAP_LEN - len(head) - 1))
        tokens = (*head, *text, EOS)
        targets = range(len(head) + CAPTION_CONTEXT, len(tokens))
        return TokenSequence("cap", tokens, targets, len(self._instructions["cap"]))


def _draw(generator: np.random.Generator, histogram: dict[int, int]) -> int:
    """A key of the histogram, by its counts."""
    weights = np.array(list(histogram.values()), float)
    return int(generator.choice(list(histogram), p=weights / weights.sum()))
