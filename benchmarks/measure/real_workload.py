"""The work of a benchmark from real annotation files and a tokenizer."""

from collections import defaultdict
from pathlib import Path

import numpy as np

from benchmarks.measure.lengths import NUM_OPTIONS, NUM_SLOTS, Lengths
from benchmarks.measure.workload import (
    FIRST_FREE,
    ScoringWork,
    SyntheticWorkload,
    TrainingWork,
    random_features,
)
from vico.data.datasets import read_questions
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence

# Ids below this one keep their meaning when a small vocabulary makes others share an id.
FIRST_SHARED = FIRST_FREE + 200


class RealWorkload:
    """Questions of the files under `data_path`; captions and features are synthetic.

    For a model with a smaller vocabulary than the tokenizer's, ids are renumbered in order of
    appearance, special tokens and answer letters first, so that sequences keep their structure.
    """

    def __init__(
        self,
        data_path: Path,
        dataset: str,
        split: str,
        tokenizer: Path,
        vocab_size: int,
        seed: int,
        limits: tuple[int, int],
        lengths: Lengths | None = None,
    ) -> None:
        pieces = Tokenizer(tokenizer)
        self._prompts = Prompts(pieces, NUM_SLOTS, *limits, dialogue=dataset == "tvqa")
        self._questions = read_questions(dataset, data_path / dataset, split)
        self._synthetic, self._seed = SyntheticWorkload(vocab_size, NUM_SLOTS, seed, lengths), seed
        self._vocab_size = vocab_size if vocab_size < pieces.vocab_size else None
        self._new_ids: dict[int, int] = {VIDEO_SLOT: VIDEO_SLOT}
        for answer in range(NUM_OPTIONS):
            self._renumber(self._prompts.vqa(self._questions[0], answer))
        self.description = (
            f"{dataset} {split}, {len(self._questions)} questions of {data_path}; "
            f"captions: {self._synthetic.description}"
        )

    def training(self, index: int, num_questions: int) -> TrainingWork:
        generator = np.random.default_rng([self._seed, 1, index])
        chosen = generator.choice(len(self._questions), num_questions, replace=False)
        vqa = []
        for i in chosen:
            question = self._questions[i]
            vqa.append(self._options(question)[question.answer or 0])
        synthetic = self._synthetic.training(index, num_questions)
        return TrainingWork(tuple(vqa), synthetic.cap, synthetic.features_VFC)

    def scoring(self, index: int, num_videos: int) -> ScoringWork:
        by_video: dict[str, list[Question]] = defaultdict(list)
        for question in self._questions:
            by_video[question.video].append(question)
        groups = list(by_video.values())
        generator = np.random.default_rng([self._seed, 2, index])
        questions, clips = [], []
        for clip, i in enumerate(generator.choice(len(groups), num_videos, replace=False)):
            for question in groups[i]:
                questions.append(self._options(question))
                clips.append(clip)
        features = random_features(generator, num_videos, NUM_SLOTS)
        return ScoringWork(tuple(questions), tuple(clips), features)

    def _options(self, question: Question) -> tuple[TokenSequence, ...]:
        """One VQA sequence per option."""
        shortened = self._prompts.fit(question, "vqa")
        options = []
        for answer in range(len(question.options)):
            options.append(self._renumber(self._prompts.vqa(shortened, answer)))
        return tuple(options)

    def _renumber(self, sequence: TokenSequence) -> TokenSequence:
        if self._vocab_size is None:
            return sequence
        tokens = []
        for token in sequence.tokens:
            if token not in self._new_ids:
                self._new_ids[token] = self._next_id(self._vocab_size)
            tokens.append(self._new_ids[token])
        return TokenSequence(sequence.task, tuple(tokens), sequence.targets, sequence.video_start)

    def _next_id(self, vocab_size: int) -> int:
        """The next free id; once all are used, ids from FIRST_SHARED on are used again."""
        number = len(self._new_ids)
        if number < vocab_size:
            return number
        return FIRST_SHARED + number % (vocab_size - FIRST_SHARED)
