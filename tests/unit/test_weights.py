"""Backbones of every kind against `transformers`, every layout on the disk against the others, and files that are not what they say."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from reference import oracle_files
from support.backbones import (
    KINDS,
    LENGTH,
    LOGITS_RTOL,
    NUM_RANKS,
    distance,
    logits,
    make_hugging_face,
    make_llama_3_tokenizers,
    make_model,
    text,
)
from support.processes import succeeds
from support.toy_dataset import ToyData, records
from vico.cli.flags import parse
from vico.data.packing import Example, pack
from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.distributed.world import World as Ranks
from vico.errors import UserError
from vico.model.attention.backends import KERNELS
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend
from vico.model.attention.reference import attend_plain
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.config import LlamaConfig, RopeScaling, backbone_shapes, trainable_shapes
from vico.model.llama import rotary_angles
from vico.model.weights.hf import mlp_rule, stored_name, stored_rows
from vico.model.weights.load import Weights, open_weights
from vico.train.build import read_inputs

GRADIENT_RTOL = 1e-5  # likewise


@pytest.mark.parametrize(
    "attend",
    [attend_blocks, attend_plain, PackedAttention(KERNELS["sdpa"])],
    ids=["blocks", "plain", "packed"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, attend: Attend, tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS[kind])
    weights = open_weights(tmp_path, None)
    with torch.no_grad():
        expected = reference(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights), attend), expected) < LOGITS_RTOL


def test_the_files_that_transformers_splits(tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"], shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = open_weights(tmp_path, 400)
    with torch.no_grad():
        assert (
            distance(logits(weights, text(weights)), reference(text(weights)[None]).logits[0])
            < LOGITS_RTOL
        )


def test_the_stretching_of_the_rotary_embedding_is_in_sight() -> None:
    """The cases above could not tell it from none if it changed nothing at their length."""
    plain, stretched = (
        rotary_angles(torch.arange(LENGTH), 16, 500000.0, s)
        for s in (None, RopeScaling(4.0, 1.0, 4.0, 16))
    )
    assert (plain - stretched).abs().amax(dim=(0, 1)).gt(1e-3).sum() >= 3


def test_fewer_adapted_layers_run_all_layers(tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"] | {"num_hidden_layers": 3})
    weights = open_weights(tmp_path, None)
    with torch.no_grad():
        expected = reference(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights), num_adapted=1), expected) < LOGITS_RTOL


# ---- grouped queries in training ---------------------------------------------------------------------------------------


class Ungrouped:
    """The same model with every key and value head written out once per query head: no grouped-query attention anywhere."""

    def __init__(self, weights: Weights) -> None:
        self.folder, self._weights, shape = weights.folder, weights, weights.config
        self._head_dim, self._group = shape.head_dim, shape.n_heads // shape.kv_heads
        self.config = LlamaConfig(**{**vars(shape), "n_kv_heads": None})

    def read(self, name: str) -> Tensor:
        tensor = self._weights.read(name)
        if name.endswith(("wk.weight", "wv.weight")):
            return (
                tensor.unflatten(0, (-1, self._head_dim))
                .repeat_interleave(self._group, 0)
                .flatten(0, 1)
            )
        return tensor

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.read(name).flatten()[start:stop]


def video_batch(vocabulary: int) -> PackedBatch:
    """Two sequences with a video, one of them with two branches, and every kind of target."""
    generator = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary, (count,), generator=generator).tolist()

    examples = []
    for group in range(2):
        head, tail = [*ids(5), *[VIDEO_SLOT] * 10], ids(4)
        for task in range(2):
            examples.append(
                Example(
                    TokenSequence("vqa", (*head, *tail, *ids(6)), range(19, 25), 5), group, task
                )
            )
        examples.append(
            Example(
                TokenSequence("qav", (*ids(7), *[VIDEO_SLOT] * 10, 2), range(7, 17), 7), group, 3
            )
        )
    return pack(examples, torch.randn(2, 10, 768, generator=generator), share=True)


@pytest.mark.parametrize(
    "attend",
    [attend_blocks, attend_plain, PackedAttention(KERNELS["sdpa"])],
    ids=["blocks", "plain", "packed"],
)
def test_gradients_of_every_trainable_under_grouped_queries(attend: Attend, tmp_path: Path) -> None:
    make_hugging_face(tmp_path, KINDS["LLaMA-2-70B"])
    weights = open_weights(tmp_path, None)
    batch, found = video_batch(weights.config.vocab_size), []
    for model in (
        make_model(weights, attend, gate1=0.4),
        make_model(Ungrouped(weights), attend_plain, gate1=0.4),
    ):
        losses = model(batch)
        losses.mean().backward()
        found.append(
            (losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad})
        )
    (losses, gradients), (expected_losses, expected) = found
    assert distance(losses, expected_losses) < LOGITS_RTOL
    assert set(gradients) == set(trainable_shapes(weights.config, 2, 10, 10))
    for name, gradient in gradients.items():
        assert (
            gradient is not None and expected[name] is not None and expected[name].abs().max() > 0
        ), name
        assert distance(gradient, expected[name]) < GRADIENT_RTOL, name


# ---- layouts -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One grouped-query model in every layout, written here by hand: what `vico convert` writes is another test's."""
    home = tmp_path_factory.mktemp("layouts")
    params = {
        "dim": 64,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "multiple_of": 32,
        "ffn_dim_multiplier": 1.3,
        "vocab_size": 400,
    }
    shape = LlamaConfig(64, 2, 4, 400, 32, n_kv_heads=2, ffn_dim_multiplier=1.3)
    generator = torch.Generator().manual_seed(5)
    full = {
        n: torch.randn(s, generator=generator) / math.sqrt(s[-1]) + ("norm" in n)
        for n, s in backbone_shapes(shape).items()
    }
    for name, shards, embeddings_dim in (("one", 1, 1), ("two", 2, 1), ("two of LLaMA-3", 2, 0)):
        (home / name).mkdir()
        (home / name / "params.json").write_text(json.dumps(params))
        for rank in range(shards):
            part = {}
            for key, value in full.items():
                dim = embeddings_dim if "tok_embeddings" in key else oracle_files.shard_dim(key)
                part[key] = value if dim is None else value.chunk(shards, dim)[rank].clone()
            torch.save(part, home / name / f"consolidated.{rank:02d}.pth")
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config |= {"intermediate_size": shape.hidden_dim, "vocab_size": 400, "rms_norm_eps": 1e-5}
    stored = {
        stored_name(n): stored_rows(v, 16).contiguous() if "wq" in n or "wk" in n else v
        for n, v in full.items()
    }
    for name in ("HF", "HF in files"):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(stored, home / "HF" / "model.safetensors")
    where = {}
    for i, part_names in enumerate((sorted(stored)[:7], sorted(stored)[7:])):
        safetensors.torch.save_file(
            {n: stored[n] for n in part_names}, home / "HF in files" / f"model-{i}.safetensors"
        )
        where |= dict.fromkeys(part_names, f"model-{i}.safetensors")
    (home / "HF in files" / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": where})
    )
    return {folder.name: folder for folder in home.iterdir()}


