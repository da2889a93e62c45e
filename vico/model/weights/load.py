"""Which layout a folder's weights are in, and the one way to read them."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from vico.errors import UserError
from vico.io.text import read_json_object
from vico.model.config import LlamaConfig
from vico.model.weights import hf
from vico.model.weights import meta as weights
from vico.model.weights.hf import CONFIG, HuggingFaceWeights
from vico.model.weights.meta import MetaWeights


class Weights(Protocol):
    """A frozen backbone on the disk; its tensors have Meta's names and layout whatever the files'."""

    folder: Path
    config: LlamaConfig

    def read(self, name: str) -> Tensor: ...

    def read_slice(self, name: str, start: int, stop: int) -> Tensor: ...


def open_weights(folder: Path, vocab_size: int | None) -> Weights:
    """The weights in `folder`, checked whole. `vocab_size`: of the tokenizer; None: there is none to compare with."""
    meta, hugging_face = (
        any(folder.glob("consolidated.*.pth")),
        any(folder.glob("model*.safetensors")),
    )
    if meta and hugging_face:
        raise UserError(
            f"{folder}: holds weights in Meta's layout (*.pth) and in Hugging Face's (model*.safetensors); leave one of them there"
        )
    if hugging_face or (
        not meta and (folder / CONFIG).exists() and not (folder / "params.json").exists()
    ):
        return HuggingFaceWeights(folder, vocab_size)
    return MetaWeights(folder, vocab_size)


def read_llama_config(folder: Path) -> LlamaConfig:
    """The dimensions alone; no weights need be there. vocab_size is -1 where the file leaves it to the tokenizer."""
    if (folder / "params.json").exists() or not (folder / CONFIG).exists():
        return weights.read_llama_config(folder / "params.json")
    return hf.read_llama_config(
        read_json_object(folder / CONFIG, "config.json, which comes with the LLaMA weights,"),
        folder / CONFIG,
    )


def holds_weights(folder: Path) -> bool:
    """As far as a look at its files tells; for hints."""
    return any(
        any(folder.glob(name))
        for name in ("params.json", CONFIG, "consolidated.*.pth", "model*.safetensors")
    )
