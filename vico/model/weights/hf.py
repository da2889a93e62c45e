"""A frozen backbone in Hugging Face's layout: config.json and memory-mapped files of tensors.

The tensors are Meta's under other names, but for wq and wk. Hugging Face rotates a head's first
half against its second and orders their rows for that; Meta (and ViCo) rotates neighbours. The rows
are put back as they are read.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from vico.errors import UserError
from vico.io.text import read_json_object
from vico.model.config import EMBEDDINGS, VOCABULARY, backbone_shapes
from vico.model.weights.hf_config import CONFIG, read_llama_config
from vico.model.weights.hf_files import FLOATS, TensorFile, open_files
from vico.model.weights.validate import require_same_names, with_vocabulary

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
ROTATED = re.compile(r"attention\.w[qk]\.weight$")


class HuggingFaceWeights:
    """The tensors of `folder` by Meta's names.

    Raises UserError where files, config.json and tokenizer do not fit each other.
    """

    def __init__(self, folder: Path, vocab_size: int | None) -> None:
        self.folder = folder
        path = folder / CONFIG
        content = read_json_object(path, "config.json, which comes with the LLaMA weights,")
        self.config = read_llama_config(content, path)
        self.num_rows = self.config.vocab_size
        self._files = open_files(folder)
        self._is_tied = bool(content.get("tie_word_embeddings", False))
        self._check()
        if vocab_size is not None:
            self.config = with_vocabulary(self.config, vocab_size, folder)

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype.

        A view of the mapped file but for wq and wk, whose rows are put back in order.
        """
        tensor = self._mapped(name)
        if name in VOCABULARY:
            return tensor[: self.config.vocab_size]
        return meta_rows(tensor, self.config.head_dim) if ROTATED.search(name) else tensor

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor.

        Of the files, only the pages of its rows are touched.
        """
        tensor = self._mapped(name)
        if not ROTATED.search(name):
            return tensor.reshape(-1)[start:stop]
        width = tensor.shape[1]
        first = start // width
        meta_row = torch.arange(first, -(-stop // width))
        rows = tensor[_stored_row(meta_row, self.config.head_dim)]
        return rows.view(-1)[start - first * width : stop - first * width]

    def verify(self, name: str) -> None:
        """Raise CheckpointError if its file's bytes of the tensor are not those that were saved.

        Only torch's files can tell: safetensors have no checksums.
        """
        stored = self._stored_name(name)
        self._files[stored].verify(stored)

    def _mapped(self, name: str) -> Tensor:
        stored = self._stored_name(name)
        return self._files[stored].read(stored)

    def _stored_name(self, name: str) -> str:
        return stored_name(EMBEDDINGS if self._is_tied and name == "output.weight" else name)

    def _check(self) -> None:
        expected = backbone_shapes(self.config)
        shapes = {stored_name(name): shape for name, shape in expected.items()}
        if self._is_tied and OUTPUT not in self._files:
            del shapes[OUTPUT]
        names = {name for name in self._files if not IGNORED.search(name)}
        remedy = "config.json and the files of weights must be those of one LLaMA"
        require_same_names(names, set(shapes), self.folder, remedy)
        for name, shape in shapes.items():
            _check_tensor(name, self._files[name], shape)
        if self._is_tied and OUTPUT in self._files:
            self._check_tied()

    def _check_tied(self) -> None:
        output = self._files[OUTPUT].read(OUTPUT)
        embeddings = self._mapped(EMBEDDINGS)
        if output.dtype != embeddings.dtype or not torch.equal(output, embeddings):
            raise UserError(
                f"{self.folder}: tie_word_embeddings is true, and {OUTPUT} is not the embeddings; "
                "set it to false in config.json"
            )


def _check_tensor(name: str, file: TensorFile, expected: tuple[int, ...]) -> None:
    """The tensor is not read."""
    if file.type_of(name) not in FLOATS:
        raise UserError(
            f"{file.path}: '{name}' is of type {file.type_of(name)}; quantized weights are not "
            "supported"
        )
    if file.shape_of(name) != expected:
        raise UserError(
            f"{file.path}: '{name}' has shape {list(file.shape_of(name))}, and config.json asks "
            f"for {list(expected)}; config.json and the files of weights must be those of one model"
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
