"""Loads `.pth` files without executing anything in them. No other module calls `torch.load`.

`torch.load` fails on a login page saved as `.pth`, a git-lfs pointer or half a download with
messages that name neither the file nor the cause, so the file's format is checked first.
"""

import ctypes
import io
import mmap
import os
import pickle
import re
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vico.errors import UserError, fail, one_line
from vico.io.old_torch_format import MAGIC, find_fault
from vico.io.paths import MAX_BYTES, open_to_read, read_bytes
from vico.io.pickle_sizes import sized_class

MAX_REASON_CHARACTERS = 160
# A mapping of this process: its addresses and file, then its counts in kB.
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ +(/.*)\n((?:[A-Z].*\n)+)", re.M)
MAX_SHARING = 16  # tensors of the same numbers, on average: tied weights, clips of one video
_DAMAGED = "is cut off or damaged; fetch or copy it again and compare the sizes"
_CONVERT = (
    'python -c "import argparse, torch; '
    "torch.serialization.add_safe_globals([argparse.Namespace]); "
    "torch.save(torch.load('IN', weights_only=True), 'OUT')\""
)
_REFUSED = (
    "refused because loading it can run code; save it again as plain tensors where you trust it"
)


def failed_download(head: bytes, num_bytes: int) -> str | None:
    """What a file is when its download went wrong, and what to do; None: no sign of that.

    `head`: the file or its first bytes. `num_bytes`: its size.
    """
    start = head[:512].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return f"an HTML page ({num_bytes:,} bytes), most likely a failed download; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return (
            f"a git-lfs pointer ({num_bytes:,} bytes), not the file itself; "
            "run 'git lfs pull' or fetch it"
        )
    return None


def is_float_tensor(value: object) -> bool:
    """True for a dense tensor of floating-point numbers: not sparse, nested, quantized or "meta".

    The 8-bit and 4-bit types do not count: torch cannot compare or add their numbers.
    """
    import torch  # heavy: the planner reads JSON through this package without torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and not value.is_meta
    )


_ALLOWING = threading.Lock()


def load_tensors(
    path: Path,
    what: str,
    allowed_classes: Sequence[type | tuple[Callable[..., Any], str]] = (),
    *,
    allow_old_format: bool = False,
    verify_checksums: bool = False,
    error: type[UserError] = UserError,
) -> Any:
    """The content of a torch file, memory-mapped: all processes of a machine share its pages.

    `what` names the content in messages. `allowed_classes` may be built besides tensors and plain
    containers; a name is that in the file. `allow_old_format`: also accept the format of
    torch < 1.6, which cannot be mapped and is read into memory. `verify_checksums`: compare the
    checksums that torch.save wrote, which torch.load ignores (takes a second per GB). Raises
    `error`.
    """
    import torch

    fault, is_zip = _format_fault(path, what, allow_old_format, verify_checksums)
    if fault is not None:
        raise error(one_line(fault))
    try:
        # The list is the process's: of two threads, one would end or widen the other's.
        with _ALLOWING, torch.serialization.safe_globals(list(allowed_classes)):
            content, fault = _load_zip(path) if is_zip else _load_old_format(path)
        if fault is None:
            return content
    except pickle.UnpicklingError as problem:
        match = re.search(r"GLOBAL (\S+)", str(problem))
        held = (
            f"the Python object {match[1]}" if match else "more than tensors and plain containers"
        )
        fault = f"holds {held}, {_REFUSED}"
    except Exception as problem:  # a damaged stream can make the unpickler raise anything
        reason = (str(problem).splitlines() or [""])[0][:MAX_REASON_CHARACTERS]
        fault = f"{_DAMAGED} ({type(problem).__name__}: {reason})"
    raise error(one_line(f"{path}: {what} {fault}"))


