"""Weights that are not what they say: each is one line of error."""

import argparse
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from support.errors import refusal
from support.weight_layouts import write_layouts
from vico.errors import UserError
from vico.model.weights.load import open_weights

Damage = Callable[[Path], Any]


def change_json(path: Path, removed: tuple[str, ...] = (), **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    content = {key: value for key, value in content.items() if key not in removed}
    path.write_text(json.dumps(content), encoding="utf-8")


def config(**changes: Any) -> Damage:
    return lambda folder: change_json(folder / "config.json", **changes)


def index(change: Callable[[dict[str, str]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        content = json.loads(path.read_text())
        change(content["weight_map"])
        path.write_text(json.dumps(content))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        content = safetensors.torch.load((folder / "model.safetensors").read_bytes())
        change(content)
        safetensors.torch.save_file(content, folder / "model.safetensors")

    return damage


def put(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, size: int) -> Damage:
    return lambda folder: os.truncate(folder / name, size)


def delete(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def copy(name: str, target: str) -> Damage:
    return lambda folder: shutil.copy(folder / name, folder / target)


def halve_second_shard(folder: Path) -> None:
    path = folder / "consolidated.01.pth"
    torch.save({name: tensor.half() for name, tensor in torch.load(path).items()}, path)


MISTRAL = {"model_type": "mistral", "sliding_window": None}
NORM, Q = "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"
WEIGHTS = "model.safetensors"
Cases = dict[str, tuple[Damage, str]]  # name: (damage, part of the message)
WRONG_CONFIG: Cases = {
    "no config": (
        delete("config.json"),
        "config.json: no such file; config.json, which comes with the LLaMA weights",
    ),
    "config cut off": (cut("config.json", 20), "config.json:1: column "),
    "another model": (
        config(model_type="gemma"),
        "config.json: 'model_type' is 'gemma', and only llama and mistral are read (LLaMA,",
    ),
    "no model_type": (config(model_type=["llama"]), "'model_type' is ['llama'], and only llama"),
    "a window as text": (
        config(model_type="mistral", sliding_window="4k"),
        "config.json: 'sliding_window' is '4k' and must be a whole number",
    ),
    "Mistral without kv heads": (
        lambda folder: change_json(folder / "config.json", ("num_key_value_heads",), **MISTRAL),
        "num_attention_heads 4 over num_key_value_heads 8 is not a whole number",
    ),
    "quantized": (
        config(quantization_config={}),
        "config.json: 'quantization_config' is given; quantized weights are not supported",
    ),
    "biases": (
        config(attention_bias=True),
        "config.json: attention_bias True: no LLaMA has this",
    ),
    "other heads": (
        config(num_attention_heads=8),
        "'model.layers.0.self_attn.k_proj.weight' has shape [32, 64], and config.json asks for",
    ),
    "odd groups": (
        config(num_key_value_heads=3),
        "num_attention_heads 4 over num_key_value_heads 3 is not a whole number",
    ),
    "width as text": (
        config(hidden_size="64"),
        "config.json: 'hidden_size' is '64' and must be a whole number from 1 to 1000000",
    ),
    "own head_dim": (
        config(head_dim=32),
        "self_attn.q_proj.weight' has shape [64, 64], and config.json asks for [128, 64]",
    ),
    "odd head_dim": (config(head_dim=15), "config.json: head_dim 15 must be even"),
    "head_dim as text": (
        config(head_dim="16"),
        "config.json: 'head_dim' is '16' and must be a whole number",
    ),
    "yarn": (
        config(rope_scaling={"type": "yarn", "factor": 2}),
        "config.json: rope_type 'yarn': only LLaMA-3's scaling of the rotary embedding",
    ),
    "rope as list": (
        config(rope_parameters=[1]),
        "config.json: 'rope_parameters' is [1] and must be an object",
    ),
    "rope without factor": (
        config(rope_parameters={"rope_type": "llama3"}),
        "factor None and low_freq_factor None",
    ),
    "more layers": (
        config(num_hidden_layers=3),
        "lacks 9 tensor(s), e.g. 'model.layers.2.input_layernorm.weight'; config.json and",
    ),
    "fewer layers": (
        config(num_hidden_layers=1),
        "holds unknown 9 tensor(s), e.g. 'model.layers.1.input_layernorm.weight'",
    ),
    "vocabulary": (
        config(vocab_size=401),
        "embed_tokens.weight' has shape [400, 64], and config.json asks for [401, 64]",
    ),
    "tied, but is not": (
        config(tie_word_embeddings=True),
        "tie_word_embeddings is true, and lm_head.weight is not the embeddings",
    ),
}
WRONG_TENSORS: Cases = {
    "no head": (
        tensors(lambda t: t.pop("lm_head.weight")),
        "lacks 1 tensor(s), e.g. 'lm_head.weight'",
    ),
    "int8": (
        tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        f"model.safetensors: '{Q}' is of type I8; quantized weights are not supported",
    ),
    "a shape": (
        tensors(lambda t: t.update({NORM: t[NORM][:9]})),
        f"model.safetensors: '{NORM}' has shape [9], and config.json asks for [64]",
    ),
    "no file": (
        delete(WEIGHTS),
        "no model.safetensors and no model.safetensors.index.json; copy it",
    ),
}
CUT_OFF = "model.safetensors: the file of LLaMA weights is cut off or damaged"
UNREADABLE: Cases = {
    "header cut off": (cut(WEIGHTS, 100), CUT_OFF),
    "cut off": (cut(WEIGHTS, 9999), CUT_OFF),
    "empty": (cut(WEIGHTS, 0), CUT_OFF),
    "a header without end": (put(WEIGHTS, b"\xff" * 64), CUT_OFF),
    "HTML": (
        put(WEIGHTS, b"<html>"),
        "model.safetensors: the file of LLaMA weights is an HTML page",
    ),
}
NO_FILE_NAMES = "'weight_map' is no object of tensor names and names"
WRONG_INDEX: Cases = {
    "a file missing": (
        delete("model-1.safetensors"),
        "model-1.safetensors: no such file; copy all files",
    ),
    "files swapped": (
        copy("model-0.safetensors", "model-1.safetensors"),
        "model-1.safetensors: lacks 14 tensor(s), e.g. 'model.layers.0.",
    ),
    "index lacks a tensor": (
        index(lambda m: m.pop(NORM)),
        f"holds unknown 1 tensor(s), e.g. '{NORM}'; model.safetensors.index",
    ),
    "index leads away": (index(lambda m: m.update({NORM: "../x.safetensors"})), NO_FILE_NAMES),
    "index is empty": (index(lambda m: m.clear()), NO_FILE_NAMES),
    "index and one file": (
        put(WEIGHTS, b""),
        "holds model.safetensors and model.safetensors.index.json; leave the one",
    ),
}
WRONG_SHARDS: Cases = {
    "shards of other types": (halve_second_shard, "has another type in each shard"),
    "widened by nothing": (
        lambda folder: change_json(folder / "params.json", ffn_dim_multiplier=-1),
        "ffn_dim_multiplier is -1 and must be a number above 0",
    ),
    "three shards of two": (
        copy("consolidated.01.pth", "consolidated.02.pth"),
        "in 3 shard(s), and params.json asks for [400, 64]",
    ),
}
TORCH = "pytorch_model.bin"


def torch_file(change: Callable[[dict[str, Tensor]], Any], **options: Any) -> Damage:
    def damage(folder: Path) -> None:
        content = torch.load(folder / TORCH)
        changed = change(content)
        torch.save(content if changed is None else changed, folder / TORCH, **options)

    return damage


def flip_number(folder: Path) -> None:
    """One bit of the first tensor's numbers."""
    content = bytearray((folder / TORCH).read_bytes())
    numbers = torch.load(folder / TORCH)[NORM].numpy().tobytes()
    content[content.index(numbers)] ^= 1
    (folder / TORCH).write_bytes(content)


OLD = {"_use_new_zipfile_serialization": False}
WRONG_TORCH: Cases = {
    "bin, int8": (
        torch_file(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        f"pytorch_model.bin: '{Q}' is of type torch.int8, torch.strided; quantized weights",
    ),
    "bin, sparse": (
        torch_file(lambda t: t.update({Q: t[Q].to_sparse()})),
        f"pytorch_model.bin: '{Q}' is of type torch.float32, torch.sparse_coo",
    ),
    "bin, a shape": (
        torch_file(lambda t: t.update({NORM: t[NORM][:9].clone()})),
        f"pytorch_model.bin: '{NORM}' has shape [9], and config.json asks for [64]",
    ),
    "bin, nested": (
        torch_file(lambda t: {"model": t}),
        "pytorch_model.bin: the file of LLaMA weights is not a dict of tensors",
    ),
    "bin and an index": (
        put("pytorch_model.bin.index.json", b"{}"),
        "holds pytorch_model.bin and pytorch_model.bin.index.json; leave the one",
    ),
    "bin, only a part": (
        lambda folder: (folder / TORCH).rename(folder / "pytorch_model-00001-of-00002.bin"),
        "no pytorch_model.bin and no pytorch_model.bin.index.json; copy it",
    ),
    "bin and shards of Meta": (
        copy(TORCH, "consolidated.00.pth"),
        "holds weights in Meta's layout (*.pth) and in Hugging Face's (model*.safetensors, "
        "pytorch_model*.bin)",
    ),
}
UNREADABLE_TORCH: Cases = {
    "bin, cut off": (cut(TORCH, 9999), "pytorch_model.bin: the file of LLaMA weights is cut off"),
    "bin, HTML": (put(TORCH, b"<html>"), "the file of LLaMA weights is an HTML page"),
    "bin, old format": (
        torch_file(lambda t: None, **OLD),
        'convert it: python -c "import argparse, torch; ',
    ),
    "bin, code": (
        torch_file(lambda t: t.update(x=argparse.Namespace())),
        "holds the Python object argparse.Namespace, refused because loading it can run code",
    ),
}
BAD_INPUT, BAD_FILE = 2, 3  # exit codes
GROUPS = [
    ("HF", BAD_INPUT, WRONG_CONFIG),
    ("HF", BAD_INPUT, WRONG_TENSORS),
    ("HF", BAD_FILE, UNREADABLE),
    ("HF in files", BAD_INPUT, WRONG_INDEX),
    ("two", BAD_INPUT, WRONG_SHARDS),
    ("torch", BAD_INPUT, WRONG_TORCH),
    ("torch", BAD_FILE, UNREADABLE_TORCH),
]
HOSTILE = [
    pytest.param(layout, exit_code, *case, id=name)
    for layout, exit_code, cases in GROUPS
    for name, case in cases.items()
]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize(("layout", "exit_code", "damage", "part"), HOSTILE)
def test_hostile_files_are_one_line(
    layout: str,
    exit_code: int,
    damage: Damage,
    part: str,
    layouts: dict[str, Path],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "it"
    shutil.copytree(layouts[layout], folder)
    damage(folder)
    with pytest.raises(UserError) as caught:
        open_weights(folder, 400)
    message = str(caught.value)
    assert part in message and message.isprintable() and len(message) < 900
    assert str(folder) in message and caught.value.exit_code == exit_code


def test_a_flipped_bit_is_found_by_its_checksum(layouts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(layouts["torch"], tmp_path / "it")
    open_weights(tmp_path / "it", 400).verify("norm.weight")
    flip_number(tmp_path / "it")
    message = refusal(open_weights(tmp_path / "it", 400).verify, "norm.weight")
    assert "pytorch_model.bin: " in message and "wrong checksum of 'model.norm.weight'" in message


@pytest.mark.parametrize("num_pieces", [401, 271, 4])
def test_another_vocabulary_is_refused(num_pieces: int, layouts: dict[str, Path]) -> None:
    """More pieces than rows, or so few that the tokenizer must be another model's."""
    for layout in ("one", "HF"):
        message = refusal(open_weights, layouts[layout], num_pieces)
        assert f"have 400 rows and the tokenizer has {num_pieces} pieces; use the tok" in message
