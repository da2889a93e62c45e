"""A tokenizer whose tokens are letters, so that expected ids can be written down."""

from typing import Any

import torch

from vico.data.features import FeaturesInMemory
from vico.data.prompts import Prompts
from vico.data.types import Question

SLOT = "#"  # how `read` shows a video slot
BEGIN, END = "^", "$"


class Letters:
    """In a Tokenizer's place. `wide`: letters that are several tokens, and how many."""

    def __init__(self, wide: dict[str, int] | None = None) -> None:
        self.bos, self.eos, self.newline = ord(BEGIN), ord(END), ord("\n")
        self.wide = wide or {}
        self.encoded: list[str] = []  # all texts so far

    def encode(self, text: str) -> list[int]:
        return self.encode_with_ends(text)[0]

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        self.encoded.append(text)
        ids, ends = list[int](), list[int]()
        for end, letter in enumerate(text, start=1):
            times = self.wide.get(letter, 1)
            ids += [ord(letter)] * times
            ends += [end] * times
        return ids, ends


def read(ids: Any) -> str:
    """The text of tokens, with `SLOT` for a slot."""
    return "".join(SLOT if token < 0 else chr(token) for token in ids)


def prompts_of(
    tokenizer: Letters, slots: int = 2, seq: int = 10**6, cap: int = 10**6, dialogue: bool = False
) -> Prompts:
    given: Any = tokenizer
    return Prompts(given, slots, seq, cap, dialogue)


def ask(
    qid: int,
    question: str = "why",
    options: tuple[str, ...] = ("x", "y"),
    dialogue: str = "",
    dataset: str = "a",
    video: str | None = None,
) -> Question:
    """A question about a video of its own, unless one is named. The answer is the second option."""
    own = f"v{qid}" if video is None else video
    return Question(
        qid, f"q{qid}", own, "CW", question, options, 1, None, dialogue, dataset=dataset
    )


def clips(*questions: Question) -> FeaturesInMemory:
    """Three frames, two wide, of the video of each question."""
    videos = {q.video: torch.full((3, 2), float(q.index + 1)) for q in questions}
    return FeaturesInMemory(videos, "clips")
