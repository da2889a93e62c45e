"""The oracle's files: tiny random LLaMAs in Meta's layout, and published checkpoints.

Like tests/reference/oracle.py, this shares no code with vico/.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference.oracle import Model, Trainables


def shard_dim(name: str) -> int | None:
    """The dimension that Meta's shards split; None for a replicated tensor.

    0: column-parallel; 1: row-parallel and tok_embeddings.
    """
    if "norm" in name or name.endswith("rope.freqs"):
        return None
    return 1 if any(part in name for part in (".wo.", ".w2.", "tok_embeddings.")) else 0


def load_meta(folder: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """params.json and the merged consolidated.NN.pth of a folder, without `...rope.freqs`."""
    paths = sorted(Path(folder).glob("consolidated.*.pth"))
    shards = [torch.load(path, weights_only=True) for path in paths]
    weights = {}
    for name in shards[0]:
        if not name.endswith("rope.freqs"):
            dim, parts = shard_dim(name), [shard[name] for shard in shards]
            assert dim is not None or all(torch.equal(part, parts[0]) for part in parts)
            weights[name] = (parts[0] if dim is None else torch.cat(parts, dim)).to(dtype)
    return json.loads((Path(folder) / "params.json").read_text()), weights


def tiny_weights(vocab: int, dim: int, n_layers: int, hidden: int, seed: int) -> dict[str, Tensor]:
    """Random weights with attention and logits far from uniform, and norms that are not 1."""
    gen = torch.Generator().manual_seed(seed)
    # Rows, columns, gain.
    shapes = {"tok_embeddings": (vocab, dim, math.sqrt(dim)), "output": (vocab, dim, 2.0)}
    for n in range(n_layers):
        for matrix, gain in (("wq", 1.5), ("wk", 1.5), ("wv", 1.0), ("wo", 1.0)):
            shapes[f"layers.{n}.attention.{matrix}"] = (dim, dim, gain)
        for matrix in ("w1", "w3"):
            shapes[f"layers.{n}.feed_forward.{matrix}"] = (hidden, dim, 1.0)
        shapes[f"layers.{n}.feed_forward.w2"] = (dim, hidden, 1.0)
    weights = {}
    for name, (rows, columns, gain) in shapes.items():
        value = torch.randn(rows, columns, generator=gen)
        weights[f"{name}.weight"] = value * gain / math.sqrt(columns)
    norms = []
    for n in range(n_layers):
        norms += [f"layers.{n}.attention_norm.weight", f"layers.{n}.ffn_norm.weight"]
    for name in [*norms, "norm.weight"]:
        weights[name] = 1 + 0.2 * torch.randn(dim, generator=gen)
    return weights


def write_tiny_meta(
    folder: str | Path,
    tokenizer_vocab: int,
    dim: int = 32,
    n_layers: int = 3,
    n_heads: int = 4,
    shards: int = 1,
    seed: int = 0,
    multiple_of: int = 8,
    dtype: torch.dtype = torch.float16,
) -> None:
    """A random LLaMA in Meta's files; the same model for any number of shards.

    `rope.freqs` are included, with wrong values: readers must ignore them.
    """
    folder = Path(folder)
    hidden = multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of)
    weights = tiny_weights(tokenizer_vocab, dim, n_layers, hidden, seed)
    full = {name: value.to(dtype) for name, value in weights.items()}
    ignored = [f"layers.{n}.attention.inner_attention.rope.freqs" for n in range(n_layers)]
    for name in ["rope.freqs", *ignored]:
        full[name] = torch.full((dim // n_heads // 2,), 7.0, dtype=dtype)
    assert hidden % shards == dim % shards == tokenizer_vocab % shards == 0
    folder.mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        part = {}
        for name, value in full.items():
            split = shard_dim(name)
            part[name] = value if split is None else value.chunk(shards, split)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": dim,
        "multiple_of": multiple_of,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "norm_eps": 1e-6,
        "vocab_size": -1,
    }
    (folder / "params.json").write_text(json.dumps(params))


def save_published(
    path: str | Path,
    trainables: Trainables,
    optimizer: torch.optim.AdamW | None = None,
    epoch: int = 0,
    args: argparse.Namespace | None = None,
    lower_gates: int = 0,
) -> None:
    """A checkpoint of the published code; without an optimizer, its `model` alone.

    `lower_gates` adds gates of so many layers from 0 on: the published code keeps them, though it
    never uses them. The optimizer has timm's two groups (without decay: empty), and no state for
    gates that never got a gradient.
    """
    own = {key: value.detach().float() for key, value in trainables.items()}
    names = list(own)
    unused = {}
    for n in range(lower_gates):
        for gate in ("gate1", "gate2"):
            unused[f"layers.{n}.attention.{gate}"] = torch.zeros_like(own[names[-1]])
    keys = names[:3] + list(unused) + names[3:]
    content: dict[str, Any] = {"model": {key: (own | unused)[key] for key in keys}}
    if optimizer is not None:
        old = optimizer.state_dict()
        flags = old["param_groups"][-1]
        without_decay = {**flags, "weight_decay": 0.0, "params": []}
        with_decay = {**flags, "params": list(range(len(keys)))}
        state = {}
        for n, name in enumerate(names):
            if n in old["state"]:
                state[keys.index(name)] = old["state"][n]
        factors = {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5}
        default_args = argparse.Namespace(
            batch_size=8, epochs=10, dataset="nextqa", output_dir="./checkpoint/nextqa"
        )
        content |= {
            "optimizer": {"state": state, "param_groups": [without_decay, with_decay]},
            "epoch": epoch,
            "scaler": {**factors, "growth_interval": 2000, "_growth_tracker": 0},
            "args": args or default_args,
        }
    torch.save(content, path)
