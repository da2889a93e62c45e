"""Numbers that lie in a file as they are, as tensors of the mapped file."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vico.errors import fail
from vico.io.numpy_arrays import NUMBERS
from vico.io.paths import open_to_read
from vico.io.safe_load import failed_download

FILE = "the video feature file"  # in messages


def require_whole(path: Path, kind: str) -> None:
    """Raise UserError for what cannot be opened, and for what a failed download leaves."""
    try:
        with open_to_read(path) as file:
            head, num_bytes = file.read(512), os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        fail(f"{path}: no such file; {FILE} should be there")
    except (OSError, ValueError) as problem:
        fail(f"{path}: {FILE} cannot be opened ({getattr(problem, 'strerror', None) or problem})")
    if description := failed_download(head, num_bytes):
        fail(f"{path}: {FILE} is {description}")
    if num_bytes < 16:
        fail(f"{path}: {FILE} is cut off ({num_bytes} bytes), no {kind} file; copy it again")


def map_npy(path: Path) -> Tensor:
    """The array of a .npy file as a view of the mapped file. Raises UserError."""
    require_whole(path, "numpy")
    try:
        with open_to_read(path) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
            offset = file.tell()
    except Exception as problem:  # a damaged header can make the parser raise anything
        fail(f"{path}: is no whole .npy file ({problem}); fetch or copy it again")
    if dtype.hasobject:
        fail(f"{path}: an array of Python objects, refused because loading it can run code")
    if f"{dtype.kind}{dtype.itemsize}" not in NUMBERS:
        fail(f"{path}: an array of {dtype}, not of floating-point numbers; save it as float32")
    frames = mapped_numbers(path, offset, shape[::-1] if is_fortran else shape, dtype)
    return frames.permute(*reversed(range(frames.ndim))) if is_fortran else frames


def mapped_numbers(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
    """Numbers that lie in a file. Those of another byte order are copied."""
    num_bytes, size = math.prod(shape) * dtype.itemsize, path.stat().st_size
    if min(shape, default=0) < 0 or offset + num_bytes > size:
        fail(
            f"{path}: {FILE} claims {num_bytes:,} bytes of numbers and holds "
            f"{max(0, size - offset):,}; fetch or copy it again"
        )
    storage: Any = torch.UntypedStorage.from_file(str(path), False, offset + num_bytes)
    raw = torch.empty(0, dtype=torch.uint8).set_(storage)[offset:]
    if offset % dtype.itemsize:
        raw = raw.clone()
    if not dtype.isnative:
        numbers = raw.numpy().view(dtype).astype(dtype.newbyteorder("="))
        return torch.from_numpy(numbers).reshape(shape)
    kind: torch.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    return raw.view(kind).reshape(shape)
