"""The work of a benchmark: sequences with the lengths and the structure of the real sets, the same for the same seed.

Synthetic by default: lengths from lengths.json, ids random, instructions, slots, answer tails and questions per video as
the method makes them. Or real annotation files with a tokenizer (`RealWorkload`).

`python -m benchmarks.measure.workload --data_path FOLDER --tokenizer FILE` measures real NExT-QA files and prints lengths.json.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vico.data.datasets import read_questions
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import VIDEO_SLOT, Question, TokenSequence
from vico.model.config import FEATURE_WIDTH

LENGTHS = Path(__file__).parents[1] / "lengths.json"
NUM_OPTIONS = 5
ANSWER_TARGETS = 4  # "(", the letter, ")", EOS
DESCRIPTION_HEAD = 2  # "Description", ":"
CAPTION_CONTEXT = 3
BOS, EOS, NEWLINE, FIRST_FREE = 1, 2, 13, 20


@dataclass(frozen=True)
class TrainingWork:
    """A micro-batch: question i and its caption belong to clip i."""

    vqa: tuple[TokenSequence, ...]
    cap: tuple[TokenSequence, ...]
    features_VFC: Tensor

    @property
    def num_real_tokens(self) -> int:
        return sum(len(s.tokens) for s in (*self.vqa, *self.cap))


@dataclass(frozen=True)
class ScoringWork:
    """Questions with one sequence per option; the questions of one video stand together."""

    questions: tuple[tuple[TokenSequence, ...], ...]
    clips: tuple[int, ...]  # of each question
    features_VFC: Tensor

    @property
    def num_real_tokens(self) -> int:
        return sum(len(s.tokens) for question in self.questions for s in question)


class Workload(Protocol):
    description: str

    def training(self, place: int, num_questions: int) -> TrainingWork: ...

    def scoring(self, place: int, num_videos: int) -> ScoringWork: ...


@dataclass(frozen=True)
class Lengths:
    source: str
    common_instruction: int  # tokens that all tasks begin with: BOS, "Instruction:"
    vqa_instruction: int  # tokens before the video, BOS included
    cap_instruction: int
    question_head: int  # tokens of "Question:"
    vqa_total: dict[int, int]  # length of a VQA sequence with 10 slots -> how many
    questions_per_video: dict[int, int]
    caption: tuple[int, int]  # caption text, tokens, uniform

    @classmethod
    def load(cls, path: Path = LENGTHS) -> "Lengths":
        fields = json.loads(path.read_text(encoding="utf-8"))
        for name in ("vqa_total", "questions_per_video"):
            fields[name] = {int(length): count for length, count in fields[name].items()}
        return cls(**{**fields, "caption": tuple(fields["caption"])})


def features(generator: np.random.Generator, num_videos: int, num_slots: int) -> Tensor:
    """[V, F, C], like CLIP's: norm about 10, most of it a common mean, one outlier dimension, frames that differ little."""
    mean = np.random.default_rng(0).standard_normal(FEATURE_WIDTH) * 0.28
    mean[133] = 5.0
    clip = generator.standard_normal((num_videos, 1, FEATURE_WIDTH)) * 0.14
    frame = generator.standard_normal((num_videos, num_slots, FEATURE_WIDTH)) * 0.06
    return torch.from_numpy(mean + clip + frame).float()


