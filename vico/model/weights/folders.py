"""Where --model and --llama_model_path lead: one rule for every command. No torch."""

import os.path
from pathlib import Path

from vico.io.paths import is_folder

DEFAULT = Path("pretrained/llama")  # of --llama_model_path


def model_folder(llama_folder: Path, model: str) -> Path:
    """The folder inside `llama_folder`, else the folder at the path `model`, if there is one.

    Where there is neither, the first of the two.
    """
    inside, path = llama_folder / model, Path(os.path.expanduser(model))
    return path if is_folder(path) and not is_folder(inside) else inside


def tokenizer_folder(llama_folder: Path, model: Path) -> Path:
    """The folder that may hold the tokenizer of several models: above that of the weights.

    `model`: the folder that `model_folder` found. Inside `llama_folder` it is `llama_folder`.
    """
    return llama_folder if model.is_relative_to(llama_folder) else model.parent
