"""How long the sequences of a split are, and how many do not fit: what is shortened is counted, never passed over in silence."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vico.data.prompts import Prompts
from vico.data.types import Question

BUCKET = 32


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
        total = sum(self.counts.values())
        mean = sum(length * count for length, count in self.counts.items()) / total
        buckets: Counter[int] = Counter()
        for length, count in self.counts.items():
            buckets[-(-length // BUCKET) * BUCKET] += count
        shown = ", ".join(
            f"{top - BUCKET + 1}-{top}: {count}" for top, count in sorted(buckets.items())
        )
        return f"{mean:.0f} tokens on average, {max(self.counts)} at most ({shown})"


def of_questions(
    questions: Sequence[Question], prompts: Prompts, tasks: Sequence[str], limit: int
) -> Lengths:
    """Of each question, its longest sequence. Raises UserError for one that cannot be shortened to `limit`."""
    asked = [task for task in tasks if task != "cap"]
    lengths = []
    for question in questions:
        lengths.append(max(prompts.length(question, task) for task in asked))
        if lengths[-1] > limit:
            for task in asked:
                prompts.fit(question, task)
    return Lengths.of(lengths)


def of_captions(captions: Iterable[str], prompts: Prompts) -> Lengths:
    return Lengths.of(prompts.caption_length(text) for text in captions)