class SyntheticWorkload:
    """Random ids in the structure of the method. Item `place` is a function of (seed, place)."""

    def __init__(
        self, vocab_size: int, num_slots: int = 10, seed: int = 0, lengths: Lengths | None = None
    ) -> None:
        self._lengths, self._vocab, self._slots, self._seed = (
            lengths or Lengths.load(),
            vocab_size,
            num_slots,
            seed,
        )
        fixed = np.random.default_rng([seed, 0])
        common = [BOS, *self._ids(fixed, self._lengths.common_instruction - 1)]
        self._heads = {
            "vqa": common + self._ids(fixed, self._lengths.vqa_instruction - len(common)),
            "cap": common + self._ids(fixed, self._lengths.cap_instruction - len(common)),
        }
        self._question_head, self._description = (
            self._ids(fixed, self._lengths.question_head),
            self._ids(fixed, DESCRIPTION_HEAD),
        )
        distinct = fixed.permutation(np.arange(FIRST_FREE, vocab_size))[: NUM_OPTIONS + 2].tolist()
        self._open, self._close, self._letters = distinct[0], distinct[1], distinct[2:]
        self.description = f"synthetic ids, lengths of {self._lengths.source}, captions of {self._lengths.caption} tokens"

    def _ids(self, generator: np.random.Generator, num: int) -> list[int]:
        return generator.integers(FIRST_FREE, self._vocab, num).tolist()

    def _question(self, generator: np.random.Generator) -> tuple[TokenSequence, ...]:
        """One VQA sequence per option."""
        head = [*self._heads["vqa"], *[VIDEO_SLOT] * self._slots, NEWLINE, *self._question_head]
        # Real lengths are with 10 slots; other slot counts change the total by as much.
        total = _draw(generator, self._lengths.vqa_total) + self._slots - 10
        prompt = head + self._ids(generator, max(1, total - len(head) - ANSWER_TARGETS))
        return tuple(self._option(prompt, letter) for letter in self._letters)

    def _option(self, prompt: list[int], letter: int) -> TokenSequence:
        tokens = (*prompt, self._open, letter, self._close, EOS)
        return TokenSequence(
            "vqa", tokens, range(len(prompt), len(tokens)), len(self._heads["vqa"])
        )

    def _caption(self, generator: np.random.Generator) -> TokenSequence:
        head = [*self._heads["cap"], *[VIDEO_SLOT] * self._slots, NEWLINE, *self._description]
        low, high = self._lengths.caption
        tokens = (*head, *self._ids(generator, int(generator.integers(low, high + 1))), EOS)
        return TokenSequence(
            "cap", tokens, range(len(head) + CAPTION_CONTEXT, len(tokens)), len(self._heads["cap"])
        )

    def training(self, place: int, num_questions: int) -> TrainingWork:
        generator = np.random.default_rng([self._seed, 1, place])
        vqa = tuple(
            self._question(generator)[generator.integers(NUM_OPTIONS)] for _ in range(num_questions)
        )
        cap = tuple(self._caption(generator) for _ in range(num_questions))
        return TrainingWork(vqa, cap, features(generator, num_questions, self._slots))

    def scoring(self, place: int, num_videos: int) -> ScoringWork:
        generator = np.random.default_rng([self._seed, 2, place])
        counts = [_draw(generator, self._lengths.questions_per_video) for _ in range(num_videos)]
        clips = tuple(video for video, count in enumerate(counts) for _ in range(count))
        return ScoringWork(
            tuple(self._question(generator) for _ in clips),
            clips,
            features(generator, num_videos, self._slots),
        )


def _draw(generator: np.random.Generator, histogram: dict[int, int]) -> int:
    weights = np.array(list(histogram.values()), float)
    return int(generator.choice(list(histogram), p=weights / weights.sum()))


