"""Writes a small NExT-QA, of rows drawn from the one that a user has, for smollm2_nextqa.sh.

Usage: python smollm2_nextqa.py NEXTQA DATASET NUM_ROWS FEATURES. It makes the folder DATASET of
NUM_ROWS labelled rows for train.csv and as many for val.csv, and prints where their features are.
FEATURES: a file or folder of them; empty: those in NEXTQA, or else stand-ins.
"""

import csv
import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from vico.data import feature_files
from vico.data.readers import nextqa
from vico.data.types import Question
from vico.errors import UserError, fail
from vico.io import log
from vico.io.atomic import write_folder
from vico.io.paths import exists

SEED = 0
COLUMNS = ("video", "question", "answer", "qid", "type", *nextqa.OPTIONS)
NUM_FRAMES, WIDTH = 16, 768  # of a stand-in
NORM = 10.0  # of a frame of CLIP, nearly


def main(source: Path, target: Path, num_rows: int, features: str) -> Path:
    """Returns the path of the features. Raises UserError."""
    splits = {"train": _labelled_for_training(source), "val": _read(source, "val")}
    for split, questions in splits.items():
        if len(questions) > num_rows:
            splits[split] = random.Random(SEED).sample(questions, num_rows)
        log.warning(f"{split}: {len(splits[split])} of {len(questions)} rows")
    found = feature_files.find(source, Path(features) if features else None)
    stand_in = not exists(found)

    def fill(folder: Path) -> None:
        for split, questions in splits.items():
            _write(folder / f"{split}.csv", questions)
        if stand_in:
            videos = {q.video for questions in splits.values() for q in questions}
            content = {video: stand_in_frames(video) for video in sorted(videos)}
            torch.save(content, folder / feature_files.DEFAULT_NAME)

    target.parent.mkdir(parents=True, exist_ok=True)
    write_folder(target, fill)
    if not stand_in:
        return found.absolute()
    log.warning(
        f"{source} holds no features: random stand-ins take their place, of which nothing about a "
        "video can be learned; for real ones name their file or folder as the third argument"
    )
    return target / feature_files.DEFAULT_NAME


def _labelled_for_training(source: Path) -> Sequence[Question]:
    has_train, has_test = (exists(nextqa.annotation_file(source, s)) for s in ("train", "test"))
    if has_train or not has_test:
        return _read(source, "train")
    log.warning(f"{source} holds no train.csv: rows of test.csv are trained on")
    return _read(source, "test")


def _read(source: Path, split: str) -> Sequence[Question]:
    questions = [q for q in nextqa.read(source, split) if q.answer is not None]
    if not questions:
        fail(f"{nextqa.annotation_file(source, split)}: no row has an answer; name another folder")
    return questions


def _write(path: Path, questions: Sequence[Question]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for q in questions:
            table.writerow([q.video, q.question, q.answer, q.qid, q.type, *q.options])


def stand_in_frames(video: str) -> Tensor:
    """[NUM_FRAMES, WIDTH], a function of the id, with a direction that is common to all videos."""
    common = torch.randn(WIDTH, generator=torch.Generator().manual_seed(SEED))
    digest = hashlib.sha256(f"{SEED} {video}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    own = torch.randn(WIDTH, generator=generator)
    frames = torch.randn(NUM_FRAMES, WIDTH, generator=generator)
    return torch.nn.functional.normalize(common + 0.3 * own + 0.1 * frames, dim=1) * NORM


if __name__ == "__main__":
    try:
        print(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    except UserError as error:
        log.error(error.details)
        sys.exit(error.exit_code)
