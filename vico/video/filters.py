"""FFmpeg's filters: the frames of a video in, pictures of one size at one rate out."""

import math
import struct
from collections.abc import Iterator
from fractions import Fraction
from typing import Any


class Sampler:
    """Takes frames in the order of their times; `finish` gives what the filters still hold."""

    def __init__(self, av: Any, fps: Fraction, size: int) -> None:
        self._av, self._fps, self._size = av, fps, size
        self._kind: tuple[Any, ...] | None = None  # of the frames that the graph takes
        self._graph: Any = None
        self._first: Any = None
        self.num_out = 0

    def push(self, frame: Any) -> Iterator[Any]:
        matrix = _display_matrix(frame)
        kind = (frame.width, frame.height, frame.format.name, frame.time_base, matrix)
        if kind != self._kind:  # the picture may change in the middle of a file
            yield from self._drain()
            self._kind, self._graph = kind, self._new_graph(frame, matrix)
            self._first = self._first or frame
        self._graph.push(frame)
        yield from self._pull()

    def finish(self) -> Iterator[Any]:
        yield from self._drain()
        if self.num_out == 0 and self._first is not None:  # shorter than half a frame of `fps`
            matrix = _display_matrix(self._first)
            self._graph = self._new_graph(self._first, matrix, ":eof_action=pass")
            self._graph.push(self._first)
            yield from self._drain()

    def _drain(self) -> Iterator[Any]:
        if self._graph is not None:
            self._graph.push(None)
            yield from self._pull()

    def _pull(self) -> Iterator[Any]:
        while True:
            try:
                frame = self._graph.pull()
            except (BlockingIOError, EOFError):
                return
            # As for a constant rate: what begins late shows its first picture until then.
            num_times = max(0, frame.pts + 1 - self.num_out)
            self.num_out += num_times
            yield from [frame] * num_times

    def _new_graph(self, frame: Any, matrix: tuple[int, ...] | None, ending: str = "") -> Any:
        graph = self._av.filter.Graph()
        graph.threads = 1
        turned = upright(matrix)
        width, height = frame.width, frame.height
        if any(name == "transpose" for name, _ in turned):
            width, height = height, width
        rate = f"{self._fps.numerator}/{self._fps.denominator}"
        sampled = ("fps", f"fps={rate}{ending}")
        names = [*turned, sampled, *scale_and_crop(width, height, self._size)]
        nodes = [graph.add_buffer(template=frame, time_base=frame.time_base)]
        nodes += [graph.add(name, arguments) for name, arguments in names]
        nodes += [graph.add("format", "pix_fmts=rgb24"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph


def scale_and_crop(width: int, height: int, size: int) -> list[tuple[str, str]]:
    """FFmpeg's filters (name, arguments) that bring the shorter side to `size`, then crop."""
    if height >= width:
        new_width, new_height = size, height * size // width
    else:
        new_width, new_height = width * size // height, size
    x, y = (new_width - size) // 2, (new_height - size) // 2
    return [("scale", f"{new_width}:{new_height}"), ("crop", f"{size}:{size}:{x}:{y}")]


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    data = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else struct.unpack("=9i", bytes(data)[:36])


def upright(matrix: tuple[int, ...] | None) -> list[tuple[str, str]]:
    """The filters by which the ffmpeg command shows a picture as its display matrix says."""
    if matrix is None or not (matrix[0] or matrix[3]) or not (matrix[1] or matrix[4]):
        return []
    scale_0, scale_1 = math.hypot(matrix[0], matrix[3]), math.hypot(matrix[1], matrix[4])
    degrees = math.degrees(math.atan2(matrix[1] / scale_1, matrix[0] / scale_0))
    degrees = round(degrees) % 360
    if degrees == 90:
        return [("transpose", "cclock_flip" if matrix[3] > 0 else "clock")]
    if degrees == 270:
        return [("transpose", "clock_flip" if matrix[3] < 0 else "cclock")]
    if degrees == 180:
        flips = [("hflip", "")]
        return [*flips, ("vflip", "")] if matrix[4] < 0 else flips
    if degrees:
        return [("rotate", f"{degrees:f}*PI/180")]
    return [("vflip", "")] if matrix[4] < 0 else []
