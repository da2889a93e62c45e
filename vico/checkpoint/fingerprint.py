"""Digests of what a run's result depends on: the backbone, its tokenizer, and the data.

Checkpoints store them, so that going on with another LLaMA or other data is detected. Those of
tensors and texts depend on content alone, not on paths, shards or file formats, and cover every
number. Those of a tokenizer in two file formats differ. train/shared_digests.py takes those of
tensors, which are large.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vico.data.features import Features
from vico.data.micro_batches import DatasetInputs
from vico.data.text_windows import Text
from vico.data.tokenizer import content_digests
from vico.data.types import Question
from vico.io.digest import digest_chunks
from vico.model.config import LlamaConfig, backbone_shapes
from vico.model.weights.load import Weights, weight_files

DIGEST_LENGTH = 16
# Elements of a tensor that a thread reads at a time.
CHUNK_ELEMENTS = 1 << 24
TEXT = "data text"  # the fingerprint of --text


@dataclass(frozen=True)
class Sources:
    """What fingerprints are taken of, opened."""

    weights: Weights
    tokenizer_path: Path
    datasets: Mapping[str, DatasetInputs]  # by name
    questions: Mapping[str, Sequence[Question]]  # by split, of all data sets
    texts: Sequence[Text] = ()  # of --text

    def parts(self) -> Iterator[tuple[str, DatasetInputs, dict[str, list[Question]]]]:
        """(what the names of its fingerprints begin with, inputs, questions by split) of each."""
        for name, inputs in self.datasets.items():
            questions = {}
            for split, of_split in self.questions.items():
                questions[split] = [q for q in of_split if q.dataset == name]
            yield data_prefix(name, len(self.datasets)), inputs, questions


def data_prefix(dataset: str, num_datasets: int) -> str:
    """What the names of a data set's fingerprints begin with, in a run over `num_datasets`.

    The first word is "data": --allow_change knows it. No name of a data set holds a colon.
    """
    return "data" if num_datasets == 1 else f"data {dataset}:"


@dataclass(frozen=True)
class TensorSet:
    """Named tensors of files, and the fingerprints that are made of their digests."""

    what: str  # in messages and in the cache
    paths: Sequence[Path]  # all files of it
    num_bytes: Mapping[str, int]  # by tensor
    read_chunks: Callable[[str], Iterable[Tensor]]
    verify: Callable[[str], None]  # compares the tensor with its file's checksum
    groups: Mapping[str, Sequence[str]]  # fingerprint -> its tensors, in the digest's order

    def digest(self, name: str) -> str:
        """Of one tensor. Raises UserError for a wrong checksum. Hashing releases the GIL."""
        self.verify(name)
        return digest_chunks(self._buffers(name))

    def _buffers(self, name: str) -> Iterable[bytes | memoryview]:
        yield name.encode()
        for chunk in self.read_chunks(name):
            yield str(chunk.dtype).encode()
            yield chunk.contiguous().view(torch.uint8).numpy().data

    def fingerprints(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Of each group. `digests`: of all tensors."""
        result = {}
        for group, names in self.groups.items():
            result[group] = _digest_parts(bytes.fromhex(digests[name]) for name in names)
        return result


def backbone_tensors(weights: Weights) -> TensorSet:
    """All frozen tensors under Meta's names."""
    shapes = backbone_shapes(weights.config)

    def read_chunks(name: str) -> Iterable[Tensor]:
        num_elements = torch.Size(shapes[name]).numel()
        for start in range(0, num_elements, CHUNK_ELEMENTS):
            yield weights.read_slice(name, start, min(start + CHUNK_ELEMENTS, num_elements))

    num_bytes = {}
    for name, shape in shapes.items():
        element = weights.read_slice(name, 0, 1)
        num_bytes[name] = torch.Size(shape).numel() * element.element_size()
    groups = {"backbone": sorted(shapes)}
    paths = weight_files(weights.folder)
    return TensorSet("backbone", paths, num_bytes, read_chunks, weights.verify, groups)