LAYOUTS = ("two", "two of LLaMA-3", "HF", "HF in files")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model_bit_for_bit(layout: str, layouts: dict[str, Path]) -> None:
    one, other = open_weights(layouts["one"], 400), open_weights(layouts[layout], 400)
    assert backbone_shapes(one.config) == backbone_shapes(other.config)
    for name, shape in backbone_shapes(one.config).items():
        assert torch.equal(one.read(name), other.read(name)) and one.read(name).shape == shape, name
    assert torch.equal(logits(one, text(one)), logits(other, text(one)))


@pytest.mark.parametrize("layout", ("one", *LAYOUTS))
def test_slices_are_those_of_the_flattened_tensor(layout: str, layouts: dict[str, Path]) -> None:
    weights = open_weights(layouts[layout], 400)
    for name in backbone_shapes(weights.config):
        whole = weights.read(name).flatten()
        size, half = whole.numel(), whole.numel() // 2
        for start, stop in (
            (0, size),
            (0, 1),
            (size - 1, size),
            (half - 3, half + 5),
            (half, size),
            (7, half),
            (half - 70, half + 70),
            (5, 5),
        ):
            start, stop = max(start, 0), min(stop, size)
            assert torch.equal(weights.read_slice(name, start, stop), whole[start:stop]), (
                name,
                start,
                stop,
            )


