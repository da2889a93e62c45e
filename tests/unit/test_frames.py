"""Frames of videos: those of the ffmpeg command; damaged files, files that are no videos."""

import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("av")

from support.videos import ffmpeg_frames, make_sound, make_video
from vico.video.filters import scale_and_crop
from vico.video.frames import Frames, VideoError, decode_frames

SIZE = 32
TIMES = np.cumsum(np.random.default_rng(0).uniform(0.02, 0.4, 30)).tolist()
# (name, what is unlike the usual video, which sides are swapped): 20 videos of 6 codecs.
VIDEOS: list[tuple[str, dict[str, Any]]] = [
    ("plain.mp4", {}),
    ("wide.mp4", {"size": (150, 50), "rate": Fraction(7, 2)}),
    ("tall.mp4", {"size": (50, 70), "num_frames": 61}),
    ("rates.mp4", {"times": TIMES}),
    ("rates.mkv", {"times": TIMES, "codec": "libx265"}),
    ("turned90.mp4", {"rotation": 90}),
    ("turned180.mp4", {"rotation": 180}),
    ("turned270.mp4", {"rotation": 270}),
    ("turned30.mp4", {"rotation": 30}),
    ("444.mp4", {"pixels": "yuv444p"}),
    ("10bit.mkv", {"codec": "libx265", "pixels": "yuv420p10le"}),
    ("full.mov", {"codec": "mjpeg", "pixels": "yuvj420p", "rate": 12}),
    ("one.mp4", {"num_frames": 1, "rate": 1}),
    ("late.mp4", {"audio_seconds": 3, "first": 20}),
    ("later.mkv", {"audio_seconds": 5, "first": 70}),
    ("old.avi", {"codec": "mpeg4", "rate": Fraction(30000, 1001)}),
    ("between.avi", {"codec": "mpeg4", "options": {"bf": "2"}, "num_frames": 47}),
    ("web.webm", {"codec": "libvpx-vp9", "rate": 15, "size": (64, 80)}),
    ("new.mkv", {"codec": "libsvtav1", "rate": 24}),
    ("film.mov", {"codec": "libx265", "rate": Fraction(24000, 1001)}),
    ("stream.ts", {"audio_seconds": 2, "first": 10}),
]


def decoded(path: Path, fps: Fraction | int = 10, block: int = 7) -> Frames:
    return np.concatenate(list(decode_frames(path, Fraction(fps), SIZE, block=block)))


def as_far_as(path: Path) -> tuple[int, str]:
    """(frames that came, why the video is refused)."""
    num_frames = 0
    with pytest.raises(VideoError) as caught:
        for block in decode_frames(path, Fraction(10), SIZE):
            num_frames += len(block)
    return num_frames, caught.value.reason


@pytest.mark.parametrize(("name", "traits"), VIDEOS, ids=lambda v: v if isinstance(v, str) else "")
def test_as_ffmpeg(name: str, traits: dict[str, Any], tmp_path: Path) -> None:
    """The very bytes of the ffmpeg command with the documented filters, at three rates."""
    path = make_video(tmp_path / name, **traits)
    width, height = traits.get("size", (96, 64))
    if traits.get("rotation") in (90, 270):
        width, height = height, width
    filters = ",".join(f"{name}={values}" for name, values in scale_and_crop(width, height, SIZE))
    for fps in ("1", "7/2"):
        expected = ffmpeg_frames(path, f"fps={fps},{filters}", SIZE)
        frames = decoded(path, Fraction(fps))
        assert frames.shape == expected.shape and (frames == expected).all(), fps


def test_shorter_than_a_frame(tmp_path: Path) -> None:
    """ffmpeg gives nothing; a question needs a frame, and there is one."""
    path = make_video(tmp_path / "a.mp4", num_frames=2, first=0)
    frames = decoded(path, 1)
    assert len(frames) == 1 and (frames == decoded(path, 25)[:1]).all()


def test_blocks(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", num_frames=50)
    blocks = list(decode_frames(path, Fraction(10), SIZE, block=8))
    assert [len(block) for block in blocks] == [8, 8, 4]
    assert (np.concatenate(blocks) == decoded(path, block=100)).all()


def test_cover_and_other_streams(tmp_path: Path) -> None:
    """A sound with a cover has no pictures that move; a file with sound is read to its end."""
    assert as_far_as(make_sound(tmp_path / "a.mp4")) == (
        0,
        "has no pictures: the file holds audio only",
    )
    assert len(decoded(make_video(tmp_path / "b.mp4", audio_seconds=3), 10)) == 12


@pytest.mark.parametrize("name", ["a.webm", "a.avi", "a.mkv", "a.flv"])
def test_cut_off(name: str, tmp_path: Path) -> None:
    """What could be decoded comes first, then the reason."""
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4", "a.flv": "flv"}.get(name, "libx264")
    path = make_video(tmp_path / name, codec, num_frames=100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    num_frames, reason = as_far_as(path)
    assert 5 < num_frames < 35
    assert reason.startswith("damaged: ") and f"({num_frames} frames decoded)" in reason


def test_flipped_bytes(tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", size=(320, 240))
    data = bytearray(path.read_bytes())
    for place in range(data.find(b"mdat") + 2000, len(data) - 3000, 500):
        data[place] ^= 0x55
    path.write_bytes(data)
    assert "damaged: a" in as_far_as(path)[1]


def test_no_video(tmp_path: Path) -> None:
    """Files that are none of ours are refused before anything else is opened."""
    target = make_video(tmp_path / "target.ts")
    contents = {
        "text.mp4": b"hello\n" * 100,
        "zeros.mp4": bytes(5000),
        "list.mp4": b"#EXTM3U\n#EXTINF:5,\n%s\n" % os.fsencode(target),
        "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://localhost:9/a.ts\n",
        "concat.mp4": b"ffconcat version 1.0\nfile 'target.ts'\n",
        "empty.mp4": b"",
        "half.mp4": make_video(tmp_path / "whole.mp4").read_bytes()[:3000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.mp4")
    reasons = {name: as_far_as(tmp_path / name)[1] for name in (*contents, "pipe.mp4", "none.mp4")}
    assert all("FFmpeg can read" in reasons[n] for n in ("text.mp4", "zeros.mp4", "half.mp4"))
    assert all("a playlist" in reasons[n] for n in ("list.mp4", "list.m3u8", "concat.mp4"))
    assert reasons["empty.mp4"] == "an empty file"
    assert "a pipe" in reasons["pipe.mp4"] and reasons["none.mp4"] == "no such file"


def test_odd_names(tmp_path: Path) -> None:
    """Names that FFmpeg could take for a protocol or a pattern."""
    path = make_video(tmp_path / "plain.mp4", num_frames=5)
    for name in ("http:x.mp4", "concat:a|b.mp4", "a%03d.mp4", "é ?.mp4", "\udcff.mp4"):
        renamed = tmp_path / name
        renamed.write_bytes(path.read_bytes())
        assert (decoded(renamed, 25) == decoded(path, 25)).all()


def test_wrong_time(tmp_path: Path) -> None:
    """A frame that claims to come a year later would repeat the one before 30 million times."""
    path = make_video(tmp_path / "a.mkv", times=[0, 0.5, 3.2e7], num_frames=3)
    assert "a gap of" in as_far_as(path)[1]
