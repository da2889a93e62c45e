"""The gates of a model: as numbers by layer and head, and as one picture."""

import re
import struct
import zlib

import numpy as np
import numpy.typing as npt
from torch import Tensor

Picture = npt.NDArray[np.uint8]  # [height, width, 3]
CELL = 8  # pixels of a head, each way
# A gate at the end of the scale: gate1 is shown by its tanh, gate2 is a logit.
LARGEST = {"gate1": 1.0, "gate2": 6.0}
RED, BLUE = np.array([178, 24, 43]), np.array([33, 102, 172])
_PNG = b"\x89PNG\r\n\x1a\n"


def gates_picture(weights: dict[str, Tensor]) -> Picture | None:
    """A row per layer, the lowest first, and a column per head: gate1 left, gate2 right.

    Blue is negative, white 0, red positive. None: there are no gates.
    """
    panels = []
    for kind, largest in LARGEST.items():
        values = gate_values(weights, kind)
        if values is None:
            return None
        panels.append(_colours(np.clip(values / largest, -1, 1)))
    left, right = panels
    between = np.full((len(left), CELL, 3), 255, dtype=np.uint8)
    return np.concatenate([left, between, right], axis=1)


def gate_values(weights: dict[str, Tensor], kind: str) -> npt.NDArray[np.float64] | None:
    """[layers, heads] of how much a gate acts, the lowest layer first; None: no layer has it.

    `kind`: gate1, of which tanh acts, or gate2, a logit.
    """
    rows = gates_by_layer(weights, kind)
    return np.stack(list(rows.values())) if rows else None


def gates_by_layer(weights: dict[str, Tensor], kind: str) -> dict[int, npt.NDArray[np.float64]]:
    """{layer: [heads]} as `gate_values` has them, the lowest layer first."""
    rows = {}
    for name, gate in weights.items():
        match = re.fullmatch(rf"layers\.(\d+)\..*{kind}", name)
        if match is not None:
            value = gate.detach().double().flatten()
            rows[int(match[1])] = (value.tanh() if kind == "gate1" else value).numpy()
    return dict(sorted(rows.items()))


def gate_record(weights: dict[str, Tensor]) -> dict[str, dict[str, list[float]]]:
    """{kind: {layer: a number per head}} as `gate_values` has them, of four digits, for log.txt."""
    record: dict[str, dict[str, list[float]]] = {}
    for kind in LARGEST:
        record[kind] = {}
        for layer, row in gates_by_layer(weights, kind).items():
            record[kind][str(layer)] = [float(f"{value:.4g}") for value in row]
    return record


def gate_curves(weights: dict[str, Tensor]) -> dict[str, float]:
    """Of each layer the mean over its heads: of |tanh(gate1)|, and of gate2."""
    curves = {}
    for kind in LARGEST:
        for layer, row in gates_by_layer(weights, kind).items():
            acting = np.abs(row) if kind == "gate1" else row
            curves[f"gates/{kind}/layer_{layer:02}"] = float(acting.mean())
    return curves


def _colours(shares: npt.NDArray[np.float64]) -> Picture:
    """[rows, columns] of -1 to 1, as cells of pixels."""
    strength = np.abs(shares)[..., None]
    colour = np.where(shares[..., None] > 0, RED, BLUE)
    pixels = np.rint(255 + strength * (colour - 255)).astype(np.uint8)
    return pixels.repeat(CELL, axis=0).repeat(CELL, axis=1)


def png(picture: Picture) -> bytes:
    """The picture as a PNG file (RFC 2083): 8 bits per colour, no filter."""
    height, width, _ = picture.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    lines = b"".join(b"\0" + line.tobytes() for line in picture)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return _PNG + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    checksum = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
