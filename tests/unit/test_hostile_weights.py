"""Weights that are not what they say: each is one line of error."""

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

from support.weight_layouts import write_layouts
from vico.errors import UserError
from vico.model.weights.load import open_weights

Damage = Callable[[Path], Any]


def change_json(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
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
        config(model_type="mistral"),
        "config.json: 'model_type' is 'mistral', and only 'llama' is read",
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
        "config.json: head_dim 32: must be hidden_size over num_attention_heads, 16",
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
        "the embeddings have 401 rows and the tokenizer has 400 pieces",
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
BAD_INPUT, BAD_FILE = 2, 3  # exit codes
GROUPS = [
    ("HF", BAD_INPUT, WRONG_CONFIG),
    ("HF", BAD_INPUT, WRONG_TENSORS),
    ("HF", BAD_FILE, UNREADABLE),
    ("HF in files", BAD_INPUT, WRONG_INDEX),
    ("two", BAD_INPUT, WRONG_SHARDS),
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
