"""Reading a frozen backbone in Meta's layout: params.json and one or several memory-mapped shards.

Everything about the files is checked before a tensor is read; then tensors are handed out one at a time, so that memory
never holds more than the model and one tensor.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.io.safe_load import is_float_tensor, load_tensors
from vico.io.text import read_json_object
from vico.model.config import EMBEDDINGS, LlamaConfig, RopeScaling, backbone_shapes

# Dimension along which Meta's model-parallel shards split a tensor, by the last part of its name; norms are replicated.
# The embeddings: LLaMA-1 and 2 split their width, LLaMA-3 the vocabulary; the shapes tell.
SHARDED_DIM = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "w1": 0,
    "w3": 0,
    "output": 0,
    "wo": 1,
    "w2": 1,
    "tok_embeddings": 1,
}
SHARD_MARK = "layers.0.attention.wq.weight"  # no two shards of a model hold the same part of it
MAX_DIMENSION = (
    10**6
)  # of any number in params.json; what is beyond is a mistake, and checking it would take for ever
PASSED_OVER = re.compile(r"(^|\.)rope\.freqs$")  # a buffer, computed anew
SMALLEST_WITH_FACTOR_8 = (
    4096  # width: Meta's code stretches all by 8, LLaMA-3.2's narrower models were trained with 32
)


class MetaWeights:
    """The tensors of `folder` by name. Raises UserError where files, params.json and tokenizer do not fit each other.

    `vocab_size`: of the tokenizer; None: there is none to compare with.
    """

    def __init__(self, folder: Path, vocab_size: int | None) -> None:
        self.folder = folder
        self.config = read_llama_config(folder / "params.json")
        self._shards = [(path, _load(path)) for path in shard_paths(folder)]
        parts = [shard[EMBEDDINGS] for _, shard in self._shards if EMBEDDINGS in shard]
        self._embeddings_dim = 0 if parts and parts[0].shape[1:] == (self.config.dim,) else 1
        rows = (
            sum(len(part) for part in parts)
            if self._embeddings_dim == 0
            else len(parts[0])
            if parts and parts[0].ndim
            else 0
        )
        if self.config.vocab_size == -1:
            self.config = replace(
                self.config, vocab_size=rows if vocab_size is None else vocab_size
            )
        self._check(vocab_size, rows)

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype; a view of the mapped file where there is one shard, or replicas."""
        parts, dim = self._parts(name)
        return parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim=dim)

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; no other page of the files is touched, but the rest of its rows."""
        parts, dim = self._parts(name)
        if dim is None or len(parts) == 1:
            return parts[0].reshape(-1)[start:stop]
        if dim == 0:
            ends = list(itertools.accumulate(part.numel() for part in parts))
            cuts = [
                part.reshape(-1)[max(start - end + part.numel(), 0) : stop - end + part.numel()]
                for part, end in zip(parts, ends, strict=True)
                if start < end and stop > end - part.numel()
            ]
            return cuts[0] if len(cuts) == 1 else torch.cat([parts[0].new_empty(0), *cuts])
        width = sum(part.shape[1] for part in parts)
        first = start // width
        rows = torch.cat([part[first : -(-stop // width)] for part in parts], dim=1)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def _parts(self, name: str) -> tuple[list[Tensor], int | None]:
        """The tensor's parts, one per shard, and the dimension along which they join (None: they are replicas)."""
        dim = self._embeddings_dim if name == EMBEDDINGS else sharded_dim(name)
        return [shard[name] for _, shard in self._shards], dim

    def _check(self, vocab_size: int | None, rows: int) -> None:
        expected = backbone_shapes(self.config)
        for path, shard in self._shards:
            names = {name for name in shard if not PASSED_OVER.search(name)}
            require_same_names(
                names,
                set(expected),
                path,
                "params.json and consolidated.*.pth must be those of one LLaMA in Meta's layout",
            )
            if odd := next(
                (name for name in sorted(names) if not is_float_tensor(shard[name])), None
            ):
                raise UserError(
                    f"{path}: '{odd}' is no dense tensor of floating-point numbers; quantised weights are not read"
                )
        if (
            vocab_size is not None
            and rows != vocab_size
            and self.config.vocab_size in (vocab_size, rows)
        ):
            raise UserError(unlike_tokenizer(self.folder, rows, vocab_size))
        for name, shape in expected.items():
            self._check_parts(name, shape)

    def _check_parts(self, name: str, shape: tuple[int, ...]) -> None:
        parts, dim = self._parts(name)
        found = [tuple(part.shape) for part in parts]
        total = list(found[0])
        if dim is not None and all(len(f) == len(shape) for f in found):
            total[dim] = sum(f[dim] for f in found)
        if (
            tuple(total) != shape
            or len({tuple(s for i, s in enumerate(f) if i != dim) for f in found}) != 1
        ):
            raise UserError(
                f"{self.folder}: '{name}' has shape {' + '.join(str(list(f)) for f in found)} in {len(found)} shard(s), and params.json "
                f"asks for {list(shape)}; params.json and consolidated.*.pth must be those of one model, all shards present"
            )
        if len({part.dtype for part in parts}) != 1:
            raise UserError(
                f"{self.folder}: '{name}' has another type in each shard, so they are of different models; copy them anew"
            )
        # Not bit by bit: nobody promises that replicas did not drift apart in training.
        if dim is None and not all(
            torch.allclose(part.float(), parts[0].float(), rtol=0.1, atol=0.01, equal_nan=True)
            for part in parts
        ):
            raise UserError(
                f"{self.folder}: '{name}' differs between the shards, so they are of different models; copy them anew"
            )
        if name == SHARD_MARK and any(
            torch.equal(a[:1], b[:1]) for a, b in itertools.combinations(parts, 2)
        ):
            raise UserError(
                f"{self.folder}: two of the {len(parts)} shards are the same file; copy consolidated.*.pth anew"
            )


