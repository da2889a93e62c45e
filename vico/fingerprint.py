"""Short digests of what a run is trained on, kept in its checkpoints: another LLaMA or other data is noticed at resume.

They follow from content alone, not from paths, shards or file formats. Of tensors only samples are read, so that a 65B
model costs a second: another model or another extraction differs everywhere, a single changed number may be missed.
"""

import hashlib
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items

from torch import Tensor

from vico.data.features import Features
from vico.model.backbone import Weights
from vico.model.weights import backbone_shapes
from vico.records import Question

SAMPLES, SAMPLE_LENGTH = 4, 256  # per tensor of the backbone: so many runs of so many numbers


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:16]


def _bytes(values: Tensor) -> bytes:
    return values.float().contiguous().numpy().tobytes()


def of_backbone(weights: Weights) -> str:
    def parts() -> Iterable[bytes]:
        for name, shape in sorted(backbone_shapes(weights.shape).items()):
            yield f"{name} {shape}".encode()
            size = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
            length = min(SAMPLE_LENGTH, size)
            for i in range(SAMPLES):
                first = (size - length) * i // (SAMPLES - 1)
                yield _bytes(weights.read_slice(name, first, first + length))

    return _digest(parts())


def of_run(
    weights: Weights, questions: Mapping[str, Items[Question]], captions: Mapping[str, str], features: Features
) -> dict[str, str]:  # fmt: skip
    """Of all that a run must keep, by what it is called in messages."""
    trained_on = {split: questions[split] for split in ("train", "val")}
    return {"backbone": of_backbone(weights), **of_data(trained_on, captions, features)}


def of_data(questions: Mapping[str, Items[Question]], captions: Mapping[str, str], features: Features) -> dict[str, str]:
    """One digest for each split's questions, for the captions of those videos, and for their features' first and last frames."""
    videos = sorted({q.video for asked in questions.values() for q in asked})
    return {
        **{f"data {split} questions": of_questions(asked) for split, asked in questions.items()},
        "data captions": of_captions({v: captions[v] for v in videos if v in captions}),
        "data features": _digest(_bytes(features.ends(v)) for v in videos),
    }


def of_questions(questions: Items[Question]) -> str:
    return _digest(map(_question, questions))


def of_captions(captions: Mapping[str, str]) -> str:
    return _digest(text.encode() for text in captions.values())


def _question(q: Question) -> bytes:
    return repr((q.qid, q.video, q.type, q.question, q.options, q.answer, q.feature_rows, q.dialogue)).encode()
