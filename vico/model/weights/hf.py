"""A frozen backbone in Hugging Face's layout: config.json and memory-mapped safetensors files.

The tensors are Meta's under other names, but for wq and wk. Hugging Face rotates a head's first
half against its second and orders their rows for that; Meta (and ViCo) rotates neighbours. The rows
are put back as they are read.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.io.paths import entries, exists, open_to_read
from vico.io.safe_load import failed_download
from vico.io.text import read_json_object
from vico.model.config import EMBEDDINGS, LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights.validate import (
    require_heads,
    require_positive,
    require_same_names,
    require_tokenizer_size,
    whole_number,
)

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
OUTPUT = "lm_head.weight"
# Names outside of the layers, and in them, by Meta's.
TOP_NAMES = {
    EMBEDDINGS: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
LAYER_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# A buffer that some files hold; it is computed instead.
IGNORED = re.compile(r"rotary_emb\.inv_freq$")
FLOATS = ("F16", "BF16", "F32", "F64")
ROTATED = re.compile(r"attention\.w[qk]\.weight$")
WHAT = "the file of LLaMA weights"
# Settings that would make it another model, and the values that do not.
UNSUPPORTED = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
# (multiple_of, ffn_dim_multiplier) of published models.
PUBLISHED_MLP_RULES = ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0))


class HuggingFaceWeights:
    """The tensors of `folder` by Meta's names.

    Raises UserError where files, config.json and tokenizer do not fit each other.
    """

    def __init__(self, folder: Path, vocab_size: int | None) -> None:
        self.folder = folder
        path = folder / CONFIG
        content = read_json_object(path, "config.json, which comes with the LLaMA weights,")
        self.config = read_llama_config(content, path)
        if vocab_size is not None:
            require_tokenizer_size(self.config.vocab_size, vocab_size, folder)
        self._files = _open_files(folder)
        self._is_tied = bool(content.get("tie_word_embeddings", False))
        self._check()

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype.

        A view of the mapped file but for wq and wk, whose rows are put back in order.
        """
        tensor = self._mapped(name)
        return meta_rows(tensor, self.config.head_dim) if ROTATED.search(name) else tensor

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor.

        Of the files, only the pages of its rows are touched.
        """
        tensor = self._mapped(name)
        if not ROTATED.search(name):
            return tensor.view(-1)[start:stop]
        width = tensor.shape[1]
        first = start // width
        meta_row = torch.arange(first, -(-stop // width))
        rows = tensor[_stored_row(meta_row, self.config.head_dim)]
        return rows.view(-1)[start - first * width : stop - first * width]

    def verify(self, name: str) -> None:
        """Nothing to compare: the format has no checksums of its tensors."""

    def _mapped(self, name: str) -> Tensor:
        stored = stored_name(EMBEDDINGS if self._is_tied and name == "output.weight" else name)
        tensor: Tensor = self._files[stored][1].get_tensor(stored)
        return tensor

    def _check(self) -> None:
        expected = backbone_shapes(self.config)
        shapes = {stored_name(name): shape for name, shape in expected.items()}
        if self._is_tied and OUTPUT not in self._files:
            del shapes[OUTPUT]
        names = {name for name in self._files if not IGNORED.search(name)}
        remedy = "config.json and the safetensors files must be those of one LLaMA"
        require_same_names(names, set(shapes), self.folder, remedy)
        for name, shape in shapes.items():
            _check_tensor(name, *self._files[name], shape)
        if self._is_tied and OUTPUT in self._files:
            self._check_tied()

    def _check_tied(self) -> None:
        output = self._files[OUTPUT][1].get_tensor(OUTPUT)
        embeddings_name = TOP_NAMES[EMBEDDINGS]
        embeddings = self._files[embeddings_name][1].get_tensor(embeddings_name)
        if not torch.equal(output, embeddings):
            raise UserError(
                f"{self.folder}: tie_word_embeddings is true, and {OUTPUT} is not the embeddings; "
                "set it to false in config.json"
            )


def _check_tensor(name: str, path: Path, file: Any, expected: tuple[int, ...]) -> None:
    """`file`: an open safetensors file; the tensor is not read."""
    stored = file.get_slice(name)
    if stored.get_dtype() not in FLOATS:
        raise UserError(
            f"{path}: '{name}' is of type {stored.get_dtype()}; quantized weights are not supported"
        )
    if tuple(stored.get_shape()) != expected:
        raise UserError(
            f"{path}: '{name}' has shape {stored.get_shape()}, and config.json asks for "
            f"{list(expected)}; config.json and the safetensors files must be those of one model"
        )


def stored_name(name: str) -> str:
    """Hugging Face's name of Meta's tensor."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, layer, rest = name.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


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
    """Tensor -> the file that holds it, mapped. An index must agree with its files."""
    single, index = folder / SINGLE, folder / INDEX
    if exists(index) and exists(single):
        raise UserError(
            f"{folder}: holds {SINGLE} and {INDEX}; leave the one that belongs to config.json"
        )
    if exists(index):
        return _open_indexed_files(folder)
    if not exists(single):
        remedy = "copy it"
        if entries(folder, "pytorch_model*.bin"):
            remedy = "pytorch_model*.bin is there: save it again as safetensors"
        raise UserError(f"{folder}: no {SINGLE} and no {INDEX}; {remedy}")
    file = _open(single)
    return dict.fromkeys(file.keys(), (single, file))


