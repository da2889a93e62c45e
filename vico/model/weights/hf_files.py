"""Files of Hugging Face's layout, opened and mapped: safetensors, or torch's pytorch_model*.bin.

Where a folder holds both kinds, safetensors are read, as transformers does.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vico.errors import CheckpointError, UserError, show
from vico.io.paths import entries, exists, open_to_read
from vico.io.safe_load import StoredChecksums, failed_download, is_float_tensor, load_tensors
from vico.io.text import read_json_object
from vico.model.weights.validate import require_same_names

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PATTERNS = ("model*.safetensors", "pytorch_model*.bin")
WHAT = "the file of LLaMA weights"
FLOATS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorFile(Protocol):
    """Named tensors of one file, in Hugging Face's order of rows."""

    path: Path
    names: set[str]

    def type_of(self, name: str) -> str:
        """As safetensors names types; one of FLOATS for a tensor that can be read."""
        ...

    def shape_of(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor:
        """A view of the mapped file."""
        ...

    def verify(self, name: str) -> None:
        """Compare the tensor with the checksums of its file. Raises CheckpointError."""
        ...


class SafetensorsFile:
    """safetensors checks the header, and that the tensors fill the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_to_read(path) as file:
                if kind := failed_download(file.read(512), path.stat().st_size):
                    raise CheckpointError(f"{path}: {WHAT} is {kind}")
            self._file = safe_open(path, "pt")
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as problem:
            reason = problem.strerror or problem
            raise UserError(f"{path}: {WHAT} cannot be opened ({reason})") from None
        except SafetensorError as problem:
            raise CheckpointError(
                f"{path}: {WHAT} is cut off or damaged ({problem}); fetch or copy it again and "
                "compare the sizes"
            ) from None
        self.names = set(self._file.keys())

    def type_of(self, name: str) -> str:
        return str(self._file.get_slice(name).get_dtype())

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def verify(self, name: str) -> None:
        """Nothing to compare: the format has no checksums of its tensors."""


class TorchFile:
    """A pytorch_model.bin, whose pickle is not run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not exists(path):
            raise _missing(path)
        content = load_tensors(path, WHAT, error=CheckpointError)
        if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
            raise UserError(f"{path}: {WHAT} is not a dict of tensors; copy the model again")
        self._tensors: Mapping[str, Tensor] = content
        self._checksums = StoredChecksums(path, WHAT, CheckpointError)
        self.names = set(content)

    def type_of(self, name: str) -> str:
        tensor = self._tensors[name]
        names = {dtype: safetensors_name for safetensors_name, dtype in FLOATS.items()}
        known = names.get(tensor.dtype) if is_float_tensor(tensor) else None
        return known or f"{tensor.dtype}, {tensor.layout}"

    def shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def read(self, name: str) -> Tensor:
        return self._tensors[name]

    def verify(self, name: str) -> None:
        self._checksums.verify(show(name), self._tensors[name])


def _is_named_tensor(item: tuple[object, object]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _missing(path: Path) -> UserError:
    return UserError(f"{path}: no such file; copy all files of the model")


Open = Callable[[Path], TensorFile]
KINDS: tuple[tuple[str, str, Open], ...] = (
    (SINGLE, INDEX, SafetensorsFile),
    (TORCH_SINGLE, TORCH_INDEX, TorchFile),
)


def open_files(folder: Path) -> dict[str, TensorFile]:
    """Tensor -> the file that holds it, mapped. An index must agree with its files."""
    for single, index, open_file in KINDS:
        if exists(folder / index) and exists(folder / single):
            raise UserError(
                f"{folder}: holds {single} and {index}; leave the one that belongs to config.json"
            )
        if exists(folder / index):
            return _open_indexed_files(folder, index, open_file)
        if exists(folder / single):
            file = open_file(folder / single)
            return dict.fromkeys(file.names, file)
    is_torch = entries(folder, PATTERNS[1]) and not entries(folder, PATTERNS[0])
    single, index, _ = KINDS[1 if is_torch else 0]
    raise UserError(f"{folder}: no {single} and no {index}; copy it")


def _open_indexed_files(folder: Path, index: str, open_file: Open) -> dict[str, TensorFile]:
    content = read_json_object(folder / index, "the index of LLaMA weights")
    file_names = content.get("weight_map")
    if not isinstance(file_names, dict):
        file_names = {}
    if not file_names or not all(_is_file_name(name) for name in file_names.values()):
        raise UserError(
            f"{folder / index}: 'weight_map' is no object of tensor names and names of files "
            "beside it; copy the file again"
        )
    files = {name: open_file(folder / name) for name in sorted(set(file_names.values()))}
    remedy = f"{index} lists others: both must be of one model, copy them again"
    for file_name, file in files.items():
        listed = {tensor for tensor, name in file_names.items() if name == file_name}
        require_same_names(file.names, listed, file.path, remedy)
    return {tensor: files[name] for tensor, name in file_names.items()}


def _is_file_name(value: object) -> bool:
    """Without a folder, which would lead out of the model's."""
    return isinstance(value, str) and value == Path(value).name
