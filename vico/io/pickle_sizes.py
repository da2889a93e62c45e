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
# How torch.save writes a tensor that has attributes of Python: this call of a function that makes
# the tensor, the class Tensor, the function's arguments, and the attributes.
_WITH_ATTRIBUTES = "torch._tensor._rebuild_from_type_v2"
_MAKES_TENSORS = "torch._utils._rebuild_"
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
        if name == "torch.Tensor" and _is_type_of_result(operations, place):
            continue
        if last in ("bytearray", _UNTYPED, "TypedStorage") or last.endswith("Tensor"):
            return name
    return None


def _is_type_of_result(operations: list[tuple[str, str]], place: int) -> bool:
    """Whether the class at `place` is only an argument of _WITH_ATTRIBUTES, and never called."""
    before = operations[max(0, place - 3) : place]
    if len(before) < 3 or before[1][0] != "MARK":
        return False
    if before[0][1] != _WITH_ATTRIBUTES or not before[2][1].startswith(_MAKES_TENSORS):
        return False
    height, marks = 0, list[int]()  # of the stack above the class
    for kind, _ in operations[place + 1 :]:
        if kind == "MARK":
            marks.append(height)
            continue
        num_taken, is_to_mark, num_given = _EFFECTS[kind]
        if is_to_mark:
            if not marks:
                return kind == "TUPLE"  # that of the arguments
            height = marks.pop()
        if height < num_taken:
            return False  # this operation calls or changes the class
        height += num_given - num_taken
    return False


def _effect(opcode: pickletools.OpcodeInfo) -> tuple[int, bool, int]:
    """(objects that it takes, whether it takes all above a mark besides, objects that it gives)."""
    taken = list(opcode.stack_before)
    is_to_mark = pickletools.markobject in taken
    if is_to_mark:
        taken = taken[: taken.index(pickletools.markobject)]
    return len(taken), is_to_mark, len(opcode.stack_after)


_EFFECTS = {opcode.name: _effect(opcode) for opcode in pickletools.opcodes} | {
    "CLASS": (0, False, 1)
}


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
