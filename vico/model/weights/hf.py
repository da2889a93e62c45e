"""Reading a frozen backbone in Hugging Face's layout: config.json and one or several memory-mapped safetensors files.

The same tensors under other names. wq and wk are the exception: Hugging Face rotates a head's first half against its second
and orders their rows for that, Meta (and ViCo) rotates neighbours; the rows are put back as they are read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.io.atomic import require_file
from vico.io.safe_load import failed_download
from vico.io.text import read_json_object
from vico.model.config import EMBEDDINGS, LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights.meta import (
    require_heads,
    require_positive,
    require_same_names,
    unlike_tokenizer,
    whole_number,
)

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OUTPUT = "lm_head.weight"
ENDS = {
    EMBEDDINGS: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
IN_LAYER = {
    **{f"attention.w{x}": f"self_attn.{x}_proj" for x in "qkvo"},
    **{
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    },
    **{"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"},
}
PASSED_OVER = re.compile(r"rotary_emb\.inv_freq$")  # a buffer, computed anew
FLOATS = ("F16", "BF16", "F32", "F64")
ROTATED = re.compile(r"attention\.w[qk]\.weight$")
WHAT = "the file of LLaMA weights"


class HuggingFaceWeights:
    """The tensors of `folder` by Meta's names. Raises UserError where files, config.json and tokenizer do not fit each other."""

    def __init__(self, folder: Path, vocab_size: int | None) -> None:
        self.folder = folder
        config = read_json_object(
            folder / CONFIG, "config.json, which comes with the LLaMA weights,"
        )
        self.config = read_llama_config(config, folder / CONFIG)
        if vocab_size is not None and self.config.vocab_size != vocab_size:
            raise UserError(unlike_tokenizer(folder, self.config.vocab_size, vocab_size))
        self._files = _open_files(folder)
        self._tied = bool(config.get("tie_word_embeddings", False))
        self._check()

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype; a view of the mapped file but for wq and wk, whose rows are put back in order."""
        tensor = self._mapped(name)
        return meta_rows(tensor, self.config.head_dim) if ROTATED.search(name) else tensor

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; no other page of the files is touched, but the rest of its rows."""
        tensor = self._mapped(name)
        if not ROTATED.search(name):
            return tensor.view(-1)[start:stop]
        width = tensor.shape[1]
        first = start // width
        rows = tensor[_stored_row(torch.arange(first, -(-stop // width)), self.config.head_dim)]
        return rows.view(-1)[start - first * width : stop - first * width]

    def _mapped(self, name: str) -> Tensor:
        stored = stored_name(EMBEDDINGS if self._tied and name == "output.weight" else name)
        tensor: Tensor = self._files[stored][1].get_tensor(stored)
        return tensor

    def _check(self) -> None:
        shapes = {stored_name(name): shape for name, shape in backbone_shapes(self.config).items()}
        if self._tied and OUTPUT not in self._files:
            del shapes[OUTPUT]
        found = {name for name in self._files if not PASSED_OVER.search(name)}
        require_same_names(
            found,
            set(shapes),
            self.folder,
            "config.json and the safetensors files must be those of one LLaMA",
        )
        for name, shape in shapes.items():
            path, file = self._files[name]
            stored = file.get_slice(name)
            if stored.get_dtype() not in FLOATS:
                raise UserError(
                    f"{path}: '{name}' is of type {stored.get_dtype()}; quantised weights are not read"
                )
            if tuple(stored.get_shape()) != shape:
                raise UserError(
                    f"{path}: '{name}' has shape {stored.get_shape()}, and config.json asks for {list(shape)}; "
                    "config.json and the safetensors files must be those of one model"
                )
        if (
            self._tied
            and OUTPUT in self._files
            and not torch.equal(
                *(self._files[n][1].get_tensor(n) for n in (OUTPUT, ENDS[EMBEDDINGS]))
            )
        ):
            raise UserError(
                f"{self.folder}: tie_word_embeddings is true, and {OUTPUT} is not the embeddings; set it to false in config.json"
            )


def stored_name(name: str) -> str:
    """Hugging Face's name of Meta's tensor."""
    if name in ENDS:
        return ENDS[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{IN_LAYER[rest.removesuffix('.weight')]}.weight"


def meta_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """wq or wk with the two rows of each rotated pair side by side again. A copy."""
    return tensor.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def stored_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """The inverse of `meta_rows`."""
    return tensor.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _stored_row(row: Tensor, head_dim: int) -> Tensor:
    """Where `stored_rows` puts a row."""
    within = row % head_dim
    return row - within + within % 2 * (head_dim // 2) + within // 2


def _open_files(folder: Path) -> dict[str, tuple[Path, Any]]:
    """Of each tensor, the file that holds it, mapped. An index must agree with its files."""
    if not (folder / INDEX).exists():
        if not (folder / SINGLE).exists():
            there = (
                "pytorch_model*.bin is there: save it again as safetensors"
                if any(folder.glob("pytorch_model*.bin"))
                else "copy it"
            )
            raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; {there}")
        file = _open(folder / SINGLE)
        return dict.fromkeys(file.keys(), (folder / SINGLE, file))
    if (folder / SINGLE).exists():
        raise UserError(
            f"{folder}: holds {SINGLE} and {INDEX}; leave the one that belongs to config.json"
        )
    where = read_json_object(folder / INDEX, "the index of LLaMA weights").get("weight_map")
    # A name with a folder in it would lead out of this one.
    if (
        not isinstance(where, dict)
        or not where
        or not all(isinstance(v, str) and v == Path(v).name for v in where.values())
    ):
        raise UserError(
            f"{folder / INDEX}: 'weight_map' is no object of tensor names and names of files beside it; copy the file again"
        )
    files = {name: _open(folder / name) for name in sorted(set(where.values()))}
    for file_name, file in files.items():
        listed = {name for name, value in where.items() if value == file_name}
        require_same_names(
            set(file.keys()),
            listed,
            folder / file_name,
            f"{INDEX} lists others: both must be of one model, copy them again",
        )
    return {name: (folder / value, files[value]) for name, value in where.items()}


def _open(path: Path) -> Any:
    """safetensors checks the header, and that the tensors fill the file."""
    try:
        require_file(path)
        with path.open("rb") as file:
            if found := failed_download(file.read(512), path.stat().st_size):
                raise CheckpointError(f"{path}: {WHAT} is {found}")
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy all files of the model") from None
    except OSError as problem:
        raise UserError(
            f"{path}: {WHAT} cannot be opened ({problem.strerror or problem})"
        ) from None
    except SafetensorError as problem:
        raise CheckpointError(
            f"{path}: {WHAT} is cut off or damaged ({problem}); fetch or copy it again and compare the sizes"
        ) from None


def read_llama_config(config: Mapping[str, Any], path: Path) -> LlamaConfig:
    kind = config.get("model_type")
    if kind != "llama":
        raise UserError(
            f"{path}: 'model_type' is {show(kind)}, and only 'llama' is read; use LLaMA weights"
        )
    for key, allowed in {
        "hidden_act": (None, "silu"),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
    }.items():
        if config.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} {show(config[key])}: no LLaMA has this, and ViCo cannot run it; use LLaMA weights"
            )
    if config.get("quantization_config") is not None:
        raise UserError(
            f"{path}: 'quantization_config' is given; quantised weights are not read: use the original ones"
        )
    if not isinstance(config.get("tie_word_embeddings", False), bool):
        raise UserError(
            f"{path}: 'tie_word_embeddings' is {show(config['tie_word_embeddings'])} and must be true or false"
        )
    keys = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    dim, layers, heads, width, vocab = (whole_number(config, key, path) for key in keys)
    kv_heads = (
        heads
        if config.get("num_key_value_heads") is None
        else whole_number(config, "num_key_value_heads", path)
    )
    require_heads(
        dim, heads, kv_heads, ("hidden_size", "num_attention_heads", "num_key_value_heads"), path
    )
    if config.get("head_dim") not in (None, dim // heads):
        raise UserError(
            f"{path}: head_dim {show(config['head_dim'])}: must be hidden_size over num_attention_heads, {dim // heads}"
        )
    rope = {**_object(config, "rope_scaling", path), **_object(config, "rope_parameters", path)}
    eps, theta = (
        config.get("rms_norm_eps", 1e-6),
        rope.get("rope_theta", config.get("rope_theta", 10000.0)),
    )
    require_positive({"rms_norm_eps": eps, "rope_theta": theta}, path)
    multiple, widened = mlp_rule(dim, width)
    return LlamaConfig(
        dim,
        layers,
        heads,
        vocab,
        multiple,
        float(eps),
        float(theta),
        kv_heads,
        widened,
        _read_scaling(rope, path),
    )


def _object(config: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be an object; copy the file again"
        )
    return value or {}


def _read_scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"{path}: rope_type {show(kind)}: only LLaMA-3's way of stretching the rotary embedding is supported"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    require_positive({key: rope.get(key) for key in keys}, path)
    factor, low, high, context = (rope[key] for key in keys)
    if low >= high:
        raise UserError(
            f"{path}: low_freq_factor {show(low)} must be below high_freq_factor {show(high)}"
        )
    return RopeScaling(float(factor), float(low), float(high), int(context))


def mlp_rule(dim: int, width: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) of a params.json whose MLP is `width` wide: those of published models where they fit."""
    for multiple, widened in ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0)):
        if LlamaConfig(dim, 1, 1, 1, multiple, ffn_dim_multiplier=widened).hidden_dim == width:
            return multiple, widened
    # The half keeps the product from falling below `width` when it is cut to a whole number.
    return 1, (width + 0.5) / int(2 * (4 * dim) / 3)
