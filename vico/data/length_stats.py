"""How long the sequences of a split are, and how much is cut where they do not fit."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vico.data.prompts import Prompts
from vico.data.types import Question

BUCKET_TOKENS = 32
ROWS_PER_REPORT = 1000  # rows measured between two calls of `progress`


@dataclass(frozen=True)
class Lengths:
    """Tokens before anything is shortened: `counts[n]` sequences have n of them."""

    counts: dict[int, int]

    @classmethod
    def of(cls, lengths: Iterable[int]) -> "Lengths":
        return cls(dict(sorted(Counter(lengths).items())))

    def to_json(self) -> list[list[int]]:
        return [list(item) for item in self.counts.items()]

    @classmethod
    def from_json(cls, items: list[list[int]]) -> "Lengths":
        return cls({length: count for length, count in items})

    @property
    def num_sequences(self) -> int:
        return sum(self.counts.values())

    @property
    def num_tokens(self) -> int:
        return sum(length * count for length, count in self.counts.items())

    def above(self, limit: int) -> int:
        return sum(count for length, count in self.counts.items() if length > limit)

    def tokens_above(self, limit: int) -> int:
        """Tokens that have to go so that every sequence has `limit` at most."""
        return sum((n - limit) * count for n, count in self.counts.items() if n > limit)

    def describe(self) -> str:
        """The mean, the maximum and a histogram, on one line."""
        buckets: Counter[int] = Counter()
        for length, count in self.counts.items():
            bucket = -(-length // BUCKET_TOKENS)
            buckets[bucket * BUCKET_TOKENS] += count
        histogram = ", ".join(
            f"{last - BUCKET_TOKENS + 1}-{last}: {count}" for last, count in sorted(buckets.items())
        )
        mean = self.num_tokens / self.num_sequences
        return f"{mean:.0f} tokens on average, {max(self.counts)} at most ({histogram})"


@dataclass
class Cuts:
    """What questions that are too long lose, in characters. Of several tasks, the worst counts."""

    # Of these questions before they are cut, and what is cut of them.
    dialogue: int = 0
    cut_dialogue: int = 0
    num_without_dialogue: int = 0  # questions that lose all of it
    options: int = 0
    cut_options: int = 0
    num_with_cut_options: int = 0

    def add(self, question: Question, fitted: Sequence[Question]) -> None:
        """`fitted`: the question shortened for each task."""
        dialogue, kept = len(question.dialogue), min(len(q.dialogue) for q in fitted)
        options, kept_options = _option_length(question), min(map(_option_length, fitted))
        self.dialogue += dialogue
        self.cut_dialogue += dialogue - kept
        self.num_without_dialogue += kept == 0 < dialogue
        self.options += options
        self.cut_options += options - kept_options
        self.num_with_cut_options += kept_options < options

    def describe(self) -> str:
        parts = []
        if self.cut_dialogue:
            parts.append(
                f"{_share(self.cut_dialogue, self.dialogue)} of their dialogue "
                f"(all of it in {self.num_without_dialogue})"
            )
        if self.cut_options:
            share = _share(self.cut_options, self.options)
            parts.append(f"{share} of their options (in {self.num_with_cut_options})")
        return " and ".join(parts)


def _option_length(question: Question) -> int:
    return sum(map(len, question.options))


def _share(cut: int, total: int) -> str:
    return f"{100 * cut / total:.1f} % ({cut} of {total} characters)"


@dataclass
class QuestionLengths:
    """Lengths and cuts of the first `num_measured` questions of a split."""

    num_measured: int
    lengths: Lengths
    cuts: Cuts

    def to_json(self) -> dict[str, Any]:
        return {
            "num_measured": self.num_measured,
            "lengths": self.lengths.to_json(),
            "cuts": asdict(self.cuts),
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "QuestionLengths":
        lengths = Lengths.from_json(content["lengths"])
        return cls(content["num_measured"], lengths, Cuts(**content["cuts"]))


def of_questions(
    questions: Sequence[Question],
    prompts: Prompts,
    tasks: Sequence[str],
    limit: int,
    known: QuestionLengths | None = None,
    progress: Callable[[QuestionLengths], None] = lambda _: None,
) -> QuestionLengths:
    """The longest sequence of each question, over its tasks without "cap", and what it loses.

    Begins after the questions that are `known`. Calls `progress` every ROWS_PER_REPORT questions.
    Raises UserError for a question that cannot be shortened to `limit` tokens.
    """
    question_tasks = [task for task in tasks if task != "cap"]
    measured = known or QuestionLengths(0, Lengths({}), Cuts())
    counts, cuts = Counter(measured.lengths.counts), measured.cuts
    for start in range(measured.num_measured, len(questions), ROWS_PER_REPORT):
        part = questions[start : start + ROWS_PER_REPORT]
        for question in part:
            longest = max(prompts.length(question, task) for task in question_tasks)
            counts[longest] += 1
            if longest > limit:
                cuts.add(question, [prompts.fit(question, task) for task in question_tasks])
        lengths = Lengths(dict(sorted(counts.items())))
        measured = QuestionLengths(start + len(part), lengths, cuts)
        progress(measured)
    return measured


def of_captions(
    captions: Collection[str],
    prompts: Prompts,
    progress: Callable[[str], object] = lambda _: None,
) -> Lengths:
    lengths = []
    for text in captions:
        lengths.append(prompts.caption_length(text))
        if len(lengths) % ROWS_PER_REPORT == 0:
            progress(f"measured {len(lengths)} of {len(captions)} captions")
    return Lengths.of(lengths)
