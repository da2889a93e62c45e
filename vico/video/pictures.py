"""Frames that lie on disk already: a folder of pictures per video, in the order of their names."""

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from vico.io.paths import entries
from vico.video.filters import Sampler
from vico.video.frames import (
    BLOCK_FRAMES,
    Frames,
    VideoError,
    in_blocks,
    open_container,
    require_av,
    require_readable,
)

# How a file begins, and its demuxer. By its name, FFmpeg would take it for a pattern of names.
FORMATS = {b"\xff\xd8": "jpeg_pipe", b"\x89P": "png_pipe"}
SUFFIXES = (".jpg", ".jpeg", ".png")
# FFmpeg would fill the rest of a picture that is cut off.
STRICT = {"err_detect": "crccheck+bitstream+buffer+explode"}


def decode_pictures(
    folder: Path, rate: Fraction, fps: Fraction, size: int, block: int = BLOCK_FRAMES
) -> Iterator[Frames]:
    """As `decode_frames`, of pictures that were taken at `rate` per second. Raises VideoError."""
    av = require_av()
    yield from in_blocks(_sample(av, folder, rate, fps, size), block)


def pictures_in(folder: Path) -> list[Path]:
    """In natural order: frame2.jpg comes before frame10.jpg. Raises UserError."""
    found = [path for path in entries(folder) if path.suffix.lower() in SUFFIXES]
    return sorted(found, key=lambda path: _natural(path.name))


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts]


def _sample(av: Any, folder: Path, rate: Fraction, fps: Fraction, size: int) -> Iterator[Any]:
    sampler, faults = Sampler(av, fps, size), list[str]()
    for time, path in enumerate(pictures_in(folder)):
        try:
            frame = _decode(av, path)
        except VideoError as problem:
            faults.append(f"{path.name}: {problem.reason}")
            continue
        frame.pts, frame.time_base, frame.duration = time, 1 / rate, 1
        yield from sampler.push(frame)
    yield from sampler.finish()
    if faults:
        raise VideoError(
            folder, f"damaged: {faults[0]} ({len(faults)} pictures, {sampler.num_out} frames left)"
        )
    if not sampler.num_out:
        raise VideoError(folder, f"the folder holds no pictures ({', '.join(SUFFIXES)})")


def _decode(av: Any, path: Path) -> Any:
    """The one frame of a picture. Raises VideoError."""
    name = FORMATS.get(require_readable(path))
    if name is None:
        raise VideoError(path, "is no JPEG or PNG")
    try:
        with open_container(av, path, [name], name) as container:
            stream = container.streams.video[0]
            stream.codec_context.options = STRICT
            frame = next(container.decode(stream), None)
    except (av.FFmpegError, ValueError, IndexError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise VideoError(path, f"cannot be decoded ({reason})") from None
    if frame is None or frame.is_corrupt:
        raise VideoError(path, "is cut off")
    return frame
