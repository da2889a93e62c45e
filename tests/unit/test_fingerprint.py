"""Fingerprints: they cover all that a result depends on."""

import hashlib
import json
import struct
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vico.checkpoint import fingerprint
from vico.checkpoint.fingerprint import of_llama_config
from vico.data.text_windows import Text
from vico.data.tokenizer import content_digests
from vico.data.types import Question
from vico.model.config import LlamaConfig, RopeScaling, backbone_shapes

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, vocab_size=100, n_kv_heads=2)
OTHER_VALUES = {
    "dim": 128,
    "n_layers": 3,
    "n_heads": 8,
    "vocab_size": 101,
    "multiple_of": 512,
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "n_kv_heads": 1,
    "ffn_dim_multiplier": 2.0,
    "rope_scaling": RopeScaling(),
    "own_head_dim": 32,
}
# Refused where it is shorter than a sequence may be, so it changes nothing.
WITHOUT_EFFECT = {"sliding_window"}


def test_every_number_of_a_backbone_is_covered() -> None:
    """By the shapes, which the digest of the tensors covers, or as a text of its own."""
    assert OTHER_VALUES.keys() | WITHOUT_EFFECT == {field.name for field in fields(LlamaConfig)}
    for name, value in OTHER_VALUES.items():
        other = replace(CONFIG, **{name: value})
        same_shapes = backbone_shapes(other) == backbone_shapes(CONFIG)
        assert not same_shapes or of_llama_config(other) != of_llama_config(CONFIG), name


# ---- digests of content, worked out from their bytes


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def framed(*parts: bytes) -> str:
    """The first 16 digits of the digest of parts, each behind its length in 8 bytes."""
    return sha256(b"".join(struct.pack("<Q", len(part)) + part for part in parts))[:16]


def asked(video: str, dataset: str = "my") -> Question:
    return Question(7, "q1", video, "CW", "why", ("a", "b"), 1, (2, 5), " hi", "c", dataset=dataset)


def test_digests_of_texts() -> None:
    """Checkpoints of earlier versions hold these values."""
    encoded = [
        f"('q1', '{video}', 'CW', 'why', ('a', 'b'), 1, (2, 5), ' hi')".encode() for video in "vw"
    ]
    questions = [asked("v"), asked("w")]
    assert fingerprint.of_questions(questions) == framed(*encoded)
    assert fingerprint.of_questions(questions[::-1]) == framed(*encoded[::-1])
    captions = {"w": "x", "v": "\u00e9"}
    assert fingerprint.of_captions(captions) == framed(b"x", b"\xc3\xa9")
    assert fingerprint.of_captions(captions, ["u"]) == framed(b"x", b"\xc3\xa9", b"('u',)")
    texts = [Text(Path("a"), [1, 258], 9), Text(Path("b"), [-1], 1)]
    numbers = [struct.pack("<qq", 1, 258), b"\xff" * 8]
    assert fingerprint.of_tokens(texts) == framed(*numbers)


def test_the_digest_of_a_tokenizer(tmp_path: Path) -> None:
    """One that an earlier version took of this very file stays; any other is replaced."""
    path = tmp_path / "tokenizer.model"
    path.write_text("YQ== 0\n")
    digests = [digest[:16] for digest in content_digests(path)]
    for recorded, expected in ((None, digests[0]), ("x", digests[0]), (digests[-1], digests[-1])):
        assert fingerprint.of_tokenizer(path, recorded) == expected


def test_names_of_fingerprints() -> None:
    assert fingerprint.data_prefix("my", 1) == "data"
    assert fingerprint.data_prefix("my", 2) == "data my:"
    inputs: Any = {"my": "I", "star": "J"}
    weights: Any = None
    questions = {"train": [asked("v"), asked("w", "star")], "val": [asked("u")]}
    sources = fingerprint.Sources(weights, Path(), inputs, questions)
    assert list(sources.parts()) == [
        ("data my:", "I", {"train": [asked("v")], "val": [asked("u")]}),
        ("data star:", "J", {"train": [asked("w", "star")], "val": []}),
    ]


def test_digests_of_tensors() -> None:
    """Of the name, then of the type and the bytes of each chunk; a group's, of its tensors'."""
    tensors = {"a": torch.tensor([[1, 2], [3, 4]]).T, "b": torch.ones(1, dtype=torch.bfloat16)}
    verified = list[str]()
    groups = {"both": ["b", "a"], "one": ["a"]}
    tensor_set = fingerprint.TensorSet(
        "it", [], {}, lambda name: tensors[name].split(1), verified.append, groups
    )
    rows = [b"torch.int64" + struct.pack("<qq", *row) for row in ((1, 3), (2, 4))]
    digests = {name: tensor_set.digest(name) for name in tensors}
    assert digests == {
        "a": sha256(b"a" + rows[0] + rows[1]),
        "b": sha256(b"btorch.bfloat16" + b"\x80\x3f"),
    }
    assert verified == ["a", "b"]
    a, b = (bytes.fromhex(digest) for digest in digests.values())
    assert tensor_set.fingerprints(digests) == {"both": framed(b, a), "one": framed(a)}