@pytest.mark.parametrize("layout", ("two", "HF"))
def test_memory_holds_a_tensor_at_most(layout: str, tmp_path: Path) -> None:
    """Anonymous memory (what is not the files' own pages) while a model of 140 MB is read, and while slices of it are."""
    make_big(tmp_path, layout)
    weights = open_weights(tmp_path, None)
    largest = max(math.prod(s) for s in backbone_shapes(weights.config).values()) * 4
    before, peak = anonymous_bytes(), 0
    for name in backbone_shapes(weights.config):
        tensor = weights.read(name)
        peak = max(peak, anonymous_bytes() - before)
        assert tensor.numel()
        del tensor
    assert peak < 1.5 * largest
    before, peak = anonymous_bytes(), 0
    for name, shape in backbone_shapes(weights.config).items():
        size = math.prod(shape)
        part = weights.read_slice(name, size // 2, size // 2 + size // 8)
        peak = max(peak, anonymous_bytes() - before)
        assert part.numel() == size // 8
        del part
    assert peak < 0.4 * largest


def make_big(folder: Path, layout: str) -> None:
    if layout == "two":
        oracle_files.write_tiny_meta(
            folder,
            4000,
            dim=1024,
            n_layers=2,
            n_heads=8,
            shards=2,
            multiple_of=32,
            dtype=torch.float32,
        )
    else:
        make_hugging_face(
            folder, {"hidden_size": 1024, "vocab_size": 4000, "intermediate_size": 2752}
        )


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    "dim, width",
    [
        (4096, 11008),
        (8192, 28672),
        (4096, 14336),
        (2048, 8192),
        (64, 192),
        (64, 7),
        (96, 5000),
        (5120, 13824),
    ],
)
def test_every_width_of_the_mlp_has_a_rule(dim: int, width: int) -> None:
    multiple, widened = mlp_rule(dim, width)
    assert LlamaConfig(dim, 1, 1, 1, multiple, ffn_dim_multiplier=widened).hidden_dim == width


# ---- files that are not what they say --------------------------------------------------------------------------------------


