"""Frames of a video file, byte for byte as the FFmpeg command gives them:

    ffmpeg -i X -vf fps=FPS,scale=W:H,crop=SIZE:SIZE:X:Y -f rawvideo -pix_fmt rgb24 -

W and H bring the shorter side to SIZE, the crop is the middle. This is the recipe of FrozenBiLM,
by which the features of the published data sets were made. Only the file itself is read: a
playlist, which would name other files or a network, is refused.
"""

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vico.errors import UserError, one_line
from vico.io.paths import open_to_read
from vico.video.clock import Clock
from vico.video.filters import Sampler

Frames = NDArray[np.uint8]  # [frames, size, size, 3]: red, green, blue

BLOCK_FRAMES = 32  # frames in memory at a time
MAX_SIDE = 1 << 14  # of a picture; 8K has 7,680
# Demuxers of single files. Those of playlists (hls, dash, concat) open other files.
FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2",
    "matroska,webm",
    *"avi flv asf mpegts mpeg ogg gif h264 hevc m4v mpegvideo ivf av1 obu mjpeg nut mxf rm".split(),
    *"dv swf yuv4mpegpipe apng wtv vc1 nsv".split(),
    *"aac ac3 aiff amr caf flac mp3 wav w64".split(),  # named as audio without pictures
)
# Their headers say how long the file is.
DECLARING = (*FORMATS[:2], "avi", "flv", "asf")
END_TOLERANCE_SECONDS = 1.0
MAX_GAP_SECONDS = 6 * 3600.0  # between two frames; a wrong time would repeat one without end
DEFAULT, ATTACHED_PICTURE = 0x0001, 0x0400  # AV_DISPOSITION_*
PLAYLISTS = (b"#EXTM3U", b"ffconcat", b"<?xml", b"<MPD", b"[playlist]", b"<smil")


