"""Converts LLaMA weights between Meta's layout and Hugging Face's.

Numbers are copied unchanged, so that converting back and forth gives the same bits. Memory holds
one file of the target at a time. The target folder is written whole or not at all.
"""

import contextlib
import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vico.errors import CheckpointError, UserError
from vico.io.atomic import write_folder
from vico.io.safe_load import load_tensors
from vico.model.config import EMBEDDINGS, LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights.hf import ROTATED, stored_name, stored_rows
from vico.model.weights.hf_config import CONFIG
from vico.model.weights.hf_files import INDEX, SINGLE
from vico.model.weights.load import Weights, open_weights
from vico.model.weights.meta import MetaWeights, shard_paths, sharded_dim

Layout = Literal["hf", "meta"]
LAYOUT_NAMES: dict[Layout, str] = {"hf": "Hugging Face's", "meta": "Meta's layout"}
# Of tensors in one safetensors file; larger models are split into several.
MAX_FILE_BYTES = 4 * 2**30
# Meta splits the embeddings of LLaMA-3 (128,256 rows) along the vocabulary, and those of the models
# before it (32,000 rows) along the width.
LARGE_VOCAB_SIZE = 100_000


def convert_weights(
    source: Path, target: Path, to: Layout | None = None, num_shards: int | None = None
) -> str:
    """Write the weights of folder `source` in the layout `to` (default: the other one) to `target`.

    `num_shards`: number of files in Meta's layout, 1 by default. Returns a description of what was
    done. Raises UserError or DiskError.
    """
    weights = open_weights(source, None)
    is_meta = isinstance(weights, MetaWeights)
    if is_meta:
        for path in shard_paths(source):
            what = "the shard of LLaMA weights"
            load_tensors(path, what, verify_checksums=True, error=CheckpointError)
    to = to or ("hf" if is_meta else "meta")
    if to == "hf":
        if not is_meta:
            message = "is in Hugging Face's layout already; --to meta writes the other"
            raise UserError(f"{source}: {message}")
        if num_shards is not None:
            raise UserError(
                "--shards: is for Meta's layout; files of Hugging Face's are split by their size"
            )
        _write_folder(target, lambda folder: _write_hugging_face(weights, folder))
    else:
        num_files = 1 if num_shards is None else num_shards
        _require_representable(weights.config, num_files)
        _write_folder(target, lambda folder: _write_meta(weights, folder, num_files))
    paths = list(target.iterdir())
    num_files = sum(path.suffix in (".pth", ".safetensors") for path in paths)
    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    from_name, to_name = LAYOUT_NAMES["meta" if is_meta else "hf"], LAYOUT_NAMES[to]
    return (
        f"{source} from {from_name} to {to_name}, {num_files} file(s) of weights, "
        f"{megabytes:,.1f} MB"
    )


