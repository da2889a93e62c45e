"""Reading a frozen backbone in Meta's layout: params.json and one or several memory-mapped shards.

Everything about the files is checked before a tensor is read; then tensors are handed out one at a time, so that memory
never holds more than the model and one tensor.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.model.llama import LlamaShape
from vico.safeload import is_numbers, load_tensors
from vico.textfiles import read_json_object

# Dimension along which Meta's model-parallel shards split a tensor, by the last part of its name; norms are replicated.
SHARDED_DIM = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}
SHARD_MARK = "layers.0.attention.wq.weight"  # no two shards of a model hold the same part of it
LARGEST = 10**6  # of any number in params.json; what is beyond is a mistake, and checking it would take for ever
PASSED_OVER = re.compile(r"(^|\.)rope\.freqs$")  # a buffer, computed anew


class MetaWeights:
    """The tensors of `folder` by name. Raises UserError where files, params.json and tokenizer do not fit each other."""

    def __init__(self, folder: Path, num_pieces: int) -> None:
        self.folder = folder
        self.shape = _read_shape(folder / "params.json", num_pieces)
        self._shards = [(path, load_tensors(path, "the shard of LLaMA weights", error=CheckpointError)) for path in _shard_paths(folder)]
        self._check(num_pieces)

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype; a view of the mapped file where there is one shard, or replicas."""
        parts = [shard[name] for _, shard in self._shards]
        dim = _sharded_dim(name)
        return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim=dim)

    def _check(self, num_pieces: int) -> None:
        expected = backbone_shapes(self.shape)
        for path, shard in self._shards:
            if not isinstance(shard, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in shard.items()):
                raise UserError(f"{path}: not a dict of tensors; LLaMA weights in Meta's layout are expected")
            names = {name for name in shard if not PASSED_OVER.search(name)}
            _require_same_names(names, set(expected), path)
            if odd := next((name for name in sorted(names) if not is_numbers(shard[name])), None):
                raise UserError(f"{path}: '{odd}' is no dense tensor of floating-point numbers; quantised weights are not read")
        rows = self._shards[0][1]["tok_embeddings.weight"].shape[:1]
        if rows != (num_pieces,) and self.shape.vocab_size in (num_pieces, *rows):
            raise UserError(
                f"{self.folder}: the embeddings have {rows[0] if rows else 0} rows and the tokenizer has {num_pieces} pieces; "
                "use the tokenizer.model that came with these weights"
            )
        for name, shape in expected.items():
            self._check_parts(name, shape)

    def _check_parts(self, name: str, shape: tuple[int, ...]) -> None:
        parts = [shard[name] for _, shard in self._shards]
        found, dim = [tuple(part.shape) for part in parts], _sharded_dim(name)
        total = list(found[0])
        if dim is not None and all(len(f) == len(shape) for f in found):
            total[dim] = sum(f[dim] for f in found)
        if tuple(total) != shape or len({tuple(s for i, s in enumerate(f) if i != dim) for f in found}) != 1:
            raise UserError(
                f"{self.folder}: '{name}' has shape {' + '.join(str(list(f)) for f in found)} in {len(found)} shard(s), and params.json "
                f"asks for {list(shape)}; params.json and consolidated.*.pth must be those of one model, all shards present"
            )
        # Not bit by bit: nobody promises that replicas did not drift apart in training.
        if dim is None and not all(torch.allclose(part.float(), parts[0].float(), rtol=0.1, atol=0.01, equal_nan=True) for part in parts):
            raise UserError(f"{self.folder}: '{name}' differs between the shards, so they are of different models; copy them anew")
        if name == SHARD_MARK and any(torch.equal(a[:1], b[:1]) for a, b in itertools.combinations(parts, 2)):
            raise UserError(f"{self.folder}: two of the {len(parts)} shards are the same file; copy consolidated.*.pth anew")


def backbone_shapes(shape: LlamaShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every frozen tensor in Meta's layout."""
    square, up, down = (shape.dim, shape.dim), (shape.hidden_dim, shape.dim), (shape.dim, shape.hidden_dim)
    layer = {
        **{f"attention.{w}.weight": square for w in ("wq", "wk", "wv", "wo")},
        **{"feed_forward.w1.weight": up, "feed_forward.w2.weight": down, "feed_forward.w3.weight": up},
        **{"attention_norm.weight": (shape.dim,), "ffn_norm.weight": (shape.dim,)},
    }
    ends = {
        "tok_embeddings.weight": (shape.vocab_size, shape.dim),
        "norm.weight": (shape.dim,),
        "output.weight": (shape.vocab_size, shape.dim),
    }
    return {**ends, **{f"layers.{i}.{name}": dims for i in range(shape.n_layers) for name, dims in layer.items()}}


def _sharded_dim(name: str) -> int | None:
    return SHARDED_DIM.get(name.removesuffix(".weight").rsplit(".", 1)[-1])


def _shard_paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    names = [path.name for path in paths]
    if not paths:
        raise UserError(f"{folder}: no consolidated.00.pth; --llama_model_path and --model must name a folder of LLaMA weights")
    for i, name in enumerate(names):
        if name != f"consolidated.{i:02d}.pth":
            raise UserError(f"{folder}: consolidated.{i:02d}.pth is missing, {name} is there; copy all shards of the model")
    return paths


def _read_shape(path: Path, num_pieces: int) -> LlamaShape:
    params = read_json_object(path, "params.json, which comes with the LLaMA weights,")
    dim, layers, heads = (_whole_number(params, key, path) for key in ("dim", "n_layers", "n_heads"))
    if dim % heads or dim // heads % 2:
        raise UserError(f"{path}: dim {dim} over n_heads {heads} is not an even whole number; copy the file again")
    for key, why in {
        "n_kv_heads": "grouped-query attention",
        "use_scaled_rope": "scaled rotary embedding",
        "ffn_dim_multiplier": "a widened MLP",
    }.items():
        if params.get(key) not in (None, False, heads if key == "n_kv_heads" else None):
            raise UserError(f"{path}: {key} {params[key]}: models with {why} are not supported; use a LLaMA-1 or LLaMA-2 7B/13B layout")
    eps, theta = params.get("norm_eps", 1e-5), params.get("rope_theta", 10000.0)
    if not all(isinstance(v, int | float) and 0 < v <= 1e30 for v in (eps, theta)):
        raise UserError(f"{path}: norm_eps {eps!r} and rope_theta {theta!r} must be positive numbers")
    vocab = params.get("vocab_size", -1)
    if vocab != -1:
        vocab = _whole_number(params, "vocab_size", path)
    multiple = _whole_number(params, "multiple_of", path) if "multiple_of" in params else 256
    return LlamaShape(dim, layers, heads, num_pieces if vocab == -1 else vocab, multiple, float(eps), float(theta))


def _whole_number(params: dict[str, Any], key: str, path: Path) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
        raise UserError(f"{path}: '{key}' is {show(value)} and must be a whole number from 1 to {LARGEST}")
    return value


def _require_same_names(found: set[str], expected: set[str], path: Path) -> None:
    for what, names in (("lacks", expected - found), ("holds unknown", found - expected)):
        if names:
            raise UserError(
                f"{path}: {what} {len(names)} tensor(s), e.g. '{min(names)}'; params.json and consolidated.*.pth must be those of one "
                "LLaMA in Meta's layout"
            )
