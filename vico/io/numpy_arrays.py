"""Arrays of numpy in a torch file, read without running a pickle.

`torch.save({"video": array})` pickles a call that makes an empty array, and the array's state. The
stand-ins here take both as plain values, under numpy's names; the numbers are made from them only
after their kind and size have been checked. An array of objects stays a stand-in.
"""

import math
from collections.abc import Callable
from typing import Any

from vico.io.numpy_scalars import ALLOWED_CLASSES as SCALARS
from vico.io.numpy_scalars import DType

# numpy's codes of numbers that torch has too.
NUMBERS = ("b1", "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


class Array:
    """Stands in for numpy.ndarray."""

    def __init__(self, *_: object) -> None:
        self._state: object = None

    def __setstate__(self, state: object) -> None:
        self._state = state

    def __str__(self) -> str:
        """For messages."""
        state = self._state
        if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], DType):
            return "a damaged numpy array"
        if not isinstance(state[2].code, str) or state[2].code not in NUMBERS:
            return f"a numpy array of type {str(state[2].code)[:20]!r}"
        return "a numpy array of another size than it has numbers"

    def tensor(self) -> Any:
        """A torch tensor in this machine's byte order; None: no numbers, or not so many."""
        import numpy as np
        import torch

        match self._state:
            case (_, tuple() as shape, DType(code=str() as code, order=order), layout, bytes(data)):
                if code not in NUMBERS or not all(type(n) is int and n >= 0 for n in shape):
                    return None
                if math.prod(shape) * int(code[1:]) != len(data):
                    return None
                numbers = np.frombuffer(data, np.dtype(order + code)).astype(np.dtype(code))
                return torch.from_numpy(numbers.reshape(shape, order="F" if layout else "C"))
        return None


def reconstruct(*_: object) -> Array:
    """Stands in for numpy's function _reconstruct, which makes an array of any class and size."""
    return Array()


# numpy 1 has its functions in numpy.core.
ALLOWED_CLASSES: list[tuple[Callable[..., Any], str]] = [
    *SCALARS,
    (Array, "numpy.ndarray"),
    (reconstruct, "numpy.core.multiarray._reconstruct"),
    (reconstruct, "numpy._core.multiarray._reconstruct"),
]
