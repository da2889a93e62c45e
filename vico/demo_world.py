"""The little world the demo's videos are taken from: what happens in them, what is asked about them, how CLIP sees them.

The real data sets cannot be given away with the program, so this one stands in for them, in their files' shapes. It is
built so that only the video tells the answer: every option is equally likely when the video is not seen, and for the
questions about one scene of several, most of the wrong options stand elsewhere in the same video.

A video is a few scenes one after the other. In each a person does something (verb) with something (thing) in some mood;
the place, the number of people and a colour stay the same.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vico.records import Question

# One piece of the tokenizer each. An option is one of these words, so that it can be read off a frame.
VERBS = ("jump", "dance", "clap", "run", "sit", "wave", "sing", "laugh", "sleep", "climb", "crawl", "swim", "bow", "spin", "kneel", "point")
THINGS = ("ball", "cup", "book", "phone", "guitar", "toy", "bottle", "camera", "hat", "stick", "bag", "cake", "drum", "flower")
MOODS = ("happy", "tired", "hungry", "scared", "angry", "bored", "proud", "curious", "cold", "sad")
PLACES = ("park", "kitchen", "beach", "garden", "street", "forest", "stage", "pool", "bedroom", "school")
COUNTS = ("one", "two", "three", "four", "five", "six", "seven", "eight")
PERSONS = ("boy", "girl", "man", "lady", "baby", "farmer", "nurse", "player")
CONCEPTS = (*VERBS, *THINGS, *MOODS, *PLACES, *COUNTS, *PERSONS)

TYPES = ("CW", "CH", "TN", "TC", "TP", "DL", "DC", "DO")
NUM_OPTIONS = 5
FEATURE_WIDTH = 768


@dataclass(frozen=True)
class Scene:
    verb: str
    thing: str
    mood: str


@dataclass(frozen=True)
class Video:
    name: str
    person: str
    place: str
    count: str
    scenes: tuple[Scene, ...]
    scene_of_frame: tuple[int, ...]

    def words(self, frame: int) -> tuple[str, ...]:
        """What one frame shows."""
        scene = self.scenes[self.scene_of_frame[frame]]
        return (scene.verb, scene.thing, scene.mood, (self.place, self.count, self.person)[(frame*10//len(self.scene_of_frame)) % 3])


def is_held_out(scene: Scene) -> bool:
    """Scenes that training never shows: a fifth of all verbs with their things."""
    return (VERBS.index(scene.verb) + 3 * THINGS.index(scene.thing)) % 5 == 0


def make_video(rng: random.Random, name: str, held_out: bool) -> Video:
    num_scenes = 3
    verbs, things, moods = (rng.sample(words, len(words)) for words in (VERBS, THINGS, MOODS))
    scenes: list[Scene] = []
    for verb in verbs:
        thing = next((t for t in things if is_held_out(Scene(verb, t, "")) == held_out), None)
        if thing is not None:
            things.remove(thing)
            scenes.append(Scene(verb, thing, moods[len(scenes)]))
        if len(scenes) == num_scenes:
            break
    num_frames = rng.randint(8, 24)
    # Each scene is at least two of the ten frames that the model will see.
    least = -(-num_frames // 4)
    spare = num_frames - least * num_scenes
    cuts = sorted(rng.randint(0, spare) for _ in range(num_scenes - 1))
    lengths = [least + b - a for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]
    scene_of_frame = tuple(i for i, n in enumerate(lengths) for _ in range(n))
    person, place, count = (rng.choice(words) for words in (PERSONS, PLACES, COUNTS))
    return Video(name, person, place, count, tuple(scenes), scene_of_frame)


def ask(rng: random.Random, video: Video, kind: str, answer: int) -> Question:
    """A question of type `kind` whose right option stands at `answer`."""
    at = rng.randrange(len(video.scenes))
    if kind == "TN":
        at = rng.randrange(len(video.scenes) - 1)
    elif kind == "TP":
        at = rng.randrange(1, len(video.scenes))
    scene, others, who = video.scenes[at], [s for i, s in enumerate(video.scenes) if i != at], 'person'
    if kind == "CW":
        text, right, pool, near = f"why does the {who} {scene.verb}", scene.mood, MOODS, [s.mood for s in others]
    elif kind == "CH":
        text, right, pool, near = f"how does the {who} {scene.verb}", scene.thing, THINGS, [s.thing for s in others]
    elif kind == "TC":
        text, right, pool, near = f"what does the {who} do while with the {scene.thing}", scene.verb, VERBS, [s.verb for s in others]
    elif kind == "TN":
        text, right, pool = f"what does the {who} do after {scene.verb}", video.scenes[at + 1].verb, VERBS
        near = [s.verb for s in video.scenes[:at]]
    elif kind == "TP":
        text, right, pool = f"what does the {who} do before {scene.verb}", video.scenes[at - 1].verb, VERBS
        near = [s.verb for s in video.scenes[at + 1 :]]
    elif kind == "DL":
        text, right, pool, near = "where is this video taken", video.place, PLACES, []
    elif kind == "DC":
        text, right, pool, near = "how many people are there", video.count, COUNTS, []
    else:
        text, right, pool, near = "who is in the video", video.person, PERSONS, []
    shown = {word for s in video.scenes for word in (s.verb, s.thing, s.mood)} | {right}
    far = [word for word in pool if word not in shown]
    wrong = [*near, *rng.sample(far, NUM_OPTIONS - 1 - len(near))]
    rng.shuffle(wrong)
    return Question(0, "0", video.name, kind, text, (*wrong[:answer], right, *wrong[answer:]), answer)


def caption(video: Video) -> str:
    first, *later = video.scenes
    sentences = [f"In the {video.place} there are {video.count} people and a {video.person}."]
    sentences.append(f"First the person is {first.mood} and starts to {first.verb} with the {first.thing}.")
    sentences += [f"Then the person is {s.mood} and starts to {s.verb} with the {s.thing}." for s in later]
    return " ".join(sentences)