class StoredChecksums:
    """The CRC-32 sums that torch.save wrote, of a file that is loaded; torch.load ignores them.

    `what` names the content in messages. The file's directory is read at the first comparison.
    """

    def __init__(self, path: Path, what: str, error: type[UserError] = UserError) -> None:
        self._path, self._what, self._error = path, what, error
        self._known: set[tuple[int, int]] | None = None  # (bytes, checksum); empty: there are none
        self._verified: set[int] = set()  # addresses of storages
        self._lock = threading.Lock()

    def verify(self, name: str, tensor: Any) -> None:
        """Raise an error if the bytes below `tensor` are not those that were saved.

        A storage that several tensors share is read once. Threads may call it at the same time.
        """
        import torch

        storage = tensor.untyped_storage()
        with self._lock:
            if self._known is None:
                self._known = self._read()
            if not self._known or storage.data_ptr() in self._verified:
                return
            self._verified.add(storage.data_ptr())
        checksum = zlib.crc32(torch.empty(0, dtype=torch.uint8).set_(storage).numpy().data)
        if storage.nbytes() and (storage.nbytes(), checksum) not in self._known:
            self._fail(f"(wrong checksum of {name})")

    def _read(self) -> set[tuple[int, int]]:
        """What the directory holds of the storages. The other parts are small, and compared."""
        try:
            with zipfile.ZipFile(self._path) as archive:
                entries = archive.infolist()
                if not any(entry.CRC for entry in entries):
                    return set()  # torch.serialization.set_crc32_options(False)
                for entry in entries:
                    if not _is_storage(entry):
                        archive.read(entry)
        except Exception as problem:  # a damaged name in a header is a UnicodeDecodeError
            self._fail(f"({problem})")
        return {(entry.file_size, entry.CRC) for entry in entries if _is_storage(entry)}

    def _fail(self, reason: str) -> NoReturn:
        fail(f"{self._path}: {self._what} {_DAMAGED} {reason}", self._error)


def _is_storage(entry: zipfile.ZipInfo) -> bool:
    """Whether a part of a torch file holds numbers of a tensor."""
    return entry.filename.rpartition("/")[0].endswith("/data")


def release_pages(path: Path) -> None:
    """Give back this process's memory that holds pages of a mapped file.

    The next use maps them again, from the system's file cache. Otherwise a process that reads a
    whole file of 8 GB counts as one of 8 GB. Pages that were written to would lose that (torch
    swaps the bytes of a big-endian file): such a mapping is left alone.
    """
    libc, name = ctypes.CDLL(None), str(path.resolve())
    for mapping in _MAPPING.finditer(Path("/proc/self/smaps").read_text("utf-8", "replace")):
        start, stop, file, counts = mapping.groups()
        if file == name and re.search(r"^Anonymous: +0 kB$", counts, re.M):
            address, length = int(start, 16), int(stop, 16) - int(start, 16)
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _load_zip(path: Path) -> tuple[Any, str | None]:
    """(content, what is wrong with it)."""
    import torch

    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content, _size_fault(path, content)


def _load_old_format(path: Path) -> tuple[Any, str | None]:
    """(content, what is wrong with it); the content is not loaded when its format is wrong."""
    import torch

    # torch gets bytes, not the path: given a path it first tries an even older format, a tar
    # archive, and unpacks it.
    data = read_bytes(path)
    if fault := find_fault(data):
        return None, fault
    content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return content, _overlap_fault(content)


def _format_fault(
    path: Path, what: str, allow_old_format: bool, verify_checksums: bool
) -> tuple[str | None, bool]:
    """(the message when the file cannot be loaded, whether it is a zip and can be mapped)."""
    try:
        with open_to_read(path) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            head = file.read(512)
    except FileNotFoundError:
        return f"{path}: no such file; {what} should be there", False
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        return f"{path}: {what} cannot be opened ({reason})", False
    is_zip = head.startswith(b"PK\x03\x04")
    fault: str | None
    if description := failed_download(head, num_bytes):
        fault = f"is {description}"
    elif is_zip:
        fault = _zip_fault(path, verify_checksums)
    elif head.startswith(MAGIC):
        fault = None
        cannot_map = "is in torch's old format, which cannot be memory-mapped"
        if not allow_old_format:
            fault = f"{cannot_map}; convert it: {_CONVERT}"
        elif num_bytes > MAX_BYTES:
            too_large = f"has {num_bytes:,} bytes, more than {MAX_BYTES:,}"
            fault = f"{cannot_map}, and {too_large}; convert it: {_CONVERT}"
    elif len(head) < len(MAGIC):
        fault = f"{_DAMAGED} ({num_bytes} bytes)"
    else:
        fault = f"is no torch file (it begins with {head[:8]!r}); fetch the right one"
    return None if fault is None else f"{path}: {what} {fault}", is_zip


