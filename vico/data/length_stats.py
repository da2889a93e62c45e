"""How long the sequences of a split are, and how many do not fit. What is shortened is counted."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vico.data.prompts import Prompts
from vico.data.types import Question

BUCKET_TOKENS = 32


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

    def above(self, limit: int) -> int:
        return sum(count for length, count in self.counts.items() if length > limit)

    def describe(self) -> str:
        """The mean, the maximum and a histogram, on one line."""
        num_sequences = sum(self.counts.values())
        num_tokens = sum(length * count for length, count in self.counts.items())
        buckets: Counter[int] = Counter()
        for length, count in self.counts.items():
            bucket = -(-length // BUCKET_TOKENS)
            buckets[bucket * BUCKET_TOKENS] += count
        histogram = ", ".join(
            f"{last - BUCKET_TOKENS + 1}-{last}: {count}" for last, count in sorted(buckets.items())
        )
        mean = num_tokens / num_sequences
        return f"{mean:.0f} tokens on average, {max(self.counts)} at most ({histogram})"


def of_questions(
    questions: Sequence[Question], prompts: Prompts, tasks: Sequence[str], limit: int
) -> Lengths:
    """The longest sequence of each question, over its tasks without "cap".

    Raises UserError for a question that cannot be shortened to `limit` tokens.
    """
    question_tasks = [task for task in tasks if task != "cap"]
    longest_sequences = []
    for question in questions:
        longest = max(prompts.length(question, task) for task in question_tasks)
        longest_sequences.append(longest)
        if longest > limit:
            for task in question_tasks:
                prompts.fit(question, task)
    return Lengths.of(longest_sequences)


def of_captions(captions: Iterable[str], prompts: Prompts) -> Lengths:
    return Lengths.of(prompts.caption_length(text) for text in captions)
