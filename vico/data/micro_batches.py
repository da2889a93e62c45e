"""From questions and their sequences to one micro-batch: what training and evaluation share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from vico.data.features import Features
from vico.data.packing import Example, pack
from vico.data.prompts import Prompts
from vico.data.types import FeatureRows, Question, TokenSequence
from vico.model.batch import PackedBatch

TEXT = "text"  # the task of a sequence of plain text
# Data set, video id, and which rows of its features. Two data sets may share an id.
Clip = tuple[str, str, FeatureRows | None]


def clip_of(question: Question) -> Clip:
    return question.dataset, question.video, question.feature_rows


@dataclass(frozen=True)
class DatasetInputs:
    """What the questions of one data set are made into sequences with."""

    features: Features
    prompts: Prompts
    captions: Mapping[str, str]  # by video; empty without the caption task


@dataclass(frozen=True, slots=True)
class TaskSequence:
    """One sequence of a question, before it is packed."""

    question: Question
    sequence: TokenSequence
    task: int  # column of its losses


class MicroBatchBuilder:
    """Questions with all that is needed to make micro-batches of them."""

    def __init__(
        self,
        questions: Sequence[Question],
        datasets: Mapping[str, DatasetInputs],
        num_slots: int,
        share: bool = True,
    ) -> None:
        self.questions, self._datasets = questions, datasets
        self._num_slots, self._share = num_slots, share

    def _pack(self, sequences: Sequence[TaskSequence]) -> PackedBatch:
        """One micro-batch. Each distinct clip is sampled once; sequences refer to it by its row."""
        rows: dict[Clip, int] = {}
        examples: list[Example] = []
        texts: list[Example] = []
        for item in sequences:
            row = rows.setdefault(clip_of(item.question), len(rows))
            of_kind = texts if item.sequence.task == TEXT else examples
            of_kind.append(Example(item.sequence, row, item.task))
        features_VFC = self._sample(list(rows))
        alone = None
        if texts:  # without video slots, so the clip does not matter
            alone = pack(texts, features_VFC[:0], self._share)
        return pack(examples + texts, features_VFC, self._share, alone)

    def _sample(self, clips: list[Clip]) -> torch.Tensor:
        """features_VFC of these clips. Raises UserError for NaN or infinite values."""
        samples = []
        for dataset, video, feature_rows in clips:
            features = self._datasets[dataset].features
            samples.append(features.finite_sample(video, feature_rows, self._num_slots))
        return torch.stack(samples)

    def _fitted_sequence(self, task: str, question: Question, answer: int) -> TokenSequence:
        """The task's sequence, with the question shortened to fit --max_seq_len."""
        prompts = self._datasets[question.dataset].prompts
        return prompts.question_sequence(task, prompts.fit(question, task), answer)


def num_tokens(sequences: Sequence[TaskSequence]) -> int:
    return sum(len(item.sequence.tokens) for item in sequences)


def question_characters(question: Question) -> int:
    """A guess at a question's length that costs no encoding."""
    option_characters = sum(map(len, question.options))
    return len(question.question) + option_characters + len(question.dialogue)