def _write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder`, but the partial folder is removed whatever exception ends it.

    torch and safetensors report a full disk as errors of their own; these become OSErrors.
    """

    def fill_or_remove(folder: Path) -> None:
        try:
            fill(folder)
        except BaseException as problem:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(problem, RuntimeError | SafetensorError):
                reason = (str(problem).splitlines() or ["writing failed"])[0]
                raise OSError(errno.EIO, reason) from None
            raise

    write_folder(target, fill_or_remove)


def _read_finite(weights: Weights, name: str) -> Tensor:
    tensor = weights.read(name)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{weights.folder}: '{name}' holds NaN or infinite values; "
            "fetch or copy the weights again"
        )
    return tensor


# Meta's layout


def _require_representable(config: LlamaConfig, num_shards: int) -> None:
    """Raises UserError where Meta's layout, in `num_shards` files, cannot hold such a model."""
    if num_shards < 1:
        raise UserError(f"--shards {num_shards}: must be a whole number of at least 1")
    sizes = {
        "n_heads": config.n_heads,
        "n_kv_heads": config.kv_heads,
        "the MLP's width": config.hidden_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in sizes.items():
        if size % num_shards:
            raise UserError(
                f"--shards {num_shards}: {name} {size} of this model cannot be divided by it; "
                "choose a divisor"
            )
    if config.sliding_window is not None:
        raise UserError(
            f"the model's tokens see {config.sliding_window} tokens, which a params.json cannot "
            "say; keep Hugging Face's layout"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling != RopeScaling(factor=scaling.factor):
        raise UserError(
            "the model's rope_scaling has other bounds than LLaMA-3.1's, which a params.json "
            "cannot say; keep Hugging Face's layout"
        )


def _write_meta(weights: Weights, folder: Path, num_shards: int) -> None:
    shards = _divide(weights, folder, num_shards) if num_shards > 1 else _undivided(weights)
    for shard, tensors in enumerate(shards):
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    params = json.dumps(_meta_params(weights.config))
    (folder / "params.json").write_text(params + "\n", encoding="utf-8")


def _undivided(weights: Weights) -> Iterator[dict[str, Tensor]]:
    # Clones: torch.save writes a view's whole storage.
    yield {name: _read_finite(weights, name).clone() for name in backbone_shapes(weights.config)}


def _divide(weights: Weights, folder: Path, num_shards: int) -> Iterator[dict[str, Tensor]]:
    """The tensors of each shard.

    The model is read once: its parts go to one file per shard first, so that memory holds one
    shard at a time.
    """
    paths = [folder / f"parts.{shard:02d}" for shard in range(num_shards)]
    described: list[tuple[str, torch.dtype, torch.Size]] = []  # the same for every shard
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(path.open("wb")) for path in paths]
        for name in backbone_shapes(weights.config):
            tensor = _read_finite(weights, name)
            for shard, file in enumerate(files):
                part = _shard_part(tensor, name, weights.config, shard, num_shards)
                file.write(part.flatten().view(torch.uint8).numpy().data)
            described.append((name, part.dtype, part.shape))
    for path in paths:
        with path.open("rb") as parts:
            tensors = {name: _next_part(parts, dtype, shape) for name, dtype, shape in described}
        path.unlink()
        yield tensors


def _next_part(parts: BinaryIO, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    part = bytearray(parts.read(dtype.itemsize * math.prod(shape)))
    return torch.frombuffer(part, dtype=dtype).view(shape)


def _shard_part(
    tensor: Tensor, name: str, config: LlamaConfig, shard: int, num_shards: int
) -> Tensor:
    """The part of a tensor that a shard holds: all of it where every shard holds a replica."""
    dim = sharded_dim(name)
    if name == EMBEDDINGS and config.vocab_size > LARGE_VOCAB_SIZE:
        dim = 0
    return tensor if dim is None else tensor.chunk(num_shards, dim)[shard].contiguous()


def _meta_params(config: LlamaConfig) -> dict[str, Any]:
    """The params.json. Keys that not every reader knows are written only where they are needed."""
    params: dict[str, Any] = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
    }
    if config.kv_heads != config.n_heads:
        params["n_kv_heads"] = config.kv_heads
    if config.own_head_dim is not None:
        params["head_dim"] = config.own_head_dim
    params["vocab_size"] = config.vocab_size
    params["multiple_of"] = config.multiple_of
    params["norm_eps"] = config.norm_eps
    if config.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = config.ffn_dim_multiplier
    if config.rope_theta != LlamaConfig.rope_theta:
        params["rope_theta"] = config.rope_theta
    if config.rope_scaling is not None:
        params["use_scaled_rope"] = True
        params["rope_scaling_factor"] = config.rope_scaling.factor
    return params


# Hugging Face's layout


def _write_hugging_face(weights: Weights, folder: Path) -> None:
    files = list(_split_by_size(weights))
    file_names = [SINGLE]
    if len(files) > 1:
        numbers = range(1, len(files) + 1)
        file_names = [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in numbers]
    weight_map: dict[str, str] = {}
    num_bytes = 0
    for file_name, names in zip(file_names, files, strict=True):
        tensors = _hugging_face_tensors(weights, names)
        safetensors.torch.save_file(tensors, folder / file_name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file_name)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    dtype = str(weights.read(EMBEDDINGS).dtype).removeprefix("torch.")
    config = _hugging_face_config(weights.config, dtype)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _split_by_size(weights: Weights) -> Iterator[list[str]]:
    """The tensors' names, file by file."""
    names: list[str] = []
    file_bytes = 0
    for name, shape in backbone_shapes(weights.config).items():
        num_bytes = weights.read_slice(name, 0, 1).element_size() * math.prod(shape)
        if names and file_bytes + num_bytes > MAX_FILE_BYTES:
            yield names
            names, file_bytes = [], 0
        names.append(name)
        file_bytes += num_bytes
    yield names


def _hugging_face_tensors(weights: Weights, names: list[str]) -> dict[str, Tensor]:
    """The tensors `names` under Hugging Face's names and in its order of rows."""
    tensors = {}
    # safetensors does not write tensors that share memory, as tied embeddings in Meta's files may.
    addresses: set[int] = set()
    for name in names:
        tensor = _read_finite(weights, name)
        if ROTATED.search(name):
            tensor = stored_rows(tensor, weights.config.head_dim)
        tensor = tensor.contiguous()
        if tensor.data_ptr() in addresses:
            tensor = tensor.clone()
        addresses.add(tensor.data_ptr())
        tensors[stored_name(name)] = tensor
    return tensors


def _hugging_face_config(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json."""
    values: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": dtype,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": False,
    }
    if config.own_head_dim is not None:
        values["head_dim"] = config.own_head_dim
    scaling = config.rope_scaling
    if scaling is not None:
        values["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_factor,
            "high_freq_factor": scaling.high_factor,
            "original_max_position_embeddings": scaling.old_context,
        }
        longest = int(scaling.old_context * max(scaling.factor, 2))
        values["max_position_embeddings"] = longest
    return values
