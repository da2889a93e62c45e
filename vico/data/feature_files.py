"""The containers that features come in: one file for all videos, or a folder with one for each.

A container gives what it holds under a key: a tensor, which is a view of the mapped file where the
format allows, or what else was found there. `Features` judges it.
"""

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vico.data.hdf5_features import Hdf5
from vico.data.mapped_numbers import FILE, map_npy, require_whole
from vico.data.readers.captions import locate
from vico.errors import fail, show
from vico.io.numpy_arrays import ALLOWED_CLASSES, Array
from vico.io.paths import entries, exists, is_folder, open_to_read
from vico.io.safe_load import StoredChecksums, load_tensors

DEFAULT_NAME = "clipvitl14.pth"
SUFFIXES = (".pth", ".pt", ".safetensors", ".h5", ".hdf5")  # of a file with all videos
VIDEO_SUFFIXES = (".npy", ".pth", ".pt", ".safetensors")  # of a file in a folder
# Of numbers that torch reads into memory: numpy arrays and lists in a .pth file.
MAX_IN_MEMORY = 1 << 28


def find(folder: Path, named: Path | None) -> Path:
    """What --features names (relative to the current folder or to the data set's `folder`).

    Without it: clipvitl14.pth, or the one feature file or folder of features that is there.
    """
    if named is not None:
        located = locate(folder, named)
        if not exists(located):
            fail(
                f"--features {located}: no such file or folder, and {folder} holds no "
                f"{named.name}; correct the path"
            )
        return located
    default = folder / DEFAULT_NAME
    if exists(default):
        return default
    found = [path for path in entries(folder, "features*") if path.suffix.lower() in SUFFIXES]
    if is_folder(folder / "features"):
        found.append(folder / "features")
    if len(found) > 1:
        names = " and ".join(path.name for path in found)
        fail(f"{folder}: holds {names}; say which by --features PATH")
    return found[0] if found else default


def files_of(path: Path) -> list[Path]:
    """The files of the features at `path`: itself, or those in the folder and below it."""
    if not is_folder(path):
        return [path]
    found = []
    for folder, _, names in os.walk(path, onerror=_cannot_list):
        found += [Path(folder, n) for n in names if n.lower().endswith(VIDEO_SUFFIXES)]
    return sorted(found)


def _cannot_list(problem: OSError) -> None:
    fail(f"{problem.filename}: cannot be read ({problem.strerror}); correct its permissions")


class Container(Protocol):
    """Features by key."""

    notes: list[str]  # what a user should know of how they are read

    def keys(self) -> Iterable[object]: ...

    def value(self, key: object) -> Any:
        """The frames of a video, or what else lies there. Raises UserError for a damaged file."""

    def verify(self, key: object) -> None:
        """Raise UserError if the bytes are not those that were saved; some formats cannot say."""


def open_container(path: Path, files: list[Path], in_memory: int = MAX_IN_MEMORY) -> Container:
    """`files`: those of `files_of`. `in_memory`: bytes of what cannot be mapped. UserError."""
    if is_folder(path):
        return _Folder(path, files)
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        fail(f"{path}: one array cannot say which video is which; name the folder of .npy files")
    if suffix == ".safetensors":
        return _Safetensors(path)
    if suffix in (".h5", ".hdf5"):
        return Hdf5(path)
    return _TorchFile(path, in_memory)


def pack_command(path: Path) -> str:
    """The very command that writes the features anew as a file that can be mapped."""
    return f"run: vico data pack {path} {path.with_name(path.stem + '_packed.safetensors')}"


class _TorchFile:
    """A dict of tensors, which are mapped; of numpy arrays or lists, which are read into memory."""

    def __init__(self, path: Path, in_memory: int) -> None:
        self.notes = list[str]()
        if (num_bytes := _pickled_bytes(path)) > in_memory:
            fail(
                f"{path}: {FILE} holds {num_bytes:,} bytes of numpy arrays or lists, which "
                f"cannot be memory-mapped: each process would hold them; {pack_command(path)}"
            )
        old_too = in_memory > MAX_IN_MEMORY
        content = load_tensors(path, FILE, ALLOWED_CLASSES, allow_old_format=old_too)
        if not isinstance(content, dict) or not content:
            fail(
                f"{path}: holds {describe(content)}, not a dict from video id to features; "
                "fetch the right file"
            )
        self._checksums = StoredChecksums(path, FILE)
        self._content = {key: _without_arrays(value) for key, value in content.items()}
        num_read = sum(value is not content[key] for key, value in self._content.items())
        if num_read:
            self.notes.append(
                f"{path}: {num_read} videos are numpy arrays or lists, which every process reads "
                f"into memory; to have them mapped, {pack_command(path)}"
            )

    def keys(self) -> Iterable[object]:
        return self._content

    def value(self, key: object) -> Any:
        return joined_frames(self._content[key])

    def verify(self, key: object) -> None:
        _verify(self._checksums, key, self._content[key])


