"""Which layout a folder's weights are in, and the one way to read them."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from vico.errors import UserError
from vico.io.paths import entries, exists
from vico.io.text import read_json_object
from vico.model.config import LlamaConfig
from vico.model.weights import hf_config, meta
from vico.model.weights.hf import HuggingFaceWeights
from vico.model.weights.hf_config import CONFIG
from vico.model.weights.hf_files import INDEX, PATTERNS, TORCH_INDEX
from vico.model.weights.meta import MetaWeights


class Weights(Protocol):
    """A frozen backbone on the disk. Its tensors have Meta's names and layout in either case."""

    folder: Path
    config: LlamaConfig  # its vocab_size is the tokenizer's
    num_rows: int  # of the embeddings in the files; those behind vocab_size are passed over

    def read(self, name: str) -> Tensor:
        """The whole tensor in the file's dtype."""
        ...

    def read_slice(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor."""
        ...

    def verify(self, name: str) -> None:
        """Compare the tensor with the checksums of its file. Raises CheckpointError."""
        ...


def open_weights(folder: Path, vocab_size: int | None) -> Weights:
    """The weights in `folder`, all checked. Raises UserError where they are not those of one LLaMA.

    `vocab_size`: of the tokenizer; None: there is none to compare with.
    """
    is_meta = bool(entries(folder, "consolidated.*.pth"))
    is_hugging_face = any(entries(folder, pattern) for pattern in PATTERNS)
    if is_meta and is_hugging_face:
        raise UserError(
            f"{folder}: holds weights in Meta's layout (*.pth) and in Hugging Face's "
            f"({', '.join(PATTERNS)}); leave one of them there"
        )
    if not is_meta and not is_hugging_face:
        is_hugging_face = _has_only_hugging_face_config(folder)
    return (HuggingFaceWeights if is_hugging_face else MetaWeights)(folder, vocab_size)


def read_llama_config(folder: Path) -> LlamaConfig:
    """The dimensions alone; no weights need be there.

    vocab_size is -1 where the file leaves it to the tokenizer.
    """
    if not _has_only_hugging_face_config(folder):
        return meta.read_llama_config(folder / "params.json")
    content = read_json_object(folder / CONFIG, "config.json, which comes with the LLaMA weights,")
    return hf_config.read_llama_config(content, folder / CONFIG)


def _has_only_hugging_face_config(folder: Path) -> bool:
    return exists(folder / CONFIG) and not exists(folder / "params.json")


def holds_weights(folder: Path) -> bool:
    """As far as the names of its files tell; for hints."""
    return bool(weight_files(folder))


def weight_files(folder: Path) -> list[Path]:
    """The files in `folder` that belong to weights by their names, sorted."""
    patterns = ("params.json", CONFIG, INDEX, TORCH_INDEX, "consolidated.*.pth", *PATTERNS)
    return sorted({path for pattern in patterns for path in entries(folder, pattern)})
