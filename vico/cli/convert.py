"""`vico convert`: weights between Meta's layout and Hugging Face's, adapters between ViCo's checkpoints and the lineage's files.

What is read goes through the checks of a run, with checksums besides where the format has them; what is written is whole or
not there, and never takes the place of anything. Numbers are copied as they are: there and back are the same bits.
"""

import argparse
import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from vico.checkpoint import format, published
from vico.checkpoint import read as checkpoints
from vico.errors import CheckpointError, UserError
from vico.io.atomic import make_folder, require_writable, write_bytes, write_folder
from vico.io.safe_load import load_tensors
from vico.model.config import EMBEDDINGS, LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights.hf import CONFIG, INDEX, ROTATED, SINGLE, stored_name, stored_rows
from vico.model.weights.load import Weights, holds_weights, open_weights
from vico.model.weights.meta import MetaWeights, shard_paths, sharded_dim

HELP = """Convert, by what SOURCE is:
  LLaMA weights of Meta (consolidated.*.pth)         -> a folder of Hugging Face's (config.json, safetensors)
  LLaMA weights of Hugging Face                      -> a folder of Meta's (params.json, consolidated.*.pth)
  a checkpoint of ViCo's (folder or .safetensors)    -> the lineage's .pth: {"model", "args"}
  a lineage .pth                                     -> .safetensors, for --resume
Memory holds one file of the target at a time. The tokenizer stays where it is."""
FILE_BYTES = 4 * 2**30  # of tensors in one safetensors file; what is larger is split
# Meta's LLaMA-3 splits its embeddings along the vocabulary, of 128,256; those before it, of 32,000, along the width.
LARGE_VOCABULARY = 100_000


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see vico convert --help)")


