"""Three data sets under one folder, whose videos have the same ids and different features."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from support.annotation_files import put, star_item, tvqa_row
from support.toy_dataset import ToyData, sentence

NUM_TRAIN = {"nextqa": 20, "star": 9, "tvqa": 6}
NUM_VAL = {"nextqa": 10, "star": 5, "tvqa": 4}
KINDS = ("Interaction", "Sequence")


def add_datasets(toy: ToyData) -> None:
    """STAR and TVQA beside the toy NExT-QA. Some clips lie past the end of their video."""
    folder, rng = toy.folder / "data", random.Random(5)
    for split, prefix in (("train", "v"), ("val", "w")):
        counts = NUM_TRAIN if split == "train" else NUM_VAL
        star = [_star(rng, i, f"{prefix}{i % 3:04d}") for i in range(counts["star"])]
        put(folder / "star" / f"STAR_{split}.json", star)
        tvqa = [_tvqa(rng, i, f"{prefix}{i % 3:04d}") for i in range(counts["tvqa"])]
        put(folder / "tvqa" / f"tvqa_{split}.jsonl", tvqa)
    videos = list(toy.features)
    generator = torch.Generator().manual_seed(7)
    for name in ("star", "tvqa"):
        features = {video: torch.randn(6, 768, generator=generator) for video in videos}
        torch.save(features, folder / name / "clipvitl14.pth")
        captions = {video: f"{sentence(rng, 5)}. {sentence(rng, 4)}." for video in videos}
        put(folder / name / "blip2_n6.json", json.dumps(captions))
    for video in videos:
        srt = f"1\n00:00:00,0 --> 00:00:01,0\n{sentence(rng, 3)}\n"
        put(folder / "tvqa" / "tvqa_subtitles" / f"{video}.srt", srt)


def _star(rng: random.Random, index: int, video: str) -> dict[str, Any]:
    texts = [sentence(rng, 2) for _ in range(3 + index % 2)]
    choices = [{"choice_id": i, "choice": text} for i, text in enumerate(texts)]
    return star_item(
        question_id=f"{KINDS[index % 2]}_T1_{index}",
        video_id=video,
        question=sentence(rng, 4),
        start=index % 3,
        end=index % 3 + 2,
        answer=texts[index % len(texts)],
        choices=choices,
    )


def _tvqa(rng: random.Random, index: int, video: str) -> dict[str, Any]:
    options = {f"a{i}": sentence(rng, 2) for i in range(5)}
    return tvqa_row(vid_name=video, qid=index, q=sentence(rng, 4), ts="0-1", **options)


def mixed(folder: Path) -> ToyData:
    toy = ToyData(folder)
    add_datasets(toy)
    return toy