def sharded_dim(name: str) -> int | None:
    return SHARDED_DIM.get(name.removesuffix(".weight").rsplit(".", 1)[-1])


def shard_paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("consolidated.*.pth"))
    names = [path.name for path in paths]
    if not paths:
        raise UserError(
            f"{folder}: no consolidated.00.pth; --llama_model_path and --model must name a folder of LLaMA weights"
        )
    for i, name in enumerate(names):
        if name != f"consolidated.{i:02d}.pth":
            raise UserError(
                f"{folder}: consolidated.{i:02d}.pth is missing, {name} is there; copy all shards of the model"
            )
    return paths


def _load(path: Path) -> dict[str, Tensor]:
    shard = load_tensors(path, "the shard of LLaMA weights", error=CheckpointError)
    if not isinstance(shard, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in shard.items()
    ):
        raise UserError(
            f"{path}: not a dict of tensors; LLaMA weights in Meta's layout are expected"
        )
    return shard


def read_llama_config(path: Path) -> LlamaConfig:
    """vocab_size is -1 where params.json leaves it to the tokenizer."""
    params = read_json_object(path, "params.json, which comes with the LLaMA weights,")
    dim, layers, heads = (whole_number(params, key, path) for key in ("dim", "n_layers", "n_heads"))
    kv_heads = (
        heads if params.get("n_kv_heads") is None else whole_number(params, "n_kv_heads", path)
    )
    require_heads(dim, heads, kv_heads, ("dim", "n_heads", "n_kv_heads"), path)
    widened = params.get("ffn_dim_multiplier")
    if widened is not None and not (_is_positive(widened) and widened <= 100):
        raise UserError(
            f"{path}: ffn_dim_multiplier is {show(widened)} and must be a number above 0 and up to 100"
        )
    eps, theta = params.get("norm_eps", 1e-5), params.get("rope_theta", 10000.0)
    require_positive({"norm_eps": eps, "rope_theta": theta}, path)
    vocab = params.get("vocab_size", -1)
    if vocab != -1:
        vocab = whole_number(params, "vocab_size", path)
    multiple = whole_number(params, "multiple_of", path) if "multiple_of" in params else 256
    return LlamaConfig(
        dim,
        layers,
        heads,
        vocab,
        multiple,
        float(eps),
        float(theta),
        kv_heads,
        None if widened is None else float(widened),
        _read_scaling(params, dim, path),
    )


def _read_scaling(params: Mapping[str, Any], dim: int, path: Path) -> RopeScaling | None:
    """Meta's files say only that the rotary embedding is stretched; `vico convert` also writes by how much."""
    stretched, factor = params.get("use_scaled_rope"), params.get("rope_scaling_factor")
    if stretched not in (None, False, True):
        raise UserError(f"{path}: use_scaled_rope is {show(stretched)} and must be true or false")
    if not stretched:
        return None
    if factor is None and dim < SMALLEST_WITH_FACTOR_8:
        raise UserError(
            f'{path}: use_scaled_rope does not say by how much; add "rope_scaling_factor": 32 for LLaMA-3.2 1B and 3B, 8 for LLaMA-3.1'
        )
    if factor is not None:
        require_positive({"rope_scaling_factor": factor}, path)
    return RopeScaling() if factor is None else RopeScaling(factor=float(factor))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e30


def require_positive(values: Mapping[str, object], path: Path) -> None:
    if not all(_is_positive(value) for value in values.values()):
        raise UserError(
            f"{path}: {' and '.join(f'{k} {show(v)}' for k, v in values.items())} must be positive numbers"
        )


def require_heads(
    dim: int, heads: int, kv_heads: int, keys: tuple[str, str, str], path: Path
) -> None:
    if dim % heads or dim // heads % 2:
        raise UserError(
            f"{path}: {keys[0]} {dim} over {keys[1]} {heads} is not an even whole number; copy the file again"
        )
    if heads % kv_heads:
        raise UserError(
            f"{path}: {keys[1]} {heads} over {keys[2]} {kv_heads} is not a whole number; copy the file again"
        )


def whole_number(params: Mapping[str, Any], key: str, path: Path) -> int:
    value = params.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_DIMENSION:
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be a whole number from 1 to {MAX_DIMENSION}"
        )
    return value


def require_same_names(found: set[str], expected: set[str], path: Path, remedy: str) -> None:
    for what, names in (("lacks", expected - found), ("holds unknown", found - expected)):
        if names:
            raise UserError(f"{path}: {what} {len(names)} tensor(s), e.g. '{min(names)}'; {remedy}")


def unlike_tokenizer(folder: Path, rows: int, vocab_size: int) -> str:
    return (
        f"{folder}: the embeddings have {rows} rows and the tokenizer has {vocab_size} pieces; "
        "use the tokenizer.model that came with these weights"
    )