class RealWorkload:
    """Questions of real annotation files under `data_path`; captions and features are made, as none are published with them.

    For a model with a smaller vocabulary than the tokenizer's, ids are renumbered in order of appearance, specials and
    answer letters first, so that the sequences keep their structure.
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
    ) -> None:
        pieces = Tokenizer(tokenizer)
        self._prompts = Prompts(pieces, 10, *limits, dialogue=dataset == "tvqa")
        self._questions = read_questions(dataset, data_path / dataset, split)
        self._made, self._seed = SyntheticWorkload(vocab_size, seed=seed), seed
        self._number: dict[int, int] = {VIDEO_SLOT: VIDEO_SLOT}
        self._vocab = vocab_size if vocab_size < pieces.vocab_size else None
        for answer in range(NUM_OPTIONS):
            self._renumbered(self._prompts.vqa(self._questions[0], answer))
        self.description = f"{dataset} {split}, {len(self._questions)} questions of {data_path}; captions: {self._made.description}"

    def _renumbered(self, sequence: TokenSequence) -> TokenSequence:
        if self._vocab is None:
            return sequence
        tokens = []
        for token in sequence.tokens:
            if token not in self._number:
                known = len(self._number)
                self._number[token] = (
                    known
                    if known < self._vocab
                    else FIRST_FREE + 200 + known % (self._vocab - FIRST_FREE - 200)
                )
            tokens.append(self._number[token])
        return TokenSequence(sequence.task, tuple(tokens), sequence.targets, sequence.video_start)

    def _options(self, question: Question) -> tuple[TokenSequence, ...]:
        fitted = self._prompts.fit(question, "vqa")
        return tuple(
            self._renumbered(self._prompts.vqa(fitted, answer))
            for answer in range(len(question.options))
        )

    def training(self, place: int, num_questions: int) -> TrainingWork:
        chosen = np.random.default_rng([self._seed, 1, place]).choice(
            len(self._questions), num_questions, replace=False
        )
        made = self._made.training(place, num_questions)
        vqa = tuple(
            self._options(self._questions[i])[self._questions[i].answer or 0] for i in chosen
        )
        return TrainingWork(vqa, made.cap, made.features_VFC)

    def scoring(self, place: int, num_videos: int) -> ScoringWork:
        by_video: dict[str, list[Question]] = {}
        for question in self._questions:
            by_video.setdefault(question.video, []).append(question)
        generator = np.random.default_rng([self._seed, 2, place])
        chosen = [
            list(by_video.values())[i]
            for i in generator.choice(len(by_video), num_videos, replace=False)
        ]
        clips = tuple(video for video, questions in enumerate(chosen) for _ in questions)
        return ScoringWork(
            tuple(self._options(q) for questions in chosen for q in questions),
            clips,
            features(generator, num_videos, 10),
        )


def measure(data_path: Path, tokenizer: Path, split: str) -> dict[str, Any]:
    """lengths.json of a NExT-QA split."""
    pieces = Tokenizer(tokenizer)
    prompts = Prompts(pieces, 10, 512, 384, dialogue=False)
    questions = read_questions("nextqa", data_path / "nextqa", split)
    vqa, cap = prompts.vqa(questions[0], 0), prompts.caption("A man.")
    common = next(i for i, (a, b) in enumerate(zip(vqa.tokens, cap.tokens, strict=False)) if a != b)
    lengths = Counter(len(prompts.vqa(q, 0).tokens) for q in questions)
    per_video = Counter(Counter(q.video for q in questions).values())
    assert _tails_differ_in_letter_only(prompts, questions[:100])
    return {
        "source": f"NExT-QA {split} ({len(questions)} questions, LLaMA tokenizer)",
        "common_instruction": common,
        "vqa_instruction": vqa.video_start,
        "cap_instruction": cap.video_start,
        "question_head": len(pieces.encode("Question:")),
        "vqa_total": dict(sorted(lengths.items())),
        "questions_per_video": dict(sorted(per_video.items())),
        "caption": [80, 250],
    }


def _tails_differ_in_letter_only(prompts: Prompts, questions: Sequence[Question]) -> bool:
    options = [[prompts.vqa(q, answer) for answer in range(NUM_OPTIONS)] for q in questions]
    return all(
        len(s.targets) == ANSWER_TARGETS
        and [a != b for a, b in zip(s.tokens[-4:], o[0].tokens[-4:], strict=True)]
        == [False, i > 0, False, False]
        for o in options
        for i, s in enumerate(o)
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_path", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--split", default="val")
    args = parser.parse_args()
    print(json.dumps(measure(args.data_path, args.tokenizer, args.split)))
