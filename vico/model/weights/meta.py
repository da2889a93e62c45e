"""A frozen backbone in Meta's layout: params.json and one or several memory-mapped shards.

Everything about the files is checked before a tensor is read. Tensors are then handed out one at a
time, so that memory never holds more than the model and one tensor.
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.io.paths import entries
from vico.io.safe_load import StoredChecksums, is_float_tensor, load_tensors
from vico.io.text import read_json_object
from vico.model.config import EMBEDDINGS, VOCABULARY, LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights.validate import (
    is_positive,
    require_heads,
    require_positive,
    require_same_names,
    whole_number,
    with_vocabulary,
)

# Dimension along which Meta's model-parallel shards split a tensor, by the last part of its name;
# norms are replicated. LLaMA-1 and 2 split the width of the embeddings, LLaMA-3 the vocabulary:
# MetaWeights looks at the shapes.
SHARDED_DIM = dict.fromkeys(("wq", "wk", "wv", "w1", "w3", "output"), 0)
SHARDED_DIM |= dict.fromkeys(("wo", "w2", "tok_embeddings"), 1)
SHARD = "the shard of LLaMA weights"  # in messages
# No two shards of a model hold the same part of this tensor.
UNIQUE_PART = "layers.0.attention.wq.weight"
# A buffer that some files hold; it is computed instead.
IGNORED = re.compile(r"(^|\.)rope\.freqs$")
# Meta's code scales the rotary embedding by 8, but LLaMA-3.2's narrower models were trained with
# 32.
MIN_DIM_WITH_FACTOR_8 = 4096


class MetaWeights:
    """The tensors of `folder` by name.

    Raises UserError where files, params.json and tokenizer do not fit each other. `vocab_size`: of
    the tokenizer; None: there is none to compare with.
    """

    def __init__(self, folder: Path, vocab_size: int | None) -> None:
        self.folder = folder
        self.config = read_llama_config(folder / "params.json")
        self._shards = [(path, _load(path)) for path in shard_paths(folder)]
        self._checksums = [
            StoredChecksums(path, SHARD, CheckpointError) for path, _ in self._shards
        ]
        parts = [shard[EMBEDDINGS] for _, shard in self._shards if EMBEDDINGS in shard]
        splits_vocabulary = bool(parts) and parts[0].shape[1:] == (self.config.dim,)
        self._embeddings_dim = 0 if splits_vocabulary else 1
        num_rows = 0
        if splits_vocabulary:
            num_rows = sum(len(part) for part in parts)
        elif parts and parts[0].ndim:
            num_rows = len(parts[0])
        self.num_rows = num_rows
        # A params.json often leaves the number to the tokenizer, or was not edited when rows were
        # added.
        if self.config.vocab_size in (-1, vocab_size):
            self.config = replace(self.config, vocab_size=num_rows)
        self._check()
        if vocab_size is not None:
            self.config = with_vocabulary(self.config, vocab_size, folder)

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype.

        A view of the mapped file where there is one shard, or replicas.
        """
        parts, dim = self._parts(name)
        whole = parts[0] if dim is None or len(parts) == 1 else torch.cat(parts, dim=dim)
        return whole[: self.config.vocab_size] if name in VOCABULARY else whole

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor.

        Of the files, only the pages of its rows are touched.
        """
        parts, dim = self._parts(name)
        if dim is None or len(parts) == 1:
            return parts[0].reshape(-1)[start:stop]
        if dim == 0:
            return _slice_of_stacked(parts, start, stop)
        width = sum(part.shape[1] for part in parts)
        first = start // width
        rows = torch.cat([part[first : -(-stop // width)] for part in parts], dim=1)
        return rows.reshape(-1)[start - first * width : stop - first * width]

    def verify(self, name: str) -> None:
        """Raise CheckpointError if a shard's bytes of the tensor are not those that were saved."""
        for checksums, (_, shard) in zip(self._checksums, self._shards, strict=True):
            checksums.verify(show(name), shard[name])

    def _parts(self, name: str) -> tuple[list[Tensor], int | None]:
        """The tensor's parts, one per shard, and the dimension along which they join.

        None: they are replicas.
        """
        dim = self._embeddings_dim if name == EMBEDDINGS else sharded_dim(name)
        return [shard[name] for _, shard in self._shards], dim

    def _check(self) -> None:
        expected = backbone_shapes(self.config)
        for path, shard in self._shards:
            _check_shard(path, shard, set(expected))
        for name, shape in expected.items():
            self._check_shape(name, shape)
            self._check_parts(name)

    def _check_shape(self, name: str, expected: tuple[int, ...]) -> None:
        """The parts, joined, must have the `expected` shape."""
        parts, dim = self._parts(name)
        shapes = [tuple(part.shape) for part in parts]
        joined = list(shapes[0])
        if dim is not None and all(len(shape) == len(expected) for shape in shapes):
            joined[dim] = sum(shape[dim] for shape in shapes)
        others = {_without(shape, dim) for shape in shapes}
        if tuple(joined) != expected or len(others) != 1:
            shown = " + ".join(str(list(shape)) for shape in shapes)
            raise UserError(
                f"{self.folder}: '{name}' has shape {shown} in {len(shapes)} shard(s), and "
                f"params.json asks for {list(expected)}; params.json and consolidated.*.pth must "
                "be those of one model, all shards present"
            )

    def _check_parts(self, name: str) -> None:
        """The parts must be of one model: of one type, replicas alike, and no shard twice."""
        parts, dim = self._parts(name)
        if len({part.dtype for part in parts}) != 1:
            raise UserError(
                f"{self.folder}: '{name}' has another type in each shard, so they are of different "
                "models; copy them again"
            )
        if dim is None and not all(_are_close(part, parts[0]) for part in parts):
            raise UserError(
                f"{self.folder}: '{name}' differs between the shards, so they are of different "
                "models; copy them again"
            )
        pairs = itertools.combinations(parts, 2)
        if name == UNIQUE_PART and any(torch.equal(a[:1], b[:1]) for a, b in pairs):
            raise UserError(
                f"{self.folder}: two of the {len(parts)} shards are the same file; "
                "copy consolidated.*.pth again"
            )


