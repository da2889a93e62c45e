"""The little world of the demo: what happens in its videos, what is asked about them, and how CLIP would see them.

It stands in for data sets that cannot be given away, in NExT-QA's shape. Only the video tells an answer: every question
of a type offers the same five options, in one order, and each is as often right.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

MOODS = ("angry", "bored", "happy", "sad", "tired")
TUNES = ("drum", "flute", "guitar", "piano", "violin")
VERBS = (
    "bow",
    "clap",
    "jump",
    "run",
    "wave",
)  # done at the start or at the end: only the order of frames tells which
MOVES = ("climb", "crawl", "dance", "kneel", "swim")  # done in the middle
PLACES = ("beach", "garden", "kitchen", "park", "street")
COUNTS = ("one", "two", "three", "four", "five")
ANIMALS = ("bird", "cat", "dog", "fish", "horse")
CONCEPTS = (*MOODS, *TUNES, *VERBS, *MOVES, *PLACES, *COUNTS, *ANIMALS)

# NExT-QA's eight types: causal (why, how), temporal (next, current, previous), descriptive (location, count, others).
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "CW": (
        MOODS,
        (
            "why does the boy sit down, how does he feel",
            "why is the boy like that, what mood is it",
        ),
    ),
    "CH": (TUNES, ("how does the boy make music", "how is the music made by the boy")),
    "TN": (VERBS, ("what does the boy do at the end", "what is it that the boy does in the end")),
    "TC": (
        MOVES,
        ("what does the boy do in the middle", "what is it that the boy does in the middle"),
    ),
    "TP": (
        VERBS,
        ("what does the boy do at the start", "what is it that the boy does at the start"),
    ),
    "DL": (PLACES, ("where is the video taken", "where does this happen")),
    "DC": (COUNTS, ("how many people are there", "how many people are in the video")),
    "DO": (ANIMALS, ("which animal is there", "what animal is in the video")),
}
TYPES = tuple(QUESTIONS)
PARTS = ("start", "middle", "end")  # of a video, with an action each


def part(frame: int, num_frames: int) -> int:
    """Which of PARTS the frame belongs to."""
    return frame * len(PARTS) // num_frames


@dataclass(frozen=True)
class Video:
    mood: str
    tune: str
    verbs: tuple[str, str, str]
    place: str
    count: str
    animal: str
    num_frames: int

    def shown(self, frame: int, num_frames: int) -> tuple[str, ...]:
        """Concepts that frame `frame` of `num_frames` shows."""
        return (
            self.mood,
            self.tune,
            self.verbs[part(frame, num_frames)],
            self.place,
            self.count,
            self.animal,
        )

    def answer(self, kind: str) -> str:
        start, middle, end = self.verbs
        return {
            "CW": self.mood,
            "CH": self.tune,
            "TN": end,
            "TC": middle,
            "TP": start,
            "DL": self.place,
            "DC": self.count,
            "DO": self.animal,
        }[kind]


def make_video(rng: random.Random) -> Video:
    """What is done at the start is not what is done at the end."""
    start, end = rng.sample(VERBS, 2)
    mood, tune, middle, place, count, animal = (
        rng.choice(words) for words in (MOODS, TUNES, MOVES, PLACES, COUNTS, ANIMALS)
    )
    return Video(
        mood, tune, (start, middle, end), place, count, animal, num_frames=rng.randint(8, 24)
    )


def ask(rng: random.Random, video: Video, kind: str) -> tuple[str, tuple[str, ...], int]:
    """(question, options, place of the right one)."""
    options, texts = QUESTIONS[kind]
    return rng.choice(texts), options, options.index(video.answer(kind))


def caption(video: Video) -> str:
    start, middle, end = video.verbs
    return (
        f"The video is taken in the {video.place} with {video.count} people and a {video.animal}. A boy plays the {video.tune}. "
        f"He is {video.mood}. At the start he will {start}. In the middle he will {middle}. At the end he will {end}."
    )


class Camera:
    """CLIP-like features: most of the norm (about 10) is common to all frames, one dimension sticks out, frames differ little.

    Each concept is a random direction; a frame adds those of what it shows, and noise.
    """

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._common = torch.randn(width, generator=generator) * 0.3
        self._common[133 % width] = 5.0
        self._directions = torch.randn(len(CONCEPTS), width, generator=generator) * 0.06

    def film(self, video: Video, generator: torch.Generator) -> Tensor:
        """[frames, width] fp16."""
        frames = []
        for frame in range(video.num_frames):
            shown = [CONCEPTS.index(concept) for concept in video.shown(frame, video.num_frames)]
            strength = 0.8 + 0.4 * torch.rand(len(shown), 1, generator=generator)
            frames.append(self._common + (strength * self._directions[shown]).sum(dim=0))
        stack = torch.stack(frames)
        return (stack + 0.06 * torch.randn(stack.shape, generator=generator)).half()
