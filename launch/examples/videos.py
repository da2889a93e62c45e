"""Makes the inputs of videos.sh: videos of moving shapes, questions, an image encoder, a LLaMA.

Usage: python videos.py FOLDER [--no_llama]. What is there already stays as it is.

FOLDER/videos           mp4s: a coloured shape that moves, or does not
FOLDER/data/shapes      train.jsonl and val.jsonl: questions, options, answers and captions
FOLDER/data_swapped     the same, but each val row names another row's video
FOLDER/clip             a small image encoder in CLIP's layout
FOLDER/pretrained/llama a tokenizer and a tiny LLaMA that know the words of the questions
"""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.cli.demo_domain import Domain, QuestionType, part_of
from vico.cli.demo_llama import MODEL_NAME, make_llama, make_tokenizer
from vico.errors import UserError
from vico.io import log
from vico.io.atomic import make_folder, write_folder
from vico.io.paths import exists
from vico.video.frames import require_av

SEED = 0
DATASET = "shapes"
SPLITS = {"train": 240, "val": 60}  # videos; none is in both
LLAMA_STEPS = 300

SHAPES = ("circle", "square", "triangle", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "white": (240, 240, 240),
}
# Where in the picture: -1 is left or top, 1 right or bottom.
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
# From a place at the start to one at the end.
MOVES = {
    "rightwards": ("left", "right"),
    "leftwards": ("right", "left"),
    "downwards": ("top", "bottom"),
    "upwards": ("bottom", "top"),
    "nowhere": ("middle", "middle"),
}
QUESTIONS = {
    "shape": QuestionType(SHAPES, ("what shape is it", "which shape is in the video")),
    "colour": QuestionType(
        tuple(COLOURS), ("what colour is it", "which colour does the shape have")
    ),
    "move": QuestionType(tuple(MOVES), ("where does it move", "where does the shape go")),
}
# Of a video, in pixels; the encoder sees the square in the middle.
WIDTH, HEIGHT, FRAMES_PER_SECOND = 160, 120, 5
# In halves of the height.
RADIUS, DISTANCE, JITTER = (0.28, 0.36), 0.5, 0.08


@dataclass(frozen=True)
class Video:
    shape: str
    colour: str
    move: str
    num_seconds: int
    radius: float
    offset: tuple[float, float]  # of the whole path
    background: tuple[int, int, int]

    def place(self, time: float) -> tuple[float, float]:
        """(x, y) at `time`, from 0 at the start to 1 at the end."""
        (x, y), (end_x, end_y) = (PLACES[place] for place in MOVES[self.move])
        dx, dy = self.offset
        return (
            DISTANCE * (x + (end_x - x) * time) + dx,
            DISTANCE * (y + (end_y - y) * time) + dy,
        )

    def concepts(self, frame: int, num_frames: int) -> tuple[str, ...]:
        start, end = MOVES[self.move]
        places = (start, "middle", end)
        return self.shape, self.colour, places[part_of(frame, num_frames)]

    def answer(self, question_type: str) -> str:
        return {"shape": self.shape, "colour": self.colour, "move": self.move}[question_type]

    def caption(self) -> str:
        return f"The video shows how a {self.colour} {self.shape} moves {self.move}."


def make_video(rng: random.Random) -> Video:
    shape, colour, move = rng.choice(SHAPES), rng.choice(list(COLOURS)), rng.choice(list(MOVES))
    offset = (rng.uniform(-JITTER, JITTER), rng.uniform(-JITTER, JITTER))
    red, green, blue = (rng.randint(10, 60) for _ in range(3))
    return Video(
        shape, colour, move, rng.randint(10, 14), rng.uniform(*RADIUS), offset, (red, green, blue)
    )


DOMAIN = Domain((*SHAPES, *COLOURS, *PLACES), QUESTIONS, make_video)


# Pictures


def draw(video: Video, times: Sequence[float], width: int, height: int) -> Tensor:
    """[frames, height, width, 3] uint8 at `times` (`Video.place`), twice as fine, then averaged."""
    scale = 2 / height  # of a pixel
    fine_x = (torch.arange(2 * width) + 0.5) / 2 - width / 2
    fine_y = (torch.arange(2 * height) + 0.5) / 2 - height / 2
    centers = torch.tensor([video.place(time) for time in times])
    x = (fine_x * scale - centers[:, :1])[:, None, :] / video.radius
    y = (fine_y * scale - centers[:, 1:])[:, :, None] / video.radius
    inside = INSIDE[video.shape](x, y).float()
    cover = torch.nn.functional.avg_pool2d(inside[:, None], 2)[:, 0, :, :, None]
    colour, background = torch.tensor(COLOURS[video.colour]), torch.tensor(video.background)
    return (background + cover * (colour - background)).round().to(torch.uint8)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    square = x * x + y * y
    return (square <= 1) & (square >= 0.4)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    is_bar, is_beam = (x.abs() <= 0.3) & (y.abs() <= 1), (x.abs() <= 1) & (y.abs() <= 0.3)
    return is_bar | is_beam


