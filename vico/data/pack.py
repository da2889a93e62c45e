"""Features of any kind, written once as a file that can be memory-mapped.

A video is written as soon as it is read, so that memory holds one at a time.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import load_file
from torch import Tensor

from vico.data.feature_files import describe, files_of, open_container
from vico.data.video_ids import VideoIds
from vico.errors import UserError, fail, show
from vico.io import log
from vico.io.atomic import TEMPORARY_SUFFIX, replacing, require_writable
from vico.io.paths import MAX_BYTES
from vico.io.safe_load import is_float_tensor, release_pages

KINDS = (".safetensors", ".pth")
DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
RELEASE_BYTES = 1 << 28  # read of a mapped source between two releases of its memory


def pack(source: Path, target: Path) -> int:
    """Write the features at `source` to `target`, which must not exist.

    Returns the number of videos. Raises UserError or DiskError.
    """
    if target.suffix not in KINDS:
        raise UserError(f"{target}: the target's name must end in {' or '.join(KINDS)}")
    if os.path.lexists(target):
        raise UserError(f"{target}: already exists; name another target, or remove it")
    require_writable(target.parent, "the target's folder")
    reader = _Reader(source)
    with replacing(target) as file:
        if target.suffix == ".safetensors":
            write_safetensors(reader.kinds, reader.read, file)
        else:
            _write_torch(reader, file, target)
    return len(reader.kinds)


class _Reader:
    """The videos of the source, one after the other."""

    def __init__(self, source: Path) -> None:
        """Looks at all of them. Raises UserError for what are no features."""
        self._source = source
        self._container = open_container(source, files_of(source), MAX_BYTES)
        self._keys = VideoIds(self._container.keys(), source).keys
        self._progress = log.ProgressLog(lambda _: None, is_main=True)
        self._unreleased_bytes = self._num_read = 0
        # Type and shape by id, those with the largest numbers first: all lie at multiples of theirs
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for text in self._keys:
            value = self._value(text)
            found[text] = value.dtype, tuple(value.shape)
            self._progress(f"{source}: looked at {len(found)} of {len(self._keys)} videos")
        self.kinds = dict(sorted(found.items(), key=lambda item: -item[1][0].itemsize))

    def _value(self, text: str) -> Tensor:
        value = self._container.value(self._keys[text])
        if not is_float_tensor(value) or value.ndim != 2 or not value.numel():
            fail(
                f"{self._source}: {show(text)} is {describe(value)}, no floating-point tensor "
                "[frames >= 1, width]; correct it, or leave it out"
            )
        frames: Tensor = value
        return frames

    def read(self, text: str) -> Tensor:
        """Verified. Raises UserError for wrong checksums, and for what has changed meanwhile."""
        frames = self._value(text)
        if (frames.dtype, tuple(frames.shape)) != self.kinds[text]:
            fail(f"{self._source}: {show(text)} changed while it was read; start again")
        self._container.verify(self._keys[text])
        self._unreleased_bytes += frames.nbytes
        if self._unreleased_bytes > RELEASE_BYTES:
            release_pages(self._source)
            self._unreleased_bytes = 0
        self._num_read += 1
        self._progress(f"{self._source}: {self._num_read} of {len(self.kinds)} videos")
        return frames


def write_safetensors(
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    file: IO[bytes],
) -> None:
    """The length of a JSON header, the header, and the numbers, in the order of `kinds`."""
    header, stop = dict[str, object](), 0
    for name, (dtype, shape) in kinds.items():
        start, stop = stop, stop + torch.Size(shape).numel() * dtype.itemsize
        entry = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (start, stop)}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in kinds:
        file.write(read(name).contiguous().view(torch.uint8).numpy().data)


def _write_torch(reader: _Reader, file: IO[bytes], target: Path) -> None:
    """By torch.save, which wants all tensors at once: they are mapped from a scratch file."""
    prefix = f".{target.name}."
    with tempfile.NamedTemporaryFile(
        prefix=prefix, suffix=TEMPORARY_SUFFIX, dir=target.parent
    ) as scratch:
        write_safetensors(reader.kinds, reader.read, scratch)
        scratch.flush()
        save_torch(load_file(scratch.name), file)


def save_torch(features: Mapping[str, Tensor], file: IO[bytes]) -> None:
    """torch.save. Raises OSError for a full disk, which torch reports otherwise."""
    try:
        torch.save(features, file)
    except RuntimeError as problem:
        raise OSError(0, str(problem).partition("\n")[0]) from None