def js(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def config(**changes: Any) -> Any:
    return lambda folder: js(folder / "config.json", **changes)


def index(change: Any) -> Any:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return damage


def tensors(change: Any) -> Any:
    def damage(folder: Path) -> None:
        content = safetensors.torch.load((folder / "model.safetensors").read_bytes())
        change(content)
        safetensors.torch.save_file(content, folder / "model.safetensors")

    return damage


def put(name: str, content: bytes) -> Any:
    return lambda folder: (folder / name).write_bytes(content)


NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
# name: (layout, damage, exit code, what the line says)
HOSTILE: dict[str, tuple[str, Any, int, str]] = {
    "no config": (
        "HF",
        lambda f: (f / "config.json").unlink(),
        2,
        "config.json: no such file; config.json, which comes with the LLaMA weights",
    ),
    "config cut off": (
        "HF",
        lambda f: os.truncate(f / "config.json", 20),
        2,
        "config.json:1: column ",
    ),
    "another model": (
        "HF",
        config(model_type="mistral"),
        2,
        "config.json: 'model_type' is 'mistral', and only 'llama' is read",
    ),
    "quantized": (
        "HF",
        config(quantization_config={}),
        2,
        "config.json: 'quantization_config' is given; quantized weights are not supported",
    ),
    "biases": (
        "HF",
        config(attention_bias=True),
        2,
        "config.json: attention_bias True: no LLaMA has this",
    ),
    "other heads": (
        "HF",
        config(num_attention_heads=8),
        2,
        "'model.layers.0.self_attn.k_proj.weight' has shape [32, 64], and config.json asks for",
    ),
    "odd groups": (
        "HF",
        config(num_key_value_heads=3),
        2,
        "num_attention_heads 4 over num_key_value_heads 3 is not a whole number",
    ),
    "width as text": (
        "HF",
        config(hidden_size="64"),
        2,
        "config.json: 'hidden_size' is '64' and must be a whole number from 1 to 1000000",
    ),
    "own head_dim": (
        "HF",
        config(head_dim=32),
        2,
        "config.json: head_dim 32: must be hidden_size over num_attention_heads, 16",
    ),
    "yarn": (
        "HF",
        config(rope_scaling={"type": "yarn", "factor": 2}),
        2,
        "config.json: rope_type 'yarn': only LLaMA-3's scaling of the rotary embedding",
    ),
    "rope as list": (
        "HF",
        config(rope_parameters=[1]),
        2,
        "config.json: 'rope_parameters' is [1] and must be an object",
    ),
    "rope without factor": (
        "HF",
        config(rope_parameters={"rope_type": "llama3"}),
        2,
        "factor None and low_freq_factor None",
    ),
    "more layers": (
        "HF",
        config(num_hidden_layers=3),
        2,
        "lacks 9 tensor(s), e.g. 'model.layers.2.input_layernorm.weight'; config.json and",
    ),
    "fewer layers": (
        "HF",
        config(num_hidden_layers=1),
        2,
        "holds unknown 9 tensor(s), e.g. 'model.layers.1.input_layernorm.weight'",
    ),
    "vocabulary": (
        "HF",
        config(vocab_size=401),
        2,
        "the embeddings have 401 rows and the tokenizer has 400 pieces",
    ),
    "tied, but is not": (
        "HF",
        config(tie_word_embeddings=True),
        2,
        "tie_word_embeddings is true, and lm_head.weight is not the embeddings",
    ),
    "no head": (
        "HF",
        tensors(lambda t: t.pop("lm_head.weight")),
        2,
        "lacks 1 tensor(s), e.g. 'lm_head.weight'",
    ),
    "int8": (
        "HF",
        tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        2,
        f"model.safetensors: '{Q}' is of type I8; quantized weights are not supported",
    ),
    "a shape": (
        "HF",
        tensors(lambda t: t.update({NORM: t[NORM][:9]})),
        2,
        f"model.safetensors: '{NORM}' has shape [9], and config.json asks for [64]",
    ),
    "no file": (
        "HF",
        lambda f: (f / "model.safetensors").unlink(),
        2,
        "no model.safetensors and no model.safetensors.index.json; copy it",
    ),
    "header cut off": (
        "HF",
        lambda f: os.truncate(f / "model.safetensors", 100),
        3,
        "model.safetensors: the file of LLaMA weights is cut off or damaged",
    ),
    "cut off": (
        "HF",
        lambda f: os.truncate(f / "model.safetensors", 9999),
        3,
        "model.safetensors: the file of LLaMA weights is cut off or damaged",
    ),
    "empty": (
        "HF",
        lambda f: os.truncate(f / "model.safetensors", 0),
        3,
        "model.safetensors: the file of LLaMA weights is cut off or damaged",
    ),
    "a header without end": (
        "HF",
        put("model.safetensors", b"\xff" * 64),
        3,
        "model.safetensors: the file of LLaMA weights is cut off or damaged",
    ),
    "HTML": (
        "HF",
        put("model.safetensors", b"<html>"),
        3,
        "model.safetensors: the file of LLaMA weights is an HTML page",
    ),
    "a file missing": (
        "HF in files",
        lambda f: (f / "model-1.safetensors").unlink(),
        2,
        "model-1.safetensors: no such file; copy all files",
    ),
    "files swapped": (
        "HF in files",
        lambda f: shutil.copy(f / "model-0.safetensors", f / "model-1.safetensors"),
        2,
        "model-1.safetensors: lacks 14 tensor(s), e.g. 'model.layers.0.",
    ),
    "index lacks a tensor": (
        "HF in files",
        index(lambda m: m.pop(NORM)),
        2,
        f"holds unknown 1 tensor(s), e.g. '{NORM}'; model.safetensors.index",
    ),
    "index leads away": (
        "HF in files",
        index(lambda m: m.update({NORM: "../x.safetensors"})),
        2,
        "'weight_map' is no object of tensor names and names",
    ),
    "index is empty": (
        "HF in files",
        index(lambda m: m.clear()),
        2,
        "'weight_map' is no object of tensor names and names",
    ),
    "index and one file": (
        "HF in files",
        put("model.safetensors", b""),
        2,
        "holds model.safetensors and model.safetensors.index.json; leave the one",
    ),
    "shards of other types": (
        "two",
        lambda f: torch.save(
            {k: v.half() for k, v in torch.load(f / "consolidated.01.pth").items()},
            f / "consolidated.01.pth",
        ),
        2,
        "has another type in each shard",
    ),
    "widened by nothing": (
        "two",
        lambda f: js(f / "params.json", ffn_dim_multiplier=-1),
        2,
        "ffn_dim_multiplier is -1 and must be a number above 0",
    ),
    "three shards of two": (
        "two",
        lambda f: shutil.copy(f / "consolidated.01.pth", f / "consolidated.02.pth"),
        2,
        "in 3 shard(s), and params.json asks for [400, 64]",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, layouts: dict[str, Path], tmp_path: Path) -> None:
    layout, damage, code, part = HOSTILE[name]
    shutil.copytree(layouts[layout], tmp_path / "it")
    damage(tmp_path / "it")
    with pytest.raises(UserError) as caught:
        open_weights(tmp_path / "it", 400)
    message = str(caught.value)
    assert part in message and message.isprintable() and len(message) < 900
    assert str(tmp_path / "it") in message and caught.value.exit_code == code


# ---- a whole run's inputs ----------------------------------------------------------------------------------------------------


def test_a_run_opens_hugging_face_weights(toy: ToyData, tmp_path: Path) -> None:
    """The tokenizer in the model's own folder, as a download has it."""
    make_hugging_face(tmp_path / "hf", {"vocab_size": toy.tokenizer.vocab_size()})
    shutil.copy(toy.llama / "tokenizer.model", tmp_path / "hf")
    flags = [
        *toy.flags,
        "--output_dir",
        str(tmp_path / "out"),
        "--llama_model_path",
        str(tmp_path),
        "--model",
        "hf",
    ]
    inputs = read_inputs(
        parse(flags, "vico train", "").resolve(), ("train",), Ranks(0, 1, torch.device("cpu"), None)
    )
    assert inputs.weights.config.n_layers == inputs.num_adapted == 2


def test_a_llama_3_is_trained_and_scored(toy: ToyData, tmp_path: Path) -> None:
    """Grouped queries, another rotary base, Hugging Face's files and Meta's tokenizer beside them, from flags to accuracy."""
    make_hugging_face(tmp_path / "8B", KINDS["LLaMA-3"] | {"vocab_size": NUM_RANKS + 256})
    make_llama_3_tokenizers(tmp_path / "8B" / "tokenizer.model", tmp_path / "8B" / "tokenizer.json")
    flags = [
        *toy.flags,
        "--llama_model_path",
        str(tmp_path),
        "--model",
        "8B",
        "--max_seq_len",
        "512",
        "--max_cap_len",
        "512",
    ]
    flags += [
        "--vaq",
        "--qav",
        "--adapter_layer",
        "1",
        "--batch_size",
        "4",
        "--max_steps",
        "2",
        "--deepspeed",
        "zero3",
    ]
    succeeds("train", *flags, "--output_dir", str(tmp_path / "out"))
    steps = records(tmp_path / "out" / "steps.jsonl")
    assert len(steps) == 2 and all(math.isfinite(step["loss"]) for step in steps)
    assert "val_acc" in records(tmp_path / "out" / "log.txt")[-1]