def _slice_of_stacked(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the flattened parts, one part after the other."""
    cuts = []
    first = 0  # element of the whole with which the part begins
    for part in parts:
        if start < first + part.numel() and stop > first:
            cuts.append(part.reshape(-1)[max(start - first, 0) : stop - first])
        first += part.numel()
    return cuts[0] if len(cuts) == 1 else torch.cat([parts[0].new_empty(0), *cuts])


def _without(shape: tuple[int, ...], dim: int | None) -> tuple[int, ...]:
    return tuple(size for i, size in enumerate(shape) if i != dim)


def _are_close(part: Tensor, other: Tensor) -> bool:
    """Not bit by bit: replicas may have drifted apart in training."""
    return torch.allclose(part.float(), other.float(), rtol=0.1, atol=0.01, equal_nan=True)


def _check_shard(path: Path, shard: Mapping[str, object], expected: set[str]) -> None:
    names = {name for name in shard if not IGNORED.search(name)}
    remedy = "params.json and consolidated.*.pth must be those of one LLaMA in Meta's layout"
    require_same_names(names, expected, path, remedy)
    for name in sorted(names):
        if not is_float_tensor(shard[name]):
            raise UserError(
                f"{path}: '{name}' is no dense tensor of floating-point numbers; "
                "quantized weights are not supported"
            )


def sharded_dim(name: str) -> int | None:
    return SHARDED_DIM.get(name.removesuffix(".weight").rsplit(".", 1)[-1])


def shard_paths(folder: Path) -> list[Path]:
    paths = entries(folder, "consolidated.*.pth")
    if not paths:
        raise UserError(
            f"{folder}: no consolidated.00.pth; --llama_model_path and --model must name a folder "
            "of LLaMA weights"
        )
    for i, path in enumerate(paths):
        if path.name != f"consolidated.{i:02d}.pth":
            raise UserError(
                f"{folder}: consolidated.{i:02d}.pth is missing, {path.name} is there; "
                "copy all shards of the model"
            )
    return paths


def _load(path: Path) -> dict[str, Tensor]:
    shard = load_tensors(path, SHARD, error=CheckpointError)
    if not isinstance(shard, dict) or not all(_is_named_tensor(*item) for item in shard.items()):
        raise UserError(
            f"{path}: not a dict of tensors; LLaMA weights in Meta's layout are expected"
        )
    return shard


def _is_named_tensor(key: object, value: object) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor)


def read_llama_config(path: Path) -> LlamaConfig:
    """Of a params.json. vocab_size is -1 where the file leaves it to the tokenizer."""
    params = read_json_object(path, "params.json, which comes with the LLaMA weights,")
    dim, n_layers, n_heads = (
        whole_number(params, key, path) for key in ("dim", "n_layers", "n_heads")
    )
    kv_heads = n_heads
    if params.get("n_kv_heads") is not None:
        kv_heads = whole_number(params, "n_kv_heads", path)
    head_dim = None
    if params.get("head_dim") is not None:
        head_dim = whole_number(params, "head_dim", path)
    keys = ("dim", "n_heads", "n_kv_heads")
    own_head_dim = require_heads(dim, n_heads, kv_heads, head_dim, keys, path)
    multiplier = params.get("ffn_dim_multiplier")
    if multiplier is not None and not (is_positive(multiplier) and multiplier <= 100):
        raise UserError(
            f"{path}: ffn_dim_multiplier is {show(multiplier)} and must be a number above 0 "
            "and up to 100"
        )
    eps, theta = params.get("norm_eps", 1e-5), params.get("rope_theta", 10000.0)
    require_positive({"norm_eps": eps, "rope_theta": theta}, path)
    vocab_size, multiple_of = params.get("vocab_size", -1), 256
    if vocab_size != -1:
        vocab_size = whole_number(params, "vocab_size", path)
    if "multiple_of" in params:
        multiple_of = whole_number(params, "multiple_of", path)
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        vocab_size=vocab_size,
        multiple_of=multiple_of,
        norm_eps=float(eps),
        rope_theta=float(theta),
        n_kv_heads=kv_heads,
        ffn_dim_multiplier=None if multiplier is None else float(multiplier),
        rope_scaling=_read_rope_scaling(params, dim, path),
        own_head_dim=own_head_dim,
    )


def _read_rope_scaling(params: Mapping[str, Any], dim: int, path: Path) -> RopeScaling | None:
    """Meta's files say only that there is a scaling; `vico convert` also writes the factor."""
    is_scaled, factor = params.get("use_scaled_rope"), params.get("rope_scaling_factor")
    if is_scaled not in (None, False, True):
        raise UserError(f"{path}: use_scaled_rope is {show(is_scaled)} and must be true or false")
    if not is_scaled:
        return None
    if factor is None and dim < MIN_DIM_WITH_FACTOR_8:
        raise UserError(
            f'{path}: use_scaled_rope does not say by how much; add "rope_scaling_factor": 32 '
            "for LLaMA-3.2 1B and 3B, 8 for LLaMA-3.1"
        )
    if factor is None:
        return RopeScaling()
    require_positive({"rope_scaling_factor": factor}, path)
    return RopeScaling(factor=float(factor))
