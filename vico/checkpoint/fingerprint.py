"""Digests of what a run is trained on: the backbone, the questions, the captions, the features.

Checkpoints store them, so that resuming with another LLaMA or other data is detected. They depend
on content alone, not on paths, shards or file formats, and cover every number. Results are cached
per file: a 7B backbone takes some seconds the first time and none after that.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from vico.data.features import Features
from vico.data.types import Question
from vico.io.digest import digest_chunks
from vico.io.file_cache import FileCache, cache_key, file_stamp
from vico.model.config import backbone_shapes
from vico.model.weights.load import Weights

DIGEST_LENGTH = 16
# Elements of a tensor that a thread reads at a time.
CHUNK_ELEMENTS = 1 << 24
MAX_THREADS = 8


def of_run(
    weights: Weights,
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    features: Features,
    cache: FileCache,
) -> dict[str, str]:
    """The fingerprints of everything a resumed run must keep, by the names used in messages."""
    trained_on = {split: questions[split] for split in ("train", "val")}
    data = of_data(trained_on, captions, features, cache)
    return {"backbone": of_backbone(weights, cache), **data}


def of_backbone(weights: Weights, cache: FileCache) -> str:
    """Of all frozen tensors under Meta's names."""
    shapes = backbone_shapes(weights.config)

    def read_chunks(name: str) -> Iterable[Tensor]:
        num_elements = torch.Size(shapes[name]).numel()
        for start in range(0, num_elements, CHUNK_ELEMENTS):
            yield weights.read_slice(name, start, min(start + CHUNK_ELEMENTS, num_elements))

    stamps = [file_stamp(path) for path in sorted(weights.folder.iterdir()) if path.is_file()]
    key = cache_key("backbone", *stamps)
    return _cached(key, cache, lambda: _digest_tensors(sorted(shapes), read_chunks))


def of_data(
    questions: Mapping[str, Sequence[Question]],
    captions: Mapping[str, str],
    features: Features,
    cache: FileCache,
) -> dict[str, str]:
    """Of each split's questions, and of the captions and features of their videos."""
    videos = sorted({q.video for split in questions.values() for q in split})
    video_digest = _digest_parts(video.encode() for video in videos)
    key = cache_key("features", file_stamp(features.path), video_digest)

    def digest_features() -> str:
        return _digest_tensors(videos, lambda video: [features.frames(video)])

    fingerprints = {f"data {split} questions": of_questions(q) for split, q in questions.items()}
    fingerprints["data captions"] = of_captions({v: captions[v] for v in videos if v in captions})
    fingerprints["data features"] = _cached(key, cache, digest_features)
    return fingerprints


def of_questions(questions: Sequence[Question]) -> str:
    """Of everything in the questions that training or evaluation uses, in their order."""
    return _digest_parts(map(_encode_question, questions))


def _encode_question(q: Question) -> bytes:
    fields = (q.qid, q.video, q.type, q.question, q.options, q.answer, q.feature_rows, q.dialogue)
    return repr(fields).encode()


def of_captions(captions: Mapping[str, str]) -> str:
    """Of the texts, in the mapping's order."""
    return _digest_parts(text.encode() for text in captions.values())


def _digest_tensors(names: Sequence[str], read_chunks: Callable[[str], Iterable[Tensor]]) -> str:
    """Of named tensors, read in chunks. Threads share the work: hashing releases the GIL."""

    def buffers(name: str) -> Iterable[bytes | memoryview]:
        yield name.encode()
        for chunk in read_chunks(name):
            yield str(chunk.dtype).encode()
            yield chunk.contiguous().view(torch.uint8).numpy().data

    def digest_one(name: str) -> bytes:
        return bytes.fromhex(digest_chunks(buffers(name)))

    num_threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(num_threads) as pool:
        return _digest_parts(pool.map(digest_one, names))


def _digest_parts(parts: Iterable[bytes]) -> str:
    """Each part is preceded by its length, so that no two lists of parts share a digest."""
    framed = (len(part).to_bytes(8, "little") + part for part in parts)
    return digest_chunks(framed, DIGEST_LENGTH)


def _cached(key: str | None, cache: FileCache, compute: Callable[[], str]) -> str:
    known = cache.get(key)
    if isinstance(known, str):
        return known
    result = compute()
    cache.put(key, result)
    return result
