"""Small videos of many codecs and containers, made by PyAV, and the ffmpeg command to compare."""

import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

QUIET = {"libx265": {"x265-params": "log-level=none"}, "libsvtav1": {"preset": "12"}}
QUIET |= {"libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}


def picture(width: int, height: int, t: int) -> NDArray[np.uint8]:
    """[height, width, 3]: a moving gradient with a red rectangle."""
    y, x = np.mgrid[:height, :width]
    channels = [x * 2 + t * 7, y * 3 + t * 5, x + y + t * 11]
    pixels = np.stack(channels, -1).astype(np.uint8)
    left = t * 5 % width
    pixels[height // 4 : height // 2, left : left + width // 5] = [255, 0, 0]
    return pixels


def make_video(
    path: Path,
    codec: str = "libx264",
    size: tuple[int, int] = (96, 64),
    num_frames: int = 30,
    rate: Fraction | int = 25,
    pixels: str = "yuv420p",
    times: Sequence[float] | None = None,
    rotation: float | None = None,
    audio_seconds: float = 0,
    first: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """`times`: seconds of the frames, else they come at `rate` from frame `first` on."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(
            codec, rate=rate, options={**QUIET.get(codec, {}), **(options or {})}
        )
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        unit = Fraction(1, 1000) if times else 1 / Fraction(rate)
        stream.codec_context.time_base = unit
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if audio_seconds:
            _add_audio(container, audio_seconds)
        for t in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(*size, t), format="rgb24")
            frame = frame.reformat(format=pixels)
            frame.pts, frame.time_base = (int(times[t] * 1000) if times else t + first), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def _add_audio(container: Any, seconds: float) -> None:
    stream = container.add_stream("aac", rate=48000)
    silence = np.zeros((2, int(48000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="stereo")
    frame.sample_rate = 48000
    container.mux([*stream.encode(frame), *stream.encode(None)])


def make_sound(path: Path) -> Path:
    """A file with audio and no pictures."""
    with av.open(str(path), "w") as container:
        _add_audio(container, 1)
    return path


def ffmpeg_frames(path: Path, filters: str, size: int) -> NDArray[np.uint8]:
    """[frames, size, size, 3] by the ffmpeg command. Skips where it is missing."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg").get_ffmpeg_exe()
    command = [ffmpeg, "-v", "error", "-i", str(path), "-vf", filters]
    run = subprocess.run(
        [*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True
    )
    return np.frombuffer(run.stdout, np.uint8).reshape(-1, size, size, 3)
