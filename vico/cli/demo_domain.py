"""What the videos of a demo show and are asked: the words that its tiny LLaMA learns.

The demo's own is in demo_dataset.py, another one in launch/examples/videos.py.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

# Of a video; what it shows may differ between them.
PARTS = ("start", "middle", "end")


def part_of(frame: int, num_frames: int) -> int:
    """Index in PARTS of frame number `frame` of `num_frames`."""
    return frame * len(PARTS) // num_frames


@dataclass(frozen=True)
class QuestionType:
    """What questions of a type offer, and their wordings."""

    options: tuple[str, ...]
    texts: tuple[str, ...]


class DemoVideo(Protocol):
    """A video of which all is known."""

    def concepts(self, frame: int, num_frames: int) -> tuple[str, ...]:
        """What frame number `frame` of `num_frames` shows."""
        ...

    def answer(self, question_type: str) -> str:
        """One of the options of the type."""
        ...

    def caption(self) -> str: ...


@dataclass(frozen=True)
class Domain:
    """Videos, and the questions about them.

    All questions of a type offer the same options in the same order, so only the video reveals an
    answer.
    """

    concepts: tuple[str, ...]
    questions: Mapping[str, QuestionType]  # by type
    make_video: Callable[[random.Random], DemoVideo]

    @property
    def types(self) -> tuple[str, ...]:
        return tuple(self.questions)

    def indices(self, video: DemoVideo, frame: int, num_frames: int) -> list[int]:
        """Indices in `concepts` of what a frame shows."""
        return [self.concepts.index(word) for word in video.concepts(frame, num_frames)]

    def question(
        self, rng: random.Random, video: DemoVideo, question_type: str
    ) -> tuple[str, tuple[str, ...], int]:
        """(text, options, index of the right option)."""
        kind = self.questions[question_type]
        return rng.choice(kind.texts), kind.options, kind.options.index(video.answer(question_type))
