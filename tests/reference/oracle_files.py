"""Files for the oracle: tiny random LLaMAs in Meta's format, adapters in the published format.

Like oracle.py, this shares no code with the package that it checks.
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

    0 for column-parallel ones, 1 for row-parallel ones and tok_embeddings.
    """
    if "norm" in name or name.endswith("rope.freqs"):
        return None
    return 1 if any(part in name for part in (".wo.", ".w2.", "tok_embeddings.")) else 0


def load_meta(folder: str | Path, dtype: torch.dtype = torch.float32) -> Model:
    """params.json and the merged consolidated.NN.pth of a folder, without `...rope.freqs`."""
    shards = [
        torch.load(path, weights_only=True)
        for path in sorted(Path(folder).glob("consolidated.*.pth"))
    ]
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
    shapes = {"tok_embeddings": (vocab, dim, math.sqrt(dim)), "output": (vocab, dim, 2.0)}
    for n in range(n_layers):
        shapes |= {
            f"layers.{n}.attention.{m}": (dim, dim, gain)
            for m, gain in (("wq", 1.5), ("wk", 1.5), ("wv", 1.0), ("wo", 1.0))
        }
        shapes |= {f"layers.{n}.feed_forward.{m}": (hidden, dim, 1.0) for m in ("w1", "w3")}
        shapes[f"layers.{n}.feed_forward.w2"] = (dim, hidden, 1.0)
    out = {
        f"{m}.weight": torch.randn(r, c, generator=gen) * gain / math.sqrt(c)
        for m, (r, c, gain) in shapes.items()
    }
    norms = [
        f"layers.{n}.{kind}.weight"
        for n in range(n_layers)
        for kind in ("attention_norm", "ffn_norm")
    ] + ["norm.weight"]
    return {**out, **{name: 1 + 0.2 * torch.randn(dim, generator=gen) for name in norms}}


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
    """Write a random LLaMA in Meta's format, the same model for any number of shards.

    `rope.freqs` holds nonsense, which a reader must ignore.
    """
    hidden = multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of)
    full = {
        name: value.to(dtype)
        for name, value in tiny_weights(tokenizer_vocab, dim, n_layers, hidden, seed).items()
    }
    for name in ["rope.freqs"] + [
        f"layers.{n}.attention.inner_attention.rope.freqs" for n in range(n_layers)
    ]:
        full[name] = torch.full((dim // n_heads // 2,), 7.0, dtype=dtype)
    assert hidden % shards == dim % shards == tokenizer_vocab % shards == 0
    Path(folder).mkdir(parents=True, exist_ok=True)
    for rank in range(shards):
        part = {
            k: v if (d := shard_dim(k)) is None else v.chunk(shards, d)[rank].clone()
            for k, v in full.items()
        }
        torch.save(part, Path(folder) / f"consolidated.{rank:02d}.pth")
    params = {
        "dim": dim,
        "multiple_of": multiple_of,
        "n_heads": n_heads,
        "n_layers": n_layers,
        "norm_eps": 1e-6,
        "vocab_size": -1,
    }
    (Path(folder) / "params.json").write_text(json.dumps(params))


def save_published(
    path: str | Path,
    trainables: Trainables,
    optimizer: torch.optim.AdamW | None = None,
    epoch: int = 0,
    args: argparse.Namespace | None = None,
    lower_gates: int = 0,
) -> None:
    """Write a published file; without an optimizer it holds `model` alone.

    `lower_gates` adds the unused gates of layers 0 to lower_gates - 1. The optimizer has timm's two
    groups (the one without decay is empty) and no state for gates that never got a gradient.
    """
    named = {key: value.detach().float() for key, value in trainables.items()}
    own = list(named)
    extra = {
        f"layers.{n}.attention.{gate}": torch.zeros_like(named[own[-1]])
        for n in range(lower_gates)
        for gate in ("gate1", "gate2")
    }
    keys = own[:3] + list(extra) + own[3:]
    content: dict[str, Any] = {"model": {key: (named | extra)[key] for key in keys}}
    if optimizer is not None:
        old = optimizer.state_dict()
        flags = old["param_groups"][-1]
        groups = [
            {**flags, "weight_decay": 0.0, "params": []},
            {**flags, "params": list(range(len(keys)))},
        ]
        state = {keys.index(key): old["state"][n] for n, key in enumerate(own) if n in old["state"]}
        scaler = {
            "scale": 65536.0,
            "growth_factor": 2.0,
            "backoff_factor": 0.5,
            "growth_interval": 2000,
            "_growth_tracker": 0,
        }
        args = args or argparse.Namespace(
            batch_size=8, epochs=10, dataset="nextqa", output_dir="./checkpoint/nextqa"
        )
        content |= {
            "optimizer": {"state": state, "param_groups": groups},
            "epoch": epoch,
            "scaler": scaler,
            "args": args,
        }
    torch.save(content, path)
