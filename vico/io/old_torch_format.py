"""Checks a file in the format of torch < 1.6 before torch loads it.

Such a file is five pickles (magic number, version, system, content, keys of the storages),
followed by the storages' bytes. torch reserves the memory that the content claims, whether or not
the file holds that many bytes. The pickles are read as opcodes here, which executes nothing.
"""

import io
import pickletools
from collections.abc import Iterator
from typing import Any

from vico.io.pickle_sizes import sized_class

# The pickled magic number (torch.serialization.MAGIC_NUMBER, protocol 2).
MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
NUM_PICKLES = 5


class _NotAStorageError(ValueError):
    """A persistent id that is not the tuple torch.save writes."""


def find_fault(data: bytes) -> str | None:
    """What is wrong with the file's content `data`; None: it holds all the numbers it claims."""
    stream = io.BytesIO(data)
    sizes: dict[str, int] = {}
    listed: set[str] = set()
    try:
        for number in range(NUM_PICKLES):
            start = stream.tell()
            is_key_list = number == NUM_PICKLES - 1
            for kind, value in _read_pickle(stream):
                if kind == "storage":
                    key, size = value
                    sizes[key] = max(size, sizes.get(key, 0))
                elif is_key_list and isinstance(value, str):
                    listed.add(value)
            if name := sized_class(data[start : stream.tell()]):
                return f"builds {name} of any size; save it again as plain tensors"
    except _NotAStorageError:
        return "was not written by torch.save as it is; save it again where you trust it"
    num_left, num_claimed = len(data) - stream.tell(), sum(sizes.values())
    if num_claimed > num_left or sizes.keys() - listed:
        return (
            f"claims {num_claimed:,} numbers that are not all among its {num_left:,} bytes of "
            "them; fetch or copy it again"
        )
    return None


def _read_pickle(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """One pickle's ("storage", (key, number of elements)) and ("value", argument) items.

    torch.save writes a storage as a persistent id, the tuple (..., key, location, size, None).
    """
    memo: dict[Any, Any] = {}
    # The latest pushed values; the name of an opcode stands for a value that it builds itself.
    recent: list[Any] = [None] * 5
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = recent[-1]
        elif opcode.name == "BINPERSID":
            key, _, size, nothing, end = recent[-5:]
            is_counted = isinstance(key, str) and isinstance(size, int) and size >= 0
            if not is_counted or (nothing, end) != ("NONE", "TUPLE"):
                raise _NotAStorageError
            yield "storage", (key, size)
        else:
            value = memo.get(argument) if opcode.name.endswith("BINGET") else argument
            recent = [*recent[-4:], opcode.name if value is None else value]
            yield "value", value