def _pickled_bytes(path: Path) -> int:
    """Of the part of a torch file that torch reads into memory; 0 for what is no zip file."""
    try:
        with open_to_read(path) as file, zipfile.ZipFile(file) as archive:
            sizes = [e.file_size for e in archive.infolist() if e.filename.endswith("data.pkl")]
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return 0  # who loads it says what is wrong
    return sum(sizes)


def _verify(checksums: StoredChecksums, key: object, value: Any) -> None:
    """The CRC-32 of each mapped tensor. Those of arrays and lists were compared as they were read.

    An array's tensor is not of the file.
    """
    name = f"the features of video {show(key)}"
    if isinstance(value, _Read):
        return
    for tensor in value if isinstance(value, list | tuple) else [value]:
        checksums.verify(name, tensor)


class _Read:
    """Frames that were read into memory."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames


def _without_arrays(value: Any) -> Any:
    """`value`, or its frames where it is a numpy array, or a list of arrays or numbers."""
    if isinstance(value, Array):
        tensor = value.tensor()
        return value if tensor is None else _Read(tensor)
    if not isinstance(value, list | tuple) or any(isinstance(v, Tensor) for v in value):
        return value
    frames = joined_frames([_frame(item) for item in value])
    return _Read(frames) if isinstance(frames, Tensor) else value


def _frame(item: Any) -> Any:
    """A frame of a list as a tensor; None: it is none."""
    if isinstance(item, Array):
        return item.tensor()
    if isinstance(item, list | tuple) and item and all(type(n) is float for n in item):
        return torch.tensor(item)
    return None


def joined_frames(value: Any) -> Any:
    """`value`; a list of frames, [width] or [1, width], as one tensor [frames, width]."""
    if isinstance(value, _Read):
        return value.frames
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, list | tuple) or not value:
        return value
    if not all(_is_frame(item, value[0]) for item in value):
        return value
    return torch.stack([item.detach().flatten() for item in value])


def _is_frame(item: Any, first: Any) -> bool:
    if not isinstance(item, Tensor) or item.layout is not torch.strided or item.is_meta:
        return False
    is_row = item.ndim == 1 or (item.ndim == 2 and item.shape[0] == 1)
    return is_row and isinstance(first, Tensor) and item.shape[-1:] == first.shape[-1:]


class _Safetensors:
    """A mapped safetensors file. The format has no checksums."""

    def __init__(self, path: Path) -> None:
        self.notes, self._path = list[str](), path
        require_whole(path, "safetensors")
        try:
            self._file = safe_open(path, "pt")
        except (SafetensorError, OSError) as problem:
            fail(f"{path}: {FILE} is no safetensors file ({problem}); fetch or copy it again")
        if not self._file.keys():
            fail(f"{path}: {FILE} holds no tensor; fetch the right file")

    def keys(self) -> Iterable[object]:
        return list(self._file.keys())

    def value(self, key: object) -> Any:
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, AttributeError, TypeError) as problem:
            fail(f"{self._path}: {show(key)} cannot be read ({problem}); save it as float32")

    def verify(self, key: object) -> None:
        """Nothing to compare."""


class _Folder:
    """A file per video, opened when its video is asked for; its key is its path in the folder."""

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.notes = list[str]()
        self._files: dict[str, Path] = {}
        for file in files:
            name = str(file.relative_to(path).with_suffix(""))
            if (other := self._files.setdefault(name, file)) != file:
                fail(f"{path}: {other.name} and {file.name} are both of one video; keep one")
        if not files:
            fail(f"{path}: the folder holds no {', '.join(VIDEO_SUFFIXES)}; name another")

    def keys(self) -> Iterable[object]:
        return self._files

    def value(self, key: object) -> Any:
        path = self._files[str(key)]
        if path.suffix.lower() == ".npy":
            return map_npy(path)
        if path.suffix.lower() == ".safetensors":
            file = _Safetensors(path)
            keys = list(file.keys())
            return file.value(keys[0]) if len(keys) == 1 else f"{len(keys)} tensors"
        return joined_frames(_without_arrays(_only_value(_load(path))))

    def verify(self, key: object) -> None:
        path = self._files[str(key)]
        if path.suffix.lower() in (".pt", ".pth"):
            value = _without_arrays(_only_value(_load(path)))
            _verify(StoredChecksums(path, FILE), key, value)


def _load(path: Path) -> Any:
    return load_tensors(path, FILE, ALLOWED_CLASSES)


def _only_value(content: Any) -> Any:
    """Of a dict with one entry: its value."""
    is_dict = isinstance(content, dict) and len(content) == 1
    return next(iter(content.values())) if is_dict else content


def describe(value: object) -> str:
    """What a container holds in place of features, for messages."""
    if isinstance(value, Tensor) and not value.is_nested:  # a nested tensor has no shape
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of length {len(value)}"
    return str(value) if isinstance(value, str | Array) else type(value).__name__
