"""Finds a pickle that asks for memory by a number.

torch.load without code execution (weights_only) still calls a few classes whose argument is a size:
`bytearray(6_000_000_000)` is a pickle of 40 bytes. torch.save writes none of these calls. The
pickle is read as opcodes, which executes nothing.
"""

import pickletools
from collections.abc import Iterator

_MARKS = (b"bytearray", b"Tensor", b"UntypedStorage", b"TypedStorage")
_UNTYPED = "UntypedStorage"
_READS = ("BINUNICODE", "BINGET", "LONG_BINGET")
_NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINGET", "LONG_BINGET")
# What follows the class of a storage where torch.save names one: key, device, size, the tuple.
_STORAGE = (_READS, _READS, _NUMBERS, ("TUPLE",), ("BINPERSID",))


def sized_class(data: bytes) -> str | None:
    """A class in the pickle `data` that would take as much memory as a number says; None: none.

    Raises ValueError for a damaged pickle.
    """
    if not any(mark in data for mark in _MARKS):
        return None
    operations = list(_operations(data))
    for place, (_, name) in enumerate(operations):
        last = name.rpartition(".")[2]
        if last == _UNTYPED:  # of newer types: a storage is named so, and must not be called
            following = [kind for kind, _ in operations[place + 1 : place + 1 + len(_STORAGE)]]
            is_named = len(following) == len(_STORAGE) and all(
                kind in allowed for kind, allowed in zip(following, _STORAGE, strict=True)
            )
            if is_named:
                continue
        if last in ("bytearray", _UNTYPED, "TypedStorage") or last.endswith("Tensor"):
            return name
    return None


def _operations(data: bytes) -> Iterator[tuple[str, str]]:
    """(opcode, class that it pushes or an empty text) of all but those that only fill the memo.

    A class that comes from the memo is "CLASS", as if it were written again.
    """
    memo: dict[object, str] = {}
    name = ""
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = name
            continue
        name = ""
        if opcode.name == "GLOBAL":
            name = str(argument).replace(" ", ".")
        elif opcode.name in ("BINGET", "LONG_BINGET"):
            name = memo.get(argument, "")
        yield ("CLASS" if name else opcode.name), name
