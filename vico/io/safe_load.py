"""The only place that opens `.pth` files: nothing in them is ever executed, and whatever is not one says so in one line.

`torch.load` fails on a login page saved as `.pth`, a git-lfs pointer or half a download with messages that name neither
the file nor the cause, so the format is looked at first.
"""

import io
import pickle
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vico.errors import UserError, one_line
from vico.io.atomic import read_bytes, require_file

if TYPE_CHECKING:
    pass

_OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled magic number of torch < 1.6
_DAMAGED = "is cut off or damaged; fetch or copy it again and compare the sizes"


def disguise(head: bytes, num_bytes: int) -> str | None:
    """What a file that begins with `head` is when a download went wrong, and what to do; None: nothing of the kind."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return f"an HTML page ({num_bytes:,} bytes), most likely a failed download; fetch it again"
    if start.startswith(b"version https://git-lfs"):
        return f"a git-lfs pointer ({num_bytes:,} bytes), not the file itself; run 'git lfs pull' or fetch it"
    return None


def is_numbers(value: object) -> bool:
    """An ordinary tensor of floating-point numbers: not sparse, nested, quantised, or a shape without content ("meta")."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.is_floating_point()
        and not value.is_meta
    )


def load_tensors(
    path: Path,
    what: str,
    allow: Sequence[type] = (),
    *,
    legacy: bool = False,
    whole: bool = False,
    error: type[UserError] = UserError,
) -> Any:
    """The content of a torch file, memory-mapped: pages are read when touched and shared by all processes of a machine.

    `what` names the content in messages. `allow`: classes that may be built besides tensors and plain containers.
    `legacy`: take torch's old format as well; it cannot be mapped, so it is read into this process's memory.
    `whole`: compare the checksums that torch.save wrote, which it never looks at itself (a second per GB).
    """
    import torch

    fault, is_zip = _format_fault(path, what, legacy, whole)
    if fault is not None:
        raise error(one_line(fault))
    try:
        with torch.serialization.safe_globals(list(allow)):
            if is_zip:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                fault = _stored_otherwise(path, content)
            else:
                # Not by its path: torch would look for its still older format first, a tar archive, and unpack it.
                data = read_bytes(path)
                fault = _old_format_fault(data)
                content = (
                    None
                    if fault
                    else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                )
        if not fault:
            return content
    except pickle.UnpicklingError as problem:
        named = re.search(r"GLOBAL (\S+)", str(problem))
        fault = (
            f"holds the Python object {named[1]}"
            if named
            else "holds more than tensors and plain containers"
        )
        fault += ", refused because loading it can run code; save it again as plain tensors where you trust it"
    except Exception as problem:  # a damaged stream can make the unpickler raise anything
        reason = (str(problem).splitlines() or [""])[0][:160]
        fault = f"{_DAMAGED} ({type(problem).__name__}: {reason})"
    raise error(one_line(f"{path}: {what} {fault}"))


def _format_fault(path: Path, what: str, legacy: bool, whole: bool) -> tuple[str | None, bool]:
    """(the message when this is no file that can be loaded, whether it is a zip and can be mapped)."""
    try:
        num_bytes = path.stat().st_size
        require_file(path)
        with path.open("rb") as file:
            head = file.read(512)
    except FileNotFoundError:
        return f"{path}: no such file; {what} should be there", False
    except (OSError, ValueError) as problem:
        return (
            f"{path}: {what} cannot be opened ({getattr(problem, 'strerror', None) or problem})",
            False,
        )
    if found := disguise(head, num_bytes):
        return f"{path}: {what} is {found}", False
    if head.startswith(b"PK\x03\x04"):
        fault = _zip_fault(path, whole)
        return (f"{path}: {what} {fault}" if fault else None), True
    if head.startswith(_OLD_TORCH):
        if legacy:
            return None, False
        again = "python -c \"import torch; torch.save(torch.load('IN', weights_only=True), 'OUT')\""
        return (
            f"{path}: {what} is in torch's old format, which cannot be memory-mapped; convert it: {again}",
            False,
        )
    if len(head) < len(_OLD_TORCH):
        return f"{path}: {what} {_DAMAGED} ({num_bytes} bytes)", False
    return (
        f"{path}: {what} is no torch file (it begins with {head[:8]!r}); fetch the right one",
        False,
    )


def _zip_fault(path: Path, whole: bool) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            broken = archive.testzip() if whole else None
    except Exception:  # a damaged directory can make zipfile raise anything
        return f"{_DAMAGED} (no whole zip directory at its end)"
    if broken is not None:
        return f"{_DAMAGED} (wrong checksum of its part '{broken}')"
    names = {entry.filename.rpartition("/")[2] for entry in entries}
    if "data.pkl" not in names or "constants.pkl" in names:
        return "is a zip archive, but not one of tensors written by torch.save; fetch the right one"
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        # torch maps the stored bytes as they are: compressed ones would be taken for numbers without a complaint.
        return "was packed again by another program and cannot be memory-mapped; fetch the original"
    return None


def _stored_otherwise(path: Path, content: Any) -> str | None:
    """A tensor of a zip file is as large as its record: torch does not look, and maps what lies behind it as numbers."""
    with zipfile.ZipFile(path) as archive:
        records = Counter(
            e.file_size
            for e in archive.infolist()
            if e.filename.rpartition("/")[0].endswith("/data")
        )
    found = Counter(_storages(content).values())
    return (
        "claims tensors of other sizes than it holds; fetch or copy it again"
        if found - records
        else None
    )


def _storages(content: Any) -> dict[int, int]:
    """Bytes of each storage that the content refers to, by address."""
    import torch

    found: dict[int, int] = {}
    for value in _walk(content):
        if (
            isinstance(value, torch.Tensor)
            and value.layout is torch.strided
            and not (value.is_meta or value.is_nested or value.is_quantized)
        ):
            storage = value.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
    return found


def _walk(content: Any) -> Iterator[Any]:
    """All that lies in nested containers, each object once: a pickle can make a list that holds itself."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple | set | frozenset):
            waiting += value
        elif type(value).__name__ == "Namespace":
            waiting += vars(value).values()


def _old_format_fault(data: bytes) -> str | None:
    """Why a file of torch's old format is not to be loaded: memory would be reserved that the file cannot fill, or would not.

    It is five pickles (magic number, version, system, content, keys of the storages), then the storages' bytes. They are read
    as opcodes, which builds nothing. torch.save writes a storage as a tuple that ends in key, place, size and None.
    """
    stream, sizes, listed = io.BytesIO(data), dict[Any, int](), set[Any]()
    for number in range(5):
        memo: dict[Any, Any] = {}
        recent: list[Any] = [None] * 5
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = recent[-1]
            elif opcode.name == "BINPERSID":
                key, _, size, nothing, closed = recent[-5:]
                if (
                    not isinstance(key, str)
                    or not isinstance(size, int)
                    or size < 0
                    or (nothing, closed) != ("NONE", "TUPLE")
                ):
                    return (
                        "was not written by torch.save as it is; save it again where you trust it"
                    )
                sizes[key] = max(size, sizes.get(key, 0))
            else:
                value = memo.get(argument) if opcode.name.endswith("BINGET") else argument
                recent = [*recent[-4:], opcode.name if value is None else value]
                if number == 4 and isinstance(value, str):
                    listed.add(value)
    there = len(data) - stream.tell()
    if sum(sizes.values()) > there or sizes.keys() - listed:
        return f"claims {sum(sizes.values()):,} numbers that are not all among its {there:,} bytes of them; fetch or copy it again"
    return None