def main(argv: list[str]) -> None:
    parser = _Parser(
        prog="vico convert",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("target", metavar="TARGET", type=Path, help="must not be there yet")
    parser.add_argument(
        "--to", choices=("hf", "meta"), help="of weights: the layout (default: the other one)"
    )
    parser.add_argument(
        "--shards", type=int, help="of weights in Meta's layout: how many files (default: 1)"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    flags = parser.parse_args(argv)
    start = time.monotonic()
    done = convert(flags.source, flags.target, flags.to, flags.shards)
    print(f"{flags.target}: {done}, in {time.monotonic() - start:.1f} s", flush=True)


def convert(source: Path, target: Path, to: str | None = None, shards: int | None = None) -> str:
    """Returns what was done. Raises UserError."""
    if os.path.lexists(target):
        raise UserError(f"{target}: is there already; name another target, or remove it")
    require_writable(target.parent, "the target's folder")
    if not os.path.exists(source):
        raise UserError(f"{source}: no such file or folder to convert")
    if source.is_dir() and not (source / format.STATE).exists() and holds_weights(source):
        return _convert_weights(source, target, to, shards)
    if to is not None or shards is not None:
        raise UserError(f"{source}: holds no LLaMA weights, and --to and --shards are for those")
    return _convert_adapter(source, target)


# Weights


def _convert_weights(source: Path, target: Path, to: str | None, shards: int | None) -> str:
    weights = open_weights(source, None)
    is_meta = isinstance(weights, MetaWeights)
    if is_meta:
        for path in shard_paths(source):
            load_tensors(
                path, "the shard of LLaMA weights", verify_checksums=True, error=CheckpointError
            )
    to = to or ("hf" if is_meta else "meta")
    if to == "hf" and not is_meta:
        raise UserError(
            f"{source}: is in Hugging Face's layout already; --to meta writes the other"
        )
    if to == "hf" and shards is not None:
        raise UserError(
            "--shards: is for Meta's layout; files of Hugging Face's are split by their size"
        )
    num = 1 if shards is None else shards
    if to == "meta":
        _require_divisible(weights.config, num)
    _write_folder(
        target,
        lambda folder: (
            _write_hugging_face(weights, folder)
            if to == "hf"
            else _write_meta(weights, folder, num)
        ),
    )
    names = {True: "Meta's layout", False: "Hugging Face's"}
    count = sum(1 for path in target.iterdir() if path.suffix in (".pth", ".safetensors"))
    size = sum(path.stat().st_size for path in target.iterdir())
    return f"{source} from {names[is_meta]} to {names[to == 'meta']}, {count} file(s) of weights, {size / 1e6:,.1f} MB"


def _write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """`write_folder`, leaving nothing behind whatever ends it; a full disk is an OSError also where torch calls it something else."""

    def cleanly(folder: Path) -> None:
        try:
            fill(folder)
        except BaseException as problem:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(problem, RuntimeError | SafetensorError):
                raise OSError(
                    errno.EIO, (str(problem).splitlines() or ["writing failed"])[0]
                ) from None
            raise

    write_folder(target, cleanly)


def _checked(weights: Weights, name: str) -> Tensor:
    tensor = weights.read(name)
    if not torch.isfinite(tensor).all():
        raise CheckpointError(
            f"{weights.folder}: '{name}' holds NaN or infinite values; fetch or copy the weights again"
        )
    return tensor


def _write_meta(weights: Weights, folder: Path, num_shards: int) -> None:
    shape = weights.config
    for rank in range(num_shards):
        # Clones: torch.save writes a view's whole storage.
        part = {
            name: _part(_checked(weights, name), name, shape, rank, num_shards).clone()
            for name in backbone_shapes(shape)
        }
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(_params(shape)) + "\n", encoding="utf-8")


def _part(tensor: Tensor, name: str, shape: LlamaConfig, rank: int, num_shards: int) -> Tensor:
    dim = 0 if name == EMBEDDINGS and shape.vocab_size > LARGE_VOCABULARY else sharded_dim(name)
    return tensor if dim is None else tensor.chunk(num_shards, dim)[rank].contiguous()


def _require_divisible(shape: LlamaConfig, num_shards: int) -> None:
    if num_shards < 1:
        raise UserError(f"--shards {num_shards}: must be a whole number of at least 1")
    sizes = {
        "n_heads": shape.n_heads,
        "n_kv_heads": shape.kv_heads,
        "the MLP's width": shape.hidden_dim,
        "vocab_size": shape.vocab_size,
    }
    if odd := next((f"{name} {size}" for name, size in sizes.items() if size % num_shards), None):
        raise UserError(
            f"--shards {num_shards}: {odd} of this model cannot be divided by it; choose a divisor"
        )
    if shape.rope_scaling is not None and shape.rope_scaling != RopeScaling(
        factor=shape.rope_scaling.factor
    ):
        raise UserError(
            "the model's rope_scaling has other bounds than LLaMA-3.1's, which a params.json cannot say; keep Hugging Face's layout"
        )


def _params(shape: LlamaConfig) -> dict[str, Any]:
    """What other models' readers do not know is left out where it says nothing."""
    params: dict[str, Any] = {
        "dim": shape.dim,
        "n_layers": shape.n_layers,
        "n_heads": shape.n_heads,
    }
    if shape.kv_heads != shape.n_heads:
        params["n_kv_heads"] = shape.kv_heads
    params |= {
        "vocab_size": shape.vocab_size,
        "multiple_of": shape.multiple_of,
        "norm_eps": shape.norm_eps,
    }
    if shape.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = shape.ffn_dim_multiplier
    if shape.rope_theta != LlamaConfig.rope_theta:
        params["rope_theta"] = shape.rope_theta
    if shape.rope_scaling is not None:
        params |= {"use_scaled_rope": True, "rope_scaling_factor": shape.rope_scaling.factor}
    return params


def _write_hugging_face(weights: Weights, folder: Path) -> None:
    files = list(_split(weights))
    names = (
        [SINGLE]
        if len(files) == 1
        else [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    )
    where: dict[str, str] = {}
    total = 0
    for file_name, contents in zip(names, files, strict=True):
        tensors = {stored_name(name): _stored(weights, name) for name in contents}
        # The format wants each tensor's bytes for itself, and Meta's files may share those of tied embeddings.
        seen: set[int] = set()
        for name, tensor in tensors.items():
            if tensor.data_ptr() in seen:
                tensors[name] = tensor.clone()
            seen.add(tensor.data_ptr())
        safetensors.torch.save_file(tensors, folder / file_name, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file_name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = _config(weights.config, str(weights.read(EMBEDDINGS).dtype).removeprefix("torch."))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _split(weights: Weights) -> Iterator[list[str]]:
    """The tensors' names, file by file."""
    names: list[str] = []
    num_bytes = 0
    for name in backbone_shapes(weights.config):
        size = (
            weights.read_slice(name, 0, 1).element_size()
            * torch.Size(backbone_shapes(weights.config)[name]).numel()
        )
        if names and num_bytes + size > FILE_BYTES:
            yield names
            names, num_bytes = [], 0
        names.append(name)
        num_bytes += size
    yield names


def _stored(weights: Weights, name: str) -> Tensor:
    tensor = _checked(weights, name)
    return (
        stored_rows(tensor, weights.config.head_dim) if ROTATED.search(name) else tensor
    ).contiguous()


def _config(shape: LlamaConfig, dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        **{
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": dtype,
        },
        **{
            "hidden_size": shape.dim,
            "intermediate_size": shape.hidden_dim,
            "num_hidden_layers": shape.n_layers,
        },
        **{
            "num_attention_heads": shape.n_heads,
            "num_key_value_heads": shape.kv_heads,
            "vocab_size": shape.vocab_size,
        },
        **{
            "rms_norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
            "tie_word_embeddings": False,
        },
    }
    if (s := shape.rope_scaling) is not None:
        bounds = {
            "low_freq_factor": s.low_factor,
            "high_freq_factor": s.high_factor,
            "original_max_position_embeddings": s.old_context,
        }
        config["rope_scaling"] = {"rope_type": "llama3", "factor": s.factor, **bounds}
        config["max_position_embeddings"] = int(s.old_context * max(s.factor, 2))
    return config


# Adapters


def _convert_adapter(source: Path, target: Path) -> str:
    checkpoint = checkpoints.read(source)
    _check_adapter(checkpoint.weights, source)
    weights = published.in_published_order(checkpoint.weights)
    make_folder(target.parent)
    if source.is_dir() or source.suffix == ".safetensors":
        _require_suffix(target, ".pth")
        write_bytes(target, published.to_bytes(weights, checkpoint.settings))
        return f"{source} as a lineage checkpoint, {len(weights)} tensors, without the optimizer's state"
    _require_suffix(target, ".safetensors")
    write_bytes(target, safetensors.torch.save(weights))
    return f"{source} as safetensors, {len(weights)} tensors, without settings and the optimizer's state"


def _require_suffix(target: Path, suffix: str) -> None:
    if target.suffix != suffix:
        raise UserError(f"{target}: this conversion writes a {suffix} file; name the target so")


def _check_adapter(weights: Mapping[str, Tensor], source: Path) -> None:
    gates = {name for name in weights if format.GATE.fullmatch(name)}
    pairs = {f"{name[:-1]}{n}" for name in gates for n in (1, 2)}
    missing, unknown = (
        ({*published.NON_LAYER_NAMES} | pairs) - weights.keys(),
        weights.keys() - {*published.NON_LAYER_NAMES} - gates,
    )
    if missing or unknown or not gates:
        odd = ", ".join(sorted(missing or unknown)[:3]) or "gates"
        raise CheckpointError(
            f"{source}: {'lacks' if missing or not gates else 'holds unknown'} {odd}; an adapter of ViCo's is expected"
        )
    for name, value in weights.items():
        checkpoints.require_numbers(value, name, source)
