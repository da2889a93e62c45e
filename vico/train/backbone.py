"""What the files of the backbone mean for a run: the lengths that it allows, and what is unused."""

from pathlib import Path

import torch

from vico.data.tokenizer import Tokenizer
from vico.errors import UserError, show
from vico.model.config import LlamaConfig
from vico.model.weights.load import Weights
from vico.train.config import RunConfig

# Of the frozen weights and of the computation, by --precision.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def require_window(config: RunConfig, llama: LlamaConfig, folder: Path) -> None:
    """No sequence may be longer than the window of tokens that a token sees. Raises UserError."""
    window = llama.sliding_window
    limits = {"--max_seq_len": config.max_seq_len}
    if config.cap and not config.only_evaluates:
        limits["--max_cap_len"] = config.max_cap_len
    for flag, limit in limits.items():
        if window is not None and limit > window:
            raise UserError(
                f"{folder}: sliding_window is {window} tokens, and sequences may have {limit}; "
                f"ViCo computes no window: set {flag} {window} or less"
            )


def notes(weights: Weights, tokenizer: Tokenizer, path: Path) -> list[str]:
    """What the files hold and is not used, or lack. `path`: of the tokenizer."""
    found = []
    num_spare = weights.num_rows - tokenizer.vocab_size
    if num_spare:
        found.append(
            f"{weights.folder}: the embeddings have {weights.num_rows} rows and {path.name} has "
            f"{tokenizer.vocab_size} pieces: the last {num_spare} rows are passed over, as if the "
            "model had none"
        )
    if not tokenizer.has_bos:
        end = show(tokenizer.name_of(tokenizer.eos))
        found.append(f"{path}: has no begin token; sequences begin with the end token, {end}")
    return found