def _zip_fault(path: Path, verify_checksums: bool) -> str | None:
    """What is wrong with the zip archive around the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            # First: the other checks read the parts, which may be larger than the file.
            if fault := _parts_fault(archive.infolist(), path.stat().st_size):
                return fault
            broken = archive.testzip() if verify_checksums else None
            sized = _sized_class(archive)
    except Exception:  # a damaged directory can make zipfile raise anything
        return f"{_DAMAGED} (no whole zip directory at its end)"
    if sized is not None:
        return f"builds {sized} of any size; save it again as plain tensors where you trust it"
    if broken is not None:
        return f"{_DAMAGED} (wrong checksum of its part '{broken}')"
    return None


def _parts_fault(entries: Sequence[zipfile.ZipInfo], num_bytes: int) -> str | None:
    """What is wrong with the parts of an archive of `num_bytes`, by its directory."""
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    # A TorchScript archive holds constants.pkl.
    if "data.pkl" not in names or "constants.pkl" in names:
        return "is a zip archive, but not one of tensors written by torch.save; fetch the right one"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        # torch maps the stored bytes as they are: it would take compressed ones for numbers.
        return "was packed again by another program and cannot be memory-mapped; fetch the original"
    if (claimed := sum(entry.file_size for entry in entries)) > num_bytes:
        return f"claims parts of {claimed:,} bytes and has {num_bytes:,}; fetch or copy it again"
    return None


def _sized_class(archive: zipfile.ZipFile) -> str | None:
    """A class in the archive's pickles whose size is a number; None: there is none."""
    has_checksums = any(entry.CRC for entry in archive.infolist())
    for entry in archive.infolist():
        if not has_checksums:
            del entry.CRC  # zipfile then compares none; torch can save without them
        is_pickle = entry.filename.lower().endswith("data.pkl")
        if is_pickle and (name := sized_class(archive.read(entry))):
            return name
    return None


def _size_fault(path: Path, content: Any) -> str | None:
    """Compares the tensors' sizes with the zip's records.

    torch does not: a tensor that claims more than its record is mapped over the bytes behind it.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    record_sizes = Counter(entry.file_size for entry in entries if _is_storage(entry))
    if fault := _overlap_fault(content):
        return fault
    claimed_sizes = Counter(_storage_sizes(content).values())
    if claimed_sizes - record_sizes:
        return "claims tensors of other sizes than it holds; fetch or copy it again"
    return None


def _overlap_fault(content: Any) -> str | None:
    """A tensor of stride 0, or many views of one, claim more numbers than are stored.

    A copy takes the memory, and a scan the time, of what is claimed.
    """
    num_claimed = 0
    for value in _dense_tensors(content):
        num_bytes = value.numel() * value.element_size()
        num_claimed += num_bytes
        if num_bytes > value.untyped_storage().nbytes():
            shape = list(value.shape)
            return f"holds a tensor {shape} that repeats fewer numbers; save a copy (.contiguous())"
    num_stored = sum(_storage_sizes(content).values())
    if num_claimed > MAX_SHARING * num_stored:
        return (
            f"claims {num_claimed:,} bytes of numbers and holds {num_stored:,}; "
            "save copies of the tensors"
        )
    return None


def _dense_tensors(content: Any) -> Iterator[Any]:
    import torch

    for value in _walk(content):
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            continue
        if not (value.is_meta or value.is_nested or value.is_quantized):
            yield value


def _storage_sizes(content: Any) -> dict[int, int]:
    """Bytes of each storage that the content refers to, by its address."""
    sizes: dict[int, int] = {}
    for value in _dense_tensors(content):
        storage = value.untyped_storage()
        if storage.nbytes():
            sizes[storage.data_ptr()] = storage.nbytes()
    return sizes


def _walk(content: Any) -> Iterator[Any]:
    """Everything in nested containers, each object once: a pickled list can contain itself."""
    pending, visited = [content], set[int]()
    while pending:
        value = pending.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        yield value
        if isinstance(value, dict):
            pending += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            pending += value
        elif type(value).__name__ == "Namespace":
            pending += vars(value).values()