def test_chunks_of_a_backbone(tmp_path: Path) -> None:
    """The digest has the type before each 16 Mi elements, so their number may never change."""
    config = replace(CONFIG, vocab_size=2**18 + 1)
    read = list[tuple[str, int, int]]()

    def read_slice(name: str, start: int, stop: int) -> torch.Tensor:
        read.append((name, start, stop))
        return torch.zeros(1, dtype=torch.bfloat16)

    (tmp_path / "params.json").write_text("{}")
    weights: Any = SimpleNamespace(
        config=config, read_slice=read_slice, folder=tmp_path, verify=None
    )
    backbone = fingerprint.backbone_tensors(weights)
    shapes = backbone_shapes(config)
    assert read == [(name, 0, 1) for name in shapes]
    assert backbone.paths == [tmp_path / "params.json"]
    assert backbone.groups == {"backbone": sorted(shapes)}
    assert backbone.num_bytes["output.weight"] == 2 * 64 * (2**18 + 1)
    assert backbone.num_bytes["norm.weight"] == 2 * 64
    read.clear()
    for name in ("output.weight", "norm.weight"):
        assert len(list(backbone.read_chunks(name))) == (2 if name == "output.weight" else 1)
    assert read == [
        ("output.weight", 0, 2**24),
        ("output.weight", 2**24, 2**24 + 64),
        ("norm.weight", 0, 64),
    ]


def test_features_of_splits() -> None:
    """Each split's videos, sorted; of all together in a run that trains."""
    features: Any = SimpleNamespace(
        header=lambda video: SimpleNamespace(num_bytes=len(video)),
        frames=lambda video: torch.ones(1),
        paths=[],
        verify=None,
    )
    train = [asked(video) for video in ("w", "v", "v")]
    questions = {"train": train, "val": [asked("uu"), asked("v")]}
    found = fingerprint.feature_tensors(features, questions, "data my:")
    assert found.groups == {
        "data my: train features": ["v", "w"],
        "data my: val features": ["uu", "v"],
        "data my: features": ["uu", "v", "w"],
    }
    assert list(found.num_bytes.items()) == [("uu", 2), ("v", 1), ("w", 1)]
    alone = fingerprint.feature_tensors(features, {"val": [asked("v")]})
    assert alone.groups == {"data val features": ["v"]}


def test_fingerprints_of_everything_but_tensors(tmp_path: Path) -> None:
    """Captions are those of all videos; in a run that trains, lacking ones count."""
    (tmp_path / "tokenizer.model").write_text("YQ== 0\n")
    tokenizer = fingerprint.of_tokenizer(tmp_path / "tokenizer.model", None)
    inputs: Any = {"my": SimpleNamespace(captions={"v": "x", "b": "y", "z": "unused"})}
    weights: Any = SimpleNamespace(config=CONFIG)
    train, val = [asked(name) for name in ("v", *"utsrw", "v")], [asked("b")]
    sources = fingerprint.Sources(
        weights, tmp_path / "tokenizer.model", inputs, {"train": train, "val": val}
    )
    expected = {
        "backbone n_heads": "4",
        "backbone n_kv_heads": "2",
        "backbone norm_eps": json.dumps(CONFIG.norm_eps),
        "backbone rope_theta": json.dumps(CONFIG.rope_theta),
        "backbone rope_scaling": "null",
        "tokenizer": tokenizer,
        "data train questions": fingerprint.of_questions(train),
        "data val questions": fingerprint.of_questions(val),
        "data train captions": framed(b"x", b"('r', 's', 't', 'u', 'w')"),
        "data captions": framed(b"y", b"x", b"('r', 's', 't', 'u', 'w')"),
    }
    assert fingerprint.of_texts(sources, {}) == expected
    texts = [Text(Path("a"), [1], 9)]
    with_text = fingerprint.of_texts(replace(sources, texts=texts), {"tokenizer": "old"})
    assert with_text == {**expected, "data text": fingerprint.of_tokens(texts)}
    alone = fingerprint.of_texts(replace(sources, questions={"val": val}), {})
    for name in ("data train questions", "data train captions", "data captions"):
        del expected[name]
    assert alone == expected
    nothing: Any = {"my": SimpleNamespace(captions={})}
    without = fingerprint.of_texts(replace(sources, datasets=nothing), {})
    assert without["data captions"] == without["data train captions"] == framed()