def feature_tensors(
    features: Features, questions: Mapping[str, Sequence[Question]], prefix: str = "data"
) -> TensorSet:
    """The features of the videos of each split and, for a run that trains, of all its splits."""
    videos = {f"{prefix} {split} features": _videos(q) for split, q in questions.items()}
    groups = dict(videos)
    if "train" in questions:
        groups[f"{prefix} features"] = sorted({v for names in videos.values() for v in names})
    num_bytes = {}
    for video in sorted({name for names in groups.values() for name in names}):
        num_bytes[video] = features.header(video).num_bytes
    return TensorSet(
        "features",
        features.paths,
        num_bytes,
        lambda video: [features.frames(video)],
        features.verify,
        groups,
    )


def of_texts(sources: Sources, recorded: Mapping[str, str]) -> dict[str, str]:
    """The fingerprints of everything but tensors. Each is taken in a few seconds at most.

    `recorded`: those of the checkpoint that they will be compared with.
    """
    fingerprints = of_llama_config(sources.weights.config)
    fingerprints["tokenizer"] = of_tokenizer(sources.tokenizer_path, recorded.get("tokenizer"))
    for prefix, inputs, questions in sources.parts():
        for split, of_split in questions.items():
            fingerprints[f"{prefix} {split} questions"] = of_questions(of_split)
        if "train" in questions:
            fingerprints |= _of_all_captions(prefix, inputs.captions, questions)
    if sources.texts:
        fingerprints[TEXT] = of_tokens(sources.texts)
    return fingerprints


def _of_all_captions(
    prefix: str, captions: Mapping[str, str], questions: Mapping[str, Sequence[Question]]
) -> dict[str, str]:
    """Of those that are trained on, and of those of all splits."""
    trained = _videos(questions["train"])
    lacking = [v for v in trained if v not in captions] if captions else []
    fingerprints = {}
    for name, videos in (
        ("train captions", trained),
        ("captions", sorted({v for of_split in questions.values() for v in _videos(of_split)})),
    ):
        used = {v: captions[v] for v in videos if v in captions}
        fingerprints[f"{prefix} {name}"] = of_captions(used, lacking)
    return fingerprints


def of_tokenizer(path: Path, recorded: str | None) -> str:
    """`recorded` where an earlier version took it of this very file."""
    digests = [digest[:DIGEST_LENGTH] for digest in content_digests(path)]
    return recorded if recorded in digests else digests[0]


def of_llama_config(config: LlamaConfig) -> dict[str, str]:
    """What the shapes of the tensors do not show, as text: a change is then shown as it is."""
    scaling = config.rope_scaling
    values = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling is None else asdict(scaling),
    }
    return {f"backbone {name}": json.dumps(value) for name, value in values.items()}


def of_questions(questions: Sequence[Question]) -> str:
    """Of everything in the questions that training or evaluation uses, in their order."""
    return _digest_parts(map(_encode_question, questions))


def _encode_question(q: Question) -> bytes:
    fields = (q.qid, q.video, q.type, q.question, q.options, q.answer, q.feature_rows, q.dialogue)
    return repr(fields).encode()


def of_captions(captions: Mapping[str, str], lacking: Sequence[str] = ()) -> str:
    """Of the texts, in the mapping's order, and of the videos that have none."""
    parts = [text.encode() for text in captions.values()]
    if lacking:
        parts.append(repr(tuple(lacking)).encode())
    return _digest_parts(parts)


def of_tokens(texts: Sequence[Text]) -> str:
    """Of the tokens of plain texts, in their order."""
    return _digest_parts(np.array(text.token_ids, "<i8").tobytes() for text in texts)


def _videos(questions: Sequence[Question]) -> list[str]:
    return sorted({q.video for q in questions})


def _digest_parts(parts: Iterable[bytes]) -> str:
    """Each part is preceded by its length, so that no two lists of parts share a digest."""
    framed = (len(part).to_bytes(8, "little") + part for part in parts)
    return digest_chunks(framed, DIGEST_LENGTH)