def _open_indexed_files(folder: Path) -> dict[str, tuple[Path, Any]]:
    content = read_json_object(folder / INDEX, "the index of LLaMA weights")
    file_names = content.get("weight_map")
    if not isinstance(file_names, dict):
        file_names = {}
    if not file_names or not all(_is_file_name(name) for name in file_names.values()):
        raise UserError(
            f"{folder / INDEX}: 'weight_map' is no object of tensor names and names of files "
            "beside it; copy the file again"
        )
    files = {name: _open(folder / name) for name in sorted(set(file_names.values()))}
    remedy = f"{INDEX} lists others: both must be of one model, copy them again"
    for file_name, file in files.items():
        listed = {tensor for tensor, name in file_names.items() if name == file_name}
        require_same_names(set(file.keys()), listed, folder / file_name, remedy)
    return {tensor: (folder / name, files[name]) for tensor, name in file_names.items()}


def _is_file_name(value: object) -> bool:
    """Without a folder, which would lead out of the model's."""
    return isinstance(value, str) and value == Path(value).name


def _open(path: Path) -> Any:
    """safetensors checks the header, and that the tensors fill the file."""
    try:
        with open_to_read(path) as file:
            if kind := failed_download(file.read(512), path.stat().st_size):
                raise CheckpointError(f"{path}: {WHAT} is {kind}")
        return safe_open(path, "pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; copy all files of the model") from None
    except OSError as problem:
        reason = problem.strerror or problem
        raise UserError(f"{path}: {WHAT} cannot be opened ({reason})") from None
    except SafetensorError as problem:
        raise CheckpointError(
            f"{path}: {WHAT} is cut off or damaged ({problem}); fetch or copy it again and "
            "compare the sizes"
        ) from None


def read_llama_config(content: Mapping[str, Any], path: Path) -> LlamaConfig:
    """Of the `content` of a config.json at `path`."""
    _require_llama(content, path)
    dim = whole_number(content, "hidden_size", path)
    n_layers = whole_number(content, "num_hidden_layers", path)
    n_heads = whole_number(content, "num_attention_heads", path)
    hidden_dim = whole_number(content, "intermediate_size", path)
    vocab_size = whole_number(content, "vocab_size", path)
    kv_heads = n_heads
    if content.get("num_key_value_heads") is not None:
        kv_heads = whole_number(content, "num_key_value_heads", path)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    require_heads(dim, n_heads, kv_heads, keys, path)
    if content.get("head_dim") not in (None, dim // n_heads):
        raise UserError(
            f"{path}: head_dim {show(content['head_dim'])}: must be hidden_size over "
            f"num_attention_heads, {dim // n_heads}"
        )
    rope = {**_object(content, "rope_scaling", path), **_object(content, "rope_parameters", path)}
    eps = content.get("rms_norm_eps", 1e-6)
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    require_positive({"rms_norm_eps": eps, "rope_theta": theta}, path)
    multiple_of, multiplier = mlp_rule(dim, hidden_dim)
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        vocab_size=vocab_size,
        multiple_of=multiple_of,
        norm_eps=float(eps),
        rope_theta=float(theta),
        n_kv_heads=kv_heads,
        ffn_dim_multiplier=multiplier,
        rope_scaling=_read_rope_scaling(rope, path),
    )


def _require_llama(content: Mapping[str, Any], path: Path) -> None:
    model_type = content.get("model_type")
    if model_type != "llama":
        raise UserError(
            f"{path}: 'model_type' is {show(model_type)}, and only 'llama' is read; "
            "use LLaMA weights"
        )
    for key, allowed in UNSUPPORTED.items():
        if content.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} {show(content[key])}: no LLaMA has this, and ViCo cannot run it; "
                "use LLaMA weights"
            )
    if content.get("quantization_config") is not None:
        raise UserError(
            f"{path}: 'quantization_config' is given; quantized weights are not supported: "
            "use the original ones"
        )
    is_tied = content.get("tie_word_embeddings", False)
    if not isinstance(is_tied, bool):
        raise UserError(
            f"{path}: 'tie_word_embeddings' is {show(is_tied)} and must be true or false"
        )


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be an object; copy the file again"
        )
    return value or {}


def _read_rope_scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"{path}: rope_type {show(kind)}: only LLaMA-3's scaling of the rotary embedding "
            "is supported"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    require_positive({key: rope.get(key) for key in keys}, path)
    factor, low, high, context = (rope[key] for key in keys)
    if low >= high:
        raise UserError(
            f"{path}: low_freq_factor {show(low)} must be below high_freq_factor {show(high)}"
        )
    return RopeScaling(float(factor), float(low), float(high), int(context))


def mlp_rule(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) of a params.json whose MLP is `hidden_dim` wide.

    Those of a published model where one fits.
    """
    for multiple_of, multiplier in PUBLISHED_MLP_RULES:
        config = LlamaConfig(dim, 1, 1, 1, multiple_of, ffn_dim_multiplier=multiplier)
        if config.hidden_dim == hidden_dim:
            return multiple_of, multiplier
    # The half keeps the product from falling below `hidden_dim` when it is cut to a whole number.
    return 1, (hidden_dim + 0.5) / int(2 * (4 * dim) / 3)
