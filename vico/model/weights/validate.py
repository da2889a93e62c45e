"""Checks that both layouts of LLaMA weights share; each raises a UserError that names the file."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vico.errors import UserError, show
from vico.model.config import LlamaConfig

# Of any number in a config file. A larger one is a mistake, whose tensors would take forever to
# check.
MAX_DIMENSION = 10**6
MAX_LAYERS = 1000  # ten times what there is; each layer is planned and checked by itself
LAYERS = ("n_layers", "num_hidden_layers")
# Of embeddings behind the tokenizer's pieces: vocabularies are padded to multiples of up to 128
# rows, and large ones by up to a few percent.
MAX_SPARE_ROWS, MAX_SPARE_SHARE = 128, 1 / 16


def is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1e30


def require_positive(values: Mapping[str, object], path: Path) -> None:
    if not all(is_positive(value) for value in values.values()):
        shown = " and ".join(f"{key} {show(value)}" for key, value in values.items())
        raise UserError(f"{path}: {shown} must be positive numbers")


def whole_number(params: Mapping[str, Any], key: str, path: Path) -> int:
    """params[key], which must be there."""
    value, largest = params.get(key), MAX_LAYERS if key in LAYERS else MAX_DIMENSION
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= largest:
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be a whole number from 1 to {largest}"
        )
    return value


def require_heads(
    dim: int,
    n_heads: int,
    kv_heads: int,
    head_dim: int | None,
    keys: tuple[str, str, str],
    path: Path,
) -> int | None:
    """`head_dim` where it is not dim / n_heads, else None. `keys`: the other numbers' names."""
    if head_dim is not None and head_dim % 2:
        raise UserError(f"{path}: head_dim {head_dim} must be even; copy the file again")
    if head_dim is None and (dim % n_heads or dim // n_heads % 2):
        raise UserError(
            f"{path}: {keys[0]} {dim} over {keys[1]} {n_heads} is not an even whole number; "
            "copy the file again"
        )
    if n_heads % kv_heads:
        raise UserError(
            f"{path}: {keys[1]} {n_heads} over {keys[2]} {kv_heads} is not a whole number; "
            "copy the file again"
        )
    return None if head_dim is None or head_dim * n_heads == dim else head_dim


def require_same_names(names: set[str], expected: set[str], path: Path, remedy: str) -> None:
    differences = {"lacks": expected - names, "holds unknown": names - expected}
    for what, tensors in differences.items():
        if tensors:
            example = min(tensors)
            raise UserError(f"{path}: {what} {len(tensors)} tensor(s), e.g. '{example}'; {remedy}")


def with_vocabulary(config: LlamaConfig, vocab_size: int, folder: Path) -> LlamaConfig:
    """`config`, whose vocab_size is that of the embeddings, with the tokenizer's.

    Rows behind the tokenizer's pieces are padding, or pieces that were added for another purpose.
    Raises UserError for too few rows, and where there are so many more that the tokenizer must be
    another model's.
    """
    num_rows = config.vocab_size
    num_spare = num_rows - vocab_size
    if num_spare < 0 or num_spare > max(MAX_SPARE_ROWS, num_rows * MAX_SPARE_SHARE):
        raise UserError(
            f"{folder}: the embeddings have {num_rows} rows and the tokenizer has {vocab_size} "
            "pieces; use the tokenizer.model that came with these weights"
        )
    return replace(config, vocab_size=vocab_size)