class VideoError(UserError):
    """A video that cannot be used, or not as a whole. `reason`: the message without its path."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(one_line(f"{path}: {reason}"))
        self.path, self.reason = path, one_line(reason)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.reason)


def require_av() -> Any:
    """PyAV. Raises UserError where it is not installed."""
    try:
        import av  # late: only videos need it
    except ModuleNotFoundError:
        raise UserError("videos are decoded by PyAV; run: pip install -e '.[video]'") from None
    return av


def decode_frames(
    path: Path, fps: Fraction, size: int, num_threads: int = 1, block: int = BLOCK_FRAMES
) -> Iterator[Frames]:
    """The frames at `fps` per second, in blocks of `block` (the last may be smaller).

    Frame t shows second t / fps of the file, as players count. A video shorter than that shows its
    first frame. `num_threads`: of the decoder; the frames are the same.

    Raises VideoError: at once for what is no video, at the end for a video that is damaged (a part
    cannot be decoded, or the file ends before the time that its header states). Whoever wants the
    frames that could be decoded has them by then.
    """
    av = require_av()
    require_readable(path)
    try:
        with open_container(av, path, FORMATS) as container:
            yield from in_blocks(_sample(av, container, path, fps, size, num_threads), block)
    except VideoError:
        raise
    except (av.FFmpegError, ValueError, ArithmeticError) as problem:
        raise VideoError(path, _unreadable(path, problem)) from None


def require_readable(path: Path) -> bytes:
    """The first two bytes. Raises VideoError for what is not there, or is no regular file."""
    try:
        with open_to_read(path) as file:
            head = file.read(2)
    except FileNotFoundError:
        raise VideoError(path, "no such file") from None
    except (OSError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise VideoError(path, f"cannot be opened ({reason})") from None
    if not head:
        raise VideoError(path, "an empty file")
    return head


def open_container(av: Any, path: Path, formats: Sequence[str], only: str | None = None) -> Any:
    """A file of one of these demuxers, which opens no other file. Raises what PyAV raises."""
    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(formats)}
    # The protocol is named: a file may be called concat:x or http:x.
    url = f"file:{path.absolute()}"
    return av.open(url, format=only, options=options, metadata_errors="replace")


def _unreadable(path: Path, problem: Exception) -> str:
    """Why FFmpeg cannot open or read a file."""
    with open_to_read(path) as file:
        head = file.read(512).lstrip(b"\xef\xbb\xbf \r\n\t")
    if head.startswith(PLAYLISTS):
        return "a playlist, which names other files; these are not read"
    reason = getattr(problem, "strerror", None) or problem
    return f"no video that FFmpeg can read ({reason}); it may be cut off or damaged"


def _sample(
    av: Any, container: Any, path: Path, fps: Fraction, size: int, num_threads: int
) -> Iterator[Any]:
    """Pictures at `fps`. Raises VideoError at the end for a damaged video."""
    stream = _video_stream(container, path)
    stream.codec_context.thread_count = num_threads
    stream.codec_context.thread_type = "AUTO"
    source = _Source(av, container, stream, path)
    sampler = Sampler(av, fps, size)
    for frame in source:
        yield from sampler.push(frame)
    yield from sampler.finish()
    if not source.clock.num_frames:
        source.faults.append("no frame can be decoded")
    if source.faults:
        raise VideoError(path, f"damaged: {source.faults[0]} ({sampler.num_out} frames decoded)")


def _video_stream(container: Any, path: Path) -> Any:
    """The stream that the ffmpeg command would choose. Raises VideoError where there is none."""
    streams = [s for s in container.streams.video if not s.disposition & ATTACHED_PICTURE]
    if not streams:
        kinds = sorted({stream.type for stream in container.streams if stream.type != "video"})
        has = f"{' and '.join(kinds)} only" if kinds else "no stream; it may be cut off"
        raise VideoError(path, f"has no pictures: the file holds {has}")
    return max(streams, key=_preference)


def _preference(stream: Any) -> int:
    is_default = bool(stream.disposition & DEFAULT)
    return int(stream.codec_context.width * stream.codec_context.height + 5_000_000 * is_default)


class _Source:
    """The frames of a stream with their times, and what was wrong with the file."""

    def __init__(self, av: Any, container: Any, stream: Any, path: Path) -> None:
        self._av, self._container, self._stream, self._path = av, container, stream, path
        self.clock = Clock(container, stream)
        self.faults: list[str] = []
        self._end_seconds = 0.0  # of the last packet of any stream

    def __iter__(self) -> Iterator[Any]:
        packets = iter(self._container.demux())
        while True:
            try:
                packet = next(packets, None)
            except self._av.FFmpegError as problem:
                self.faults.append(f"it cannot be read to its end ({problem.strerror})")
                break
            if packet is None:
                break
            self._note_end(packet)
            if packet.stream is self._stream:
                yield from self._decode(packet)
        yield from self._decode(None)
        self._check_end()

    def _decode(self, packet: Any) -> Iterator[Any]:
        """`packet` None: the frames that the decoder still holds."""
        if packet is not None and packet.size and packet.is_corrupt:
            self.faults.append("a packet is cut off")
        try:
            frames = self._stream.codec_context.decode(packet)
        except EOFError:  # it was flushed before
            return
        except self._av.FFmpegError as problem:
            self.faults.append(f"a part cannot be decoded ({problem.strerror})")
            return
        for frame in frames:
            if frame.is_corrupt:
                self.faults.append("a frame is incomplete")
            if max(frame.width, frame.height) > MAX_SIDE:
                raise VideoError(self._path, f"a picture of {frame.width} x {frame.height} pixels")
            gap = float(self.clock.advance(frame))
            if gap > MAX_GAP_SECONDS:
                raise VideoError(self._path, f"damaged: a gap of {gap:,.0f} s between two frames")
            yield frame

    def _note_end(self, packet: Any) -> None:
        if packet.pts is not None and packet.time_base:
            end = (packet.pts + (packet.duration or 0)) * packet.time_base
            self._end_seconds = max(self._end_seconds, float(end))

    def _check_end(self) -> None:
        if self._container.format.name not in DECLARING or not self._container.duration:
            return
        start = (self._container.start_time or 0) / self._av.time_base
        declared, found = self._container.duration / self._av.time_base, self._end_seconds - start
        if declared - found > END_TOLERANCE_SECONDS:
            self.faults.append(f"it ends at {found:.1f} s of the {declared:.1f} s that it states")


def in_blocks(pictures: Iterable[Any], block: int) -> Iterator[Frames]:
    """Arrays of `block` pictures. Those that came before an error are given first."""
    held: list[Any] = []
    try:
        for picture in pictures:
            held.append(picture.to_ndarray())
            if len(held) == block:
                yield np.stack(held)
                held = []
    except VideoError:
        if held:
            yield np.stack(held)
        raise
    if held:
        yield np.stack(held)
