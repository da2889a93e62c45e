"""Features in an HDF5 file."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vico.data.mapped_numbers import FILE, mapped_numbers, require_whole
from vico.errors import UserError, fail, show
from vico.io.numpy_arrays import NUMBERS

# Of a compressed video, in bytes, and how many times what is stored.
MAX_UNPACKED, MAX_RATIO = 1 << 26, 16


@contextlib.contextmanager
def _refusing(fault: str) -> Iterator[None]:
    """A damaged file can make the library raise anything, wherever it is asked something."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        fail(f"{fault} ({problem}); fetch or copy the file again")


class Hdf5:
    """A dataset per video; or one of all, [videos, frames, width], beside one called `ids`.

    Mapped, or read video by video where compressed. Links to other files are not followed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import h5py
        except ModuleNotFoundError:
            fail(f"{path}: HDF5 files need h5py; run: pip install -e '.[data]'")
        require_whole(path, "HDF5")
        self.notes, self._path = list[str](), path
        self._datasets: dict[str, Any] = {}

        def visit(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                self._datasets[name] = item

        with _refusing(f"{path}: {FILE} is no whole HDF5 file"):
            self._file = h5py.File(path, "r", locking=False)
            self._file.visititems(visit)
            self._joint = self._of_all_videos()
        if not self._datasets:
            fail(f"{path}: {FILE} holds no dataset; fetch the right file")
        if self._joint is not None:
            name = show(self._joint.name.strip("/"))
            self.notes.append(
                f"{path}: a video is a row of {name}, at the place of its id in 'ids'"
            )
        self._ids = self._read_ids() if self._joint is not None else list(self._datasets)
        if not self._ids:
            fail(f"{path}: {FILE} holds no video; fetch the right file")
        self._rows = {key: row for row, key in enumerate(self._ids)}

    def _of_all_videos(self) -> Any:
        """The dataset of all videos, in the layout that NExT-QA's features are published in."""
        ids = self._datasets.get("ids")
        others = [dataset for name, dataset in self._datasets.items() if name != "ids"]
        if ids is None or len(others) != 1 or len(ids.shape or ()) != 1:
            return None
        (joint,) = others
        return joint if len(joint.shape or ()) == 3 else None

    def _read_ids(self) -> list[object]:
        dataset, num_rows = self._datasets["ids"], self._joint.shape[0]
        if dataset.shape[0] != num_rows:
            name = show(self._joint.name.strip("/"))
            fail(
                f"{self._path}: 'ids' holds {dataset.shape[0]} ids, and {name} {num_rows} videos; "
                "fetch the right file"
            )
        place = f"{self._path}: 'ids'"
        with _refusing(f"{place} cannot be read"):  # a text may be in another encoding, too
            _refuse_elsewhere(dataset, place)
            _refuse_claims(dataset, dataset.nbytes, place)
            ids: list[object] = dataset[()].tolist()
            return [key.decode() if isinstance(key, bytes) else key for key in ids]

    def keys(self) -> Iterable[object]:
        return self._ids

    def value(self, key: object) -> Any:
        place = f"{self._path}: {show(key)}"
        with _refusing(f"{place} cannot be read"):  # a filter may be missing, too
            if self._joint is None:
                return self._numbers(self._datasets[str(key)], place)
            return self._numbers(self._joint, place, self._rows[key])

    def _numbers(self, dataset: Any, place: str, row: int | None = None) -> Any:
        """Of the dataset, or of one row of it; or what lies there in place of numbers."""
        _refuse_elsewhere(dataset, place)
        if dataset.shape is None or f"{dataset.dtype.kind}{dataset.dtype.itemsize}" not in NUMBERS:
            return f"{list(dataset.shape or ())} {dataset.dtype}"
        shape = dataset.shape if row is None else dataset.shape[1:]
        num_bytes = math.prod(shape) * dataset.dtype.itemsize
        offset = dataset.id.get_offset()
        if offset is not None:
            start = offset + (row or 0) * num_bytes
            return mapped_numbers(self._path, start, shape, dataset.dtype)
        _refuse_claims(dataset, num_bytes, place)
        numbers = dataset[() if row is None else row]
        return torch.from_numpy(numbers.astype(numbers.dtype.newbyteorder("="), copy=False))

    def verify(self, key: object) -> None:
        """HDF5 compares the checksums of a dataset that has some as it reads it."""


def _refuse_elsewhere(dataset: Any, place: str) -> None:
    """Raise UserError for a dataset whose numbers are in other files."""
    if dataset.external or dataset.is_virtual:
        fail(f"{place} lies in another file, which is not read; copy it into this one")


def _refuse_claims(dataset: Any, num_bytes: int, place: str) -> None:
    """Raise UserError for a dataset that takes much more memory than its file holds."""
    stored = dataset.id.get_storage_size()
    if num_bytes > max(MAX_UNPACKED, MAX_RATIO * stored):
        fail(f"{place} claims {num_bytes:,} bytes and holds {stored:,}; save it again")
