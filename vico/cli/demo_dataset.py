"""The demo's data set: simulated videos, questions about them, captions, and CLIP-like features.

It replaces data sets that cannot be distributed, in NExT-QA's format. Only the video reveals an
answer: all questions of a type offer the same five options, in the same order, and each option is
right equally often.
"""

import csv
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vico.cli.demo_domain import Domain, QuestionType, part_of
from vico.model.config import FEATURE_WIDTH

MOODS = ("angry", "bored", "happy", "sad", "tired")
INSTRUMENTS = ("drum", "flute", "guitar", "piano", "violin")
# Done at the start or at the end: only the order of the frames tells which.
OUTER_ACTIONS = ("bow", "clap", "jump", "run", "wave")
MIDDLE_ACTIONS = ("climb", "crawl", "dance", "kneel", "swim")
PLACES = ("beach", "garden", "kitchen", "park", "street")
COUNTS = ("one", "two", "three", "four", "five")
ANIMALS = ("bird", "cat", "dog", "fish", "horse")
CONCEPTS = (
    *MOODS,
    *INSTRUMENTS,
    *OUTER_ACTIONS,
    *MIDDLE_ACTIONS,
    *PLACES,
    *COUNTS,
    *ANIMALS,
)
# NExT-QA's eight types: causal (why, how), temporal (next, current, previous), and descriptive
# (location, count, others).
QUESTIONS = {
    "CW": QuestionType(
        MOODS,
        (
            "why does the boy sit down, how does he feel",
            "why is the boy like that, what mood is it",
        ),
    ),
    "CH": QuestionType(
        INSTRUMENTS,
        ("how does the boy make music", "how is the music made by the boy"),
    ),
    "TN": QuestionType(
        OUTER_ACTIONS,
        ("what does the boy do at the end", "what is it that the boy does in the end"),
    ),
    "TC": QuestionType(
        MIDDLE_ACTIONS,
        ("what does the boy do in the middle", "what is it that the boy does in the middle"),
    ),
    "TP": QuestionType(
        OUTER_ACTIONS,
        ("what does the boy do at the start", "what is it that the boy does at the start"),
    ),
    "DL": QuestionType(PLACES, ("where is the video taken", "where does this happen")),
    "DC": QuestionType(COUNTS, ("how many people are there", "how many people are in the video")),
    "DO": QuestionType(ANIMALS, ("which animal is there", "what animal is in the video")),
}
QUESTIONS_PER_VIDEO = 5
CSV_COLUMNS = tuple(
    "video frame_count width height question answer qid type a0 a1 a2 a3 a4".split()
)


@dataclass(frozen=True)
class Video:
    mood: str
    instrument: str
    actions: tuple[str, str, str]
    place: str
    count: str
    animal: str
    num_frames: int

    def concepts(self, frame: int, num_frames: int) -> tuple[str, ...]:
        action = self.actions[part_of(frame, num_frames)]
        return self.mood, self.instrument, action, self.place, self.count, self.animal

    def answer(self, question_type: str) -> str:
        start, middle, end = self.actions
        answers = {
            "CW": self.mood,
            "CH": self.instrument,
            "TN": end,
            "TC": middle,
            "TP": start,
            "DL": self.place,
            "DC": self.count,
            "DO": self.animal,
        }
        return answers[question_type]

    def caption(self) -> str:
        start, middle, end = self.actions
        return (
            f"The video is taken in the {self.place} with {self.count} people and a {self.animal}. "
            f"A boy plays the {self.instrument}. He is {self.mood}. At the start he will {start}. "
            f"In the middle he will {middle}. At the end he will {end}."
        )


def make_video(rng: random.Random) -> Video:
    """A random video, with different actions at the start and at the end."""
    start, end = rng.sample(OUTER_ACTIONS, 2)
    mood = rng.choice(MOODS)
    instrument = rng.choice(INSTRUMENTS)
    middle = rng.choice(MIDDLE_ACTIONS)
    place = rng.choice(PLACES)
    count = rng.choice(COUNTS)
    animal = rng.choice(ANIMALS)
    num_frames = rng.randint(8, 24)
    return Video(mood, instrument, (start, middle, end), place, count, animal, num_frames)


DOMAIN = Domain(CONCEPTS, QUESTIONS, make_video)


class ClipSimulator:
    """Features like CLIP's.

    Most of the norm (about 10) is common to all frames, one dimension is an outlier, and frames
    differ little. Each concept is a random direction; a frame adds the directions of its concepts,
    and noise.
    """

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._common_D = torch.randn(width, generator=generator) * 0.3
        self._common_D[133 % width] = 5.0
        self._directions_ND = torch.randn(len(CONCEPTS), width, generator=generator) * 0.06

    def features(self, video: Video, generator: torch.Generator) -> Tensor:
        """[num_frames, width] fp16."""
        frames = []
        for frame in range(video.num_frames):
            concepts = DOMAIN.indices(video, frame, video.num_frames)
            strength = 0.8 + 0.4 * torch.rand(len(concepts), 1, generator=generator)
            frames.append(self._common_D + (strength * self._directions_ND[concepts]).sum(dim=0))
        frames_FD = torch.stack(frames)
        noise_FD = torch.randn(frames_FD.shape, generator=generator)
        return (frames_FD + 0.06 * noise_FD).half()


def write_dataset(root: Path, seed: int, splits: dict[str, int]) -> None:
    """Write annotations, captions and features to data/nextqa and data_swapped/nextqa in `root`.

    `splits`: number of videos by split. In data_swapped each video has the features of another
    one: what a model still learns there, it has not seen in the video.
    """
    clip = ClipSimulator(FEATURE_WIDTH, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    folder, swapped_folder = root / "data" / "nextqa", root / "data_swapped" / "nextqa"
    folder.mkdir(parents=True)
    swapped_folder.mkdir(parents=True)
    features: dict[str, Tensor] = {}
    swapped: dict[str, Tensor] = {}
    captions: dict[str, str] = {}
    for i, (split, num_videos) in enumerate(splits.items()):
        rng = random.Random(f"{seed} {split}")
        videos = {f"{i}{n:05d}": make_video(rng) for n in range(num_videos)}
        rows: list[dict[str, object]] = []
        for name, video in videos.items():
            rows += _make_rows(rng, name, video)
        _write_csv(folder / f"{split}.csv", rows)
        _write_csv(swapped_folder / f"{split}.csv", rows)
        split_features = {name: clip.features(video, generator) for name, video in videos.items()}
        names = list(split_features)
        next_names = [*names[1:], *names[:1]]
        features |= split_features
        swapped |= {
            name: split_features[other] for name, other in zip(names, next_names, strict=True)
        }
        captions |= {name: video.caption() for name, video in videos.items()}
    for target, content in ((folder, features), (swapped_folder, swapped)):
        torch.save(content, target / "clipvitl14.pth")
        (target / "llava_v15_13b_n6.json").write_text(json.dumps(captions), encoding="utf-8")


def _make_rows(rng: random.Random, name: str, video: Video) -> list[dict[str, object]]:
    """The annotation rows of a video: one question of each of several types."""
    rows = []
    for qid, question_type in enumerate(rng.sample(DOMAIN.types, QUESTIONS_PER_VIDEO)):
        text, options, answer = DOMAIN.question(rng, video, question_type)
        row: dict[str, object] = {
            "video": name,
            "frame_count": video.num_frames * 30,
            "width": 640,
            "height": 480,
            "question": text,
            "answer": answer,
            "qid": qid,
            "type": question_type,
        }
        row |= {f"a{k}": option for k, option in enumerate(options)}
        rows.append(row)
    return rows


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
