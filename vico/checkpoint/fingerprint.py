"""Short digests of what a run is trained on, kept in its checkpoints: another LLaMA or other data is noticed at resume.

They follow from content alone, not from paths, shards or file formats, and every number counts. What has been read once is
remembered by the marks of its files: a 7B backbone takes some seconds the first time, and none after that.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vico.data.features import Features
from vico.data.types import Question
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.model.config import backbone_shapes
from vico.model.weights.load import Weights

PIECE = 1 << 24  # numbers that a thread reads at a time
MAX_THREADS = 8


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _of_tensors(names: Sequence[str], pieces: Callable[[str], Iterable[Tensor]]) -> str:
    """Of named tensors that are given piece by piece; hashing leaves Python's lock, so that threads share the work."""

    def one(name: str) -> bytes:
        digest = hashlib.sha256(name.encode())
        for piece in pieces(name):
            digest.update(str(piece.dtype).encode())
            digest.update(piece.contiguous().view(torch.uint8).numpy().data)
        return digest.digest()

    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        return _digest(pool.map(one, names))


def _remembered(key: str | None, cache: FileCache, make: Callable[[], str]) -> str:
    found = cache.get(key)
    if not isinstance(found, str):
        found = make()
        cache.put(key, found)
    return found


def of_backbone(weights: Weights, cache: FileCache) -> str:
    shapes = backbone_shapes(weights.config)

    def pieces(name: str) -> Iterable[Tensor]:
        size = torch.Size(shapes[name]).numel()
        return (
            weights.read_slice(name, first, min(first + PIECE, size))
            for first in range(0, size, PIECE)
        )

    marks = [file_stamp(path) for path in sorted(weights.folder.iterdir()) if path.is_file()]
    return _remembered(
        cache_key("backbone", *marks), cache, lambda: _of_tensors(sorted(shapes), pieces)
    )


def of_run(
    weights: Weights,
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    features: Features,
    cache: FileCache,
) -> dict[str, str]:
    """Of all that a run must keep, by what it is called in messages."""
    trained_on = {split: questions[split] for split in ("train", "val")}
    return {
        "backbone": of_backbone(weights, cache),
        **of_data(trained_on, captions, features, cache),
    }


def of_data(
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    features: Features,
    cache: FileCache,
) -> dict[str, str]:
    """One digest for each split's questions, for the captions of those videos, and for their features."""
    videos = sorted({q.video for asked in questions.values() for q in asked})
    key = cache_key(
        "features", file_stamp(features.path), _digest(video.encode() for video in videos)
    )
    return {
        **{f"data {split} questions": of_questions(asked) for split, asked in questions.items()},
        "data captions": of_captions({v: captions[v] for v in videos if v in captions}),
        "data features": _remembered(
            key, cache, lambda: _of_tensors(videos, lambda video: [features.frames(video)])
        ),
    }


def of_questions(questions: Sequence[Question]) -> str:
    return _digest(map(_question, questions))


def of_captions(captions: Mapping[str, str]) -> str:
    return _digest(text.encode() for text in captions.values())


def _question(q: Question) -> bytes:
    return repr(
        (q.qid, q.video, q.type, q.question, q.options, q.answer, q.feature_rows, q.dialogue)
    ).encode()
