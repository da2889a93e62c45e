"""Numbers of numpy in a torch file, read without numpy.

A training script that stores `best_acc = correct.mean()` pickles two calls of numpy. numpy's own
functions also take codes of any size and kind, so these stand in for them, under their names, where
torch.load builds allowed classes alone.
"""

import struct
from collections.abc import Callable
from typing import Any

# numpy's codes of numbers, and struct's. Others (texts, dates, objects) become None.
_CODES = {
    **{"b1": "?", "f2": "e", "f4": "f", "f8": "d"},
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q"},
    **{"u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
}


class DType:
    """Stands in for numpy.dtype: a code such as "f8", and the order of its bytes."""

    def __init__(self, code: object, *_: object) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] == ">":
            self.order = ">"


def scalar(dtype: object, data: object = None) -> bool | int | float | None:
    """Stands in for numpy's function of this name. None: no number of a known kind."""
    if not isinstance(dtype, DType) or not isinstance(data, bytes):
        return None
    code = _CODES.get(dtype.code) if isinstance(dtype.code, str) else None
    if code is None:
        return None
    layout = struct.Struct(dtype.order + code)
    if len(data) != layout.size:
        raise ValueError(f"a number of {layout.size} bytes has {len(data)}")
    (value,) = layout.unpack(data)
    result: bool | int | float = value
    return result


# numpy 1 has its functions in numpy.core.
ALLOWED_CLASSES: list[tuple[Callable[..., Any], str]] = [
    (DType, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
]
