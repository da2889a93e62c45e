"""The time of each decoded frame, as the ffmpeg command counts it.

Some containers give a frame no time or no duration. The command then guesses, in the ways repeated
here (FFmpeg 8: fftools/ffmpeg_dec.c and libavcodec/decode.c). The end of the last frame decides how
many frames come out.
"""

from fractions import Fraction
from typing import Any

DISCONTINUOUS, NO_TIMESTAMPS = 0x0200, 0x0080  # AVFMT_TS_DISCONT, AVFMT_NOTIMESTAMPS
MICROSECOND = Fraction(1, 1_000_000)


class Clock:
    """Gives each frame of a stream its time since the beginning of the file, and its duration."""

    def __init__(self, container: Any, stream: Any) -> None:
        self._has_times = not container.format.flags & NO_TIMESTAMPS
        self._rates = (stream.codec_context.framerate, stream.average_rate)
        start = (container.start_time or 0) * MICROSECOND
        if container.format.flags & DISCONTINUOUS and stream.start_time is not None:
            start = max(start, stream.start_time * stream.time_base)
        self._start = start
        self._best = _BestTime()
        self._last_pts: int | None = None
        self._last_duration = 0
        self.num_frames = 0

    def advance(self, frame: Any) -> Fraction:
        """Set `frame.pts` and `frame.duration`. Returns the seconds since the frame before."""
        unit = frame.time_base
        pts = self._best(frame.pts, frame.dts) if self._has_times else None
        if pts is not None:
            pts -= round_half_away(self._start / unit)
        elif self._last_pts is not None:
            pts = self._last_pts + self._last_duration
        else:
            pts = 0
        self._last_duration = self._duration(pts, frame.duration, unit)
        step = pts - (self._last_pts or 0)
        self._last_pts = frame.pts = pts
        frame.duration = self._last_duration
        self.num_frames += 1
        return step * unit

    def _duration(self, pts: int, given: int, unit: Fraction) -> int:
        """In units: the container's, the codec's, that of the frame before, in this order."""
        step = 0 if self._last_pts is None else pts - self._last_pts
        is_doubtful = given == 1 and step > 2
        if given > 0 and self._has_times and not is_doubtful:
            return given
        of_codec, of_stream = (round_half_away(1 / r / unit) if r else 0 for r in self._rates)
        before = (step, given, of_codec) if self._has_times else (of_codec, step, given)
        guesses = (*before, of_stream, self._last_duration)
        return next((guess for guess in guesses if guess > 0), 1)


class _BestTime:
    """A frame's own time, or that of its packet where the own ones have not always risen."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._num_wrong = {"pts": 0, "dts": 0}

    def __call__(self, pts: int | None, dts: int | None) -> int | None:
        if dts is not None:
            self._count("dts", dts)
        elif pts is not None:
            self._last["dts"] = pts
        if pts is not None:
            self._count("pts", pts)
        elif dts is not None:
            self._last["pts"] = dts
        is_good = self._num_wrong["pts"] <= self._num_wrong["dts"]
        return pts if pts is not None and (is_good or dts is None) else dts

    def _count(self, name: str, value: int) -> None:
        self._num_wrong[name] += name in self._last and value <= self._last[name]
        self._last[name] = value


def round_half_away(value: Fraction) -> int:
    """The nearest whole number; a half goes away from zero, as in FFmpeg's av_rescale."""
    whole = int(abs(value) + Fraction(1, 2))
    return whole if value >= 0 else -whole