INSIDE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: (x.abs() <= 0.9) & (y.abs() <= 0.9),
    "triangle": lambda x, y: (y <= 0.8) & (x.abs() <= (y + 1) / 1.8),
    "cross": _cross,
    "ring": _ring,
}


def write_video(path: Path, video: Video) -> None:
    """An mp4 in H.264."""
    num_frames = video.num_seconds * FRAMES_PER_SECOND
    times = [frame / (num_frames - 1) for frame in range(num_frames)]
    av = require_av()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"preset": "veryfast", "threads": "1"}
        for picture in draw(video, times, WIDTH, HEIGHT).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))


# The encoder

SIDE, BATCH_SIZE, ENCODER_STEPS, ENCODER_LR = 32, 64, 400, 2e-3


def write_encoder(folder: Path) -> None:
    """A vision tower of CLIP's, taught what single pictures show: the words of `DOMAIN`.

    It stands in for CLIP, which knows that of photographs. With random weights, its features do
    not tell a ring from a square.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(SEED)
    config = transformers.CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=8,
        projection_dim=64,
    )
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    _teach(model, mean, std)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _teach(model: Any, mean: Tensor, std: Tensor) -> None:
    """Each of a picture's three words is told from the other four of its kind."""
    rng, generator = random.Random(f"{SEED} encoder"), torch.Generator().manual_seed(SEED)
    words = torch.nn.Linear(model.config.projection_dim, len(DOMAIN.concepts))
    optimizer = torch.optim.AdamW([*model.parameters(), *words.parameters()], lr=ENCODER_LR)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, ENCODER_LR, ENCODER_STEPS)
    for step in range(ENCODER_STEPS):
        videos = [make_video(rng) for _ in range(BATCH_SIZE)]
        times = [rng.choice((rng.uniform(0, 0.25), 0.5, rng.uniform(0.75, 1))) for _ in videos]
        pairs = zip(videos, times, strict=True)
        pictures = torch.cat([draw(video, [time], SIDE, SIDE) for video, time in pairs])
        noise = 0.05 * torch.randn(pictures.shape, generator=generator)
        pixels = ((pictures / 255 + noise - mean) / std).permute(0, 3, 1, 2)
        shown = [DOMAIN.indices(v, int(2 * t + 0.5), 3) for v, t in zip(videos, times, strict=True)]
        logits = words(model(pixel_values=pixels).image_embeds).view(BATCH_SIZE, 3, -1)
        targets = torch.tensor(shown) - torch.arange(3) * logits.shape[2]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if (step + 1) % 100 == 0:
            right = (logits.argmax(dim=2) == targets).float().mean().item()
            log.info(f"teaching the encoder: step {step + 1}/{ENCODER_STEPS}, {right:.0%} right")


# The files


def main(out: Path, with_llama: bool) -> None:
    """Raises UserError."""
    videos = {split: videos_of(split, num) for split, num in SPLITS.items()}
    parts: dict[str, Callable[[Path], None]] = {
        "videos": lambda folder: write_videos(folder, videos),
        f"data/{DATASET}": lambda folder: write_rows(folder, videos, is_swapped=False),
        f"data_swapped/{DATASET}": lambda folder: write_rows(folder, videos, is_swapped=True),
        "clip": write_encoder,
    }
    if with_llama:
        parts["pretrained/llama"] = _write_llama
    for name, fill in parts.items():
        target = out / name
        if exists(target):
            log.info(f"{target} is there already")
            continue
        make_folder(target.parent)
        write_folder(target, fill)
        log.info(f"{target} is made")


def videos_of(split: str, num: int) -> dict[str, Video]:
    rng = random.Random(f"{SEED} {split}")
    return {f"{split}-{n:03d}": make_video(rng) for n in range(num)}


def write_videos(folder: Path, videos: dict[str, dict[str, Video]]) -> None:
    for of_split in videos.values():
        for name, video in of_split.items():
            write_video(folder / f"{name}.mp4", video)


def write_rows(folder: Path, videos: dict[str, dict[str, Video]], is_swapped: bool) -> None:
    """`is_swapped`: what is asked about a val video, and its caption, name the next one."""
    for split, of_split in videos.items():
        names = list(of_split)
        if is_swapped and split == "val":
            names = [*names[1:], *names[:1]]
        rng, lines = random.Random(f"{SEED} questions {split}"), []
        for name, video in zip(names, of_split.values(), strict=True):
            lines += [json.dumps(row) for row in _rows(rng, name, video)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _rows(rng: random.Random, name: str, video: Video) -> list[dict[str, Any]]:
    rows = []
    for question_type in DOMAIN.types:
        text, options, answer = DOMAIN.question(rng, video, question_type)
        row = {"video": name, "question": text, "options": options, "answer": answer}
        rows.append({**row, "type": question_type, "caption": video.caption()})
    return rows


def _write_llama(folder: Path) -> None:
    (folder / MODEL_NAME).mkdir()
    make_tokenizer(folder / "tokenizer.model", SEED, DOMAIN)
    make_llama(folder, SEED, LLAMA_STEPS, DOMAIN)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), "--no_llama" not in sys.argv[2:])
    except UserError as error:
        log.error(error.details)
        sys.exit(error.exit_code)
