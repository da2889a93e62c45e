"""Filters, times, blocks and ids of a video; test_frames.py has the frames of whole videos."""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

pytest.importorskip("av")

from support.errors import refusal
from support.videos import make_video, picture
from vico.video.clock import Clock, _BestTime, round_half_away
from vico.video.compare import Comparison, GivenFeatures, compare
from vico.video.extract import Extraction
from vico.video.filters import scale_and_crop, upright
from vico.video.frames import VideoError, in_blocks
from vico.video.listing import Video, find_frames, find_videos

# What FFmpeg's filters do to a picture [height, width].
FILTERS = {
    ("hflip", ""): np.fliplr,
    ("vflip", ""): np.flipud,
    ("transpose", "clock"): lambda x: np.rot90(x, -1),
    ("transpose", "cclock"): np.rot90,
    ("transpose", "cclock_flip"): lambda x: x.T,
    ("transpose", "clock_flip"): lambda x: np.rot90(x, 2).T,
}


def shown(pixels: NDArray[Any], a: int, b: int, c: int, d: int) -> NDArray[Any]:
    """As a display matrix says: the pixel at (x, y) is seen at (a x + c y, b x + d y)."""
    height, width = pixels.shape
    places = {(a * x + c * y, b * x + d * y): value for (y, x), value in np.ndenumerate(pixels)}
    left, top = np.min(list(places), axis=0)
    turned = np.zeros((height, width) if a else (width, height), int)
    for (x, y), value in places.items():
        turned[y - top, x - left] = value
    return turned


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_every_display_matrix_of_right_angles(signs: tuple[int, int], is_transposed: bool) -> None:
    pixels = np.arange(6).reshape(2, 3)
    first, second = signs
    a, b, c, d = (0, first, second, 0) if is_transposed else (first, 0, 0, second)
    unit = 1 << 16
    filters = upright((a * unit, b * unit, 0, c * unit, d * unit, 0, 0, 0, 1 << 30))
    out = pixels
    for name in filters:
        out = FILTERS[name](out)
    assert np.array_equal(out, shown(pixels, a, b, c, d)), filters
    assert bool(filters) == ((a, d) != (1, 1)) and len(filters) <= 2


def test_other_display_matrices() -> None:
    """Any angle is a rotation, and one that shows no area is none."""

    def turned(degrees: float, scale: float = 1 << 16) -> list[tuple[str, str]]:
        x, y = (round(scale * f(math.radians(degrees))) for f in (math.cos, math.sin))
        return upright((x, y, 0, -y, x, 0, 0, 0, 1 << 30))

    assert turned(30) == [("rotate", "30.000000*PI/180")]
    assert turned(30, scale=1 << 20) == turned(30)
    assert turned(330) == [("rotate", "330.000000*PI/180")]
    assert turned(0.4) == [] == turned(0) == turned(359.6) == upright(None)
    assert turned(90.4) == turned(90) == [("transpose", "clock")]
    assert upright((0, 1, 0, 0, 1, 0, 0, 0, 1)) == [] == upright((1, 0, 0, 1, 0, 0, 0, 0, 1))


@pytest.mark.parametrize(
    ("width", "height", "filters"),
    [
        (64, 48, ("42:32", "32:32:5:0")),
        (48, 64, ("32:42", "32:32:0:5")),
        (64, 64, ("32:32", "32:32:0:0")),
        (320, 240, ("42:32", "32:32:5:0")),
        (33, 100, ("32:96", "32:32:0:32")),
        (101, 33, ("97:32", "32:32:32:0")),
        (10, 20, ("32:64", "32:32:0:16")),
    ],
)
def test_the_middle_of_a_picture(width: int, height: int, filters: tuple[str, str]) -> None:
    """The shorter side becomes 32; the longer one and the margin are cut to whole pixels."""
    assert scale_and_crop(width, height, 32) == list(zip(("scale", "crop"), filters, strict=True))


# Times


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        ("0", 0),
        ("1/2", 1),
        ("-1/2", -1),
        ("3/2", 2),
        ("-3/2", -2),
        ("4/3", 1),
        ("-5/3", -2),
        ("7", 7),
    ],
)
def test_a_half_goes_away_from_zero(value: str, rounded: int) -> None:
    assert round_half_away(Fraction(value)) == rounded


@pytest.mark.parametrize(
    ("given", "best"),
    [
        ([(0, 0), (1, 1), (2, 2)], [0, 1, 2]),
        ([(None, 5), (None, 6)], [5, 6]),
        ([(5, None), (6, None)], [5, 6]),
        ([(None, None), (3, None)], [None, 3]),
        # The own times do not rise where those of the packets do, once more often.
        ([(5, 0), (5, 1), (5, 2)], [5, 1, 2]),
        ([(5, 0), (4, 0), (9, 1)], [5, 4, 9]),
        ([(5, 0), (4, 1), (6, 2)], [5, 1, 2]),
        # A time that is missing counts as the other one.
        ([(None, 5), (5, 6)], [5, 6]),
        ([(5, None), (6, 5)], [5, 6]),
        ([(0, 0), (0, None), (1, 2)], [0, 0, 2]),
    ],
)
def test_the_best_of_two_times(given: Any, best: Sequence[int | None]) -> None:
    clock = _BestTime()
    assert [clock(pts, dts) for pts, dts in given] == list(best)


def clock_of(
    start: int | None = None,
    flags: int = 0,
    codec: Any = None,
    average: Any = None,
    own: Any = None,
) -> Clock:
    container = SimpleNamespace(format=SimpleNamespace(flags=flags), start_time=start)
    stream = SimpleNamespace(
        codec_context=SimpleNamespace(framerate=codec),
        average_rate=average,
        start_time=own,
        time_base=Fraction(1, 1000),
    )
    return Clock(container, stream)


def advanced(clock: Clock, *frames: tuple[int | None, int]) -> list[tuple[int, int, Fraction]]:
    """(pts, duration, seconds since the frame before) of frames (pts, duration) of 1/1000 s."""
    found = []
    for pts, duration in frames:
        frame = SimpleNamespace(pts=pts, dts=None, duration=duration, time_base=Fraction(1, 1000))
        seconds = clock.advance(frame)
        found.append((frame.pts, frame.duration, seconds))
    assert clock.num_frames == len(frames)
    return found


MS = Fraction(1, 1000)
NO_TIMES, DISCONTINUOUS = 0x0080, 0x0200


def test_times_begin_with_the_file() -> None:
    assert advanced(clock_of(), (0, 40), (40, 40)) == [(0, 40, 0), (40, 40, 40 * MS)]
    # In microseconds; a half of a unit goes away from zero.
    assert advanced(clock_of(500_500), (600, 40)) == [(99, 40, 99 * MS)]
    assert advanced(clock_of(500_000, own=700), (800, 40)) == [(300, 40, 300 * MS)]
    # Where times may jump, the stream's own beginning counts if it is later.
    for own, pts in ((700, 100), (300, 300), (None, 300)):
        clock = clock_of(500_000, DISCONTINUOUS, own=own)
        assert advanced(clock, (800, 40)) == [(pts, 40, pts * MS)]


def test_durations_that_are_not_given() -> None:
    """The time since the frame before, the codec's, the stream's, the last one; 1 at the least."""
    assert advanced(clock_of(), (0, 0), (30, 0)) == [(0, 1, 0), (30, 30, 30 * MS)]
    assert advanced(clock_of(codec=25), (0, 0))[0][1] == 40
    assert advanced(clock_of(average=Fraction(20)), (0, 0))[0][1] == 50
    assert advanced(clock_of(codec=25, average=20), (0, 0), (90, 0))[1][1] == 90
    assert advanced(clock_of(), (5, 7), (5, 0))[1][1] == 7
    # 1 is doubted where more than two units have passed.
    assert advanced(clock_of(), (0, 1), (2, 1), (5, 1)) == [
        (0, 1, 0),
        (2, 1, 2 * MS),
        (5, 3, 3 * MS),
    ]


def test_a_container_without_times() -> None:
    """The codec's rate, then the frame's own duration; each begins where the last one ends."""
    frames = advanced(clock_of(0, NO_TIMES, codec=25), (7, 3), (None, 3))
    assert frames == [(0, 40, 0), (40, 40, 40 * MS)]
    assert [pts for pts, *_ in advanced(clock_of(0, NO_TIMES), (9, 3), (9, 4), (9, 5))] == [0, 3, 6]
    # One frame of a stream with times may lack its own.
    assert advanced(clock_of(), (10, 20), (None, 20), (60, 20))[1:] == [
        (30, 20, 20 * MS),
        (60, 20, 30 * MS),
    ]


# Blocks, ids and comparisons


class Picture:
    def __init__(self, number: int) -> None:
        self.number = number

    def to_ndarray(self) -> NDArray[np.int64]:
        return np.array([self.number])


@pytest.mark.parametrize("is_damaged", [False, True])
@pytest.mark.parametrize(("number", "sizes"), [(0, []), (1, [1]), (2, [2]), (5, [2, 2, 1])])
def test_blocks_come_before_an_error(is_damaged: bool, number: int, sizes: list[int]) -> None:
    def pictures() -> Any:
        yield from map(Picture, range(number))
        if is_damaged:
            raise VideoError(Path("a.mp4"), "cut off")

    blocks: list[Any] = []
    try:
        for block in in_blocks(pictures(), 2):
            blocks.append(block)
    except VideoError as problem:
        assert is_damaged and problem.reason == "cut off"
    else:
        assert not is_damaged
    assert [len(block) for block in blocks] == sizes
    assert [int(x) for block in blocks for x in block.ravel()] == list(range(number))


def test_a_batch_bounds_the_frames_in_memory(tmp_path: Path) -> None:
    """Of files and of folders with pictures."""
    import av

    video = make_video(tmp_path / "a.mp4", num_frames=5, rate=5)
    frames = tmp_path / "frames" / "b"
    frames.mkdir(parents=True)
    for t in range(5):
        av.VideoFrame.from_ndarray(picture(48, 32, t)).to_image().save(frames / f"f{t}.png")
    for path, rate in ((video, None), (frames, Fraction(5))):
        how = Extraction(Fraction(5), rate, 2, 1, keep_damaged=False)
        blocks = list(how.decode(Video("a", path, 1, ""), 32))
        assert [block.shape for block in blocks] == [(n, 32, 32, 3) for n in (2, 2, 1)]
    assert [video.id for video in find_frames(tmp_path / "frames")[0]] == ["b"]


def test_videos_of_a_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "sub/a.MKV", "note.txt", ".hidden.mp4", "readme"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"123")
    videos, notes = find_videos(tmp_path)
    assert [(video.id, video.num_bytes) for video in videos] == [("a", 3), ("b", 3)]
    assert len(notes) == 1 and "2 other files, as note.txt" in notes[0]
    stamps = {video.stamp for video in videos}
    assert {len(stamp) for stamp in stamps} == {16} and len(stamps) == 2
    assert find_videos(tmp_path)[0] == videos
    (tmp_path / "b.mp4").write_bytes(b"1234")
    assert find_videos(tmp_path)[0][1].stamp not in stamps
    (tmp_path / "list.txt").write_text("# two\n\nb.mp4\nsub/a.MKV\nnowhere.mp4\n", encoding="utf-8")
    listed, notes = find_videos(tmp_path / "list.txt")
    assert [(v.id, v.num_bytes) for v in listed] == [("a", 3), ("b", 4), ("nowhere", 0)]
    assert notes == [] and find_videos(tmp_path / "b.mp4")[0][0].id == "b"
    (tmp_path / "b.avi").write_bytes(b"1")
    assert "are both of the video 'b'; keep one" in refusal(find_videos, tmp_path)
    (tmp_path / "list.txt").write_text("# none\n", encoding="utf-8")
    assert "list.txt: lists no video" in refusal(find_videos, tmp_path / "list.txt")
    (tmp_path / "empty").mkdir()
    assert "empty: holds no video (.mp4," in refusal(find_videos, tmp_path / "empty")
    assert "no folder in it holds pictures" in refusal(find_frames, tmp_path / "empty")


def test_features_beside_given_ones(tmp_path: Path) -> None:
    """A line per video and a summary; only frames that both have are compared."""
    own = {"a": torch.eye(4)[:2], "b": torch.eye(4)[:3], "c": torch.eye(4), "d": torch.eye(4)}
    theirs = {
        "a": torch.eye(4)[:2],
        "c": torch.tensor([[1.0] * 4, [0, 1, 0, 0]]),
        "d": torch.ones(4, 3),
    }
    for name, features in (("own.pth", own), ("theirs.pth", theirs)):
        torch.save(features, tmp_path / name)
    given = GivenFeatures(tmp_path / "theirs.pth")
    lines = list(compare(tmp_path / "own.pth", sorted(own), given))
    assert lines[0] == "'a': cosine 1.000000, lowest 1.000000, 2 frames, there 2"
    assert lines[1] == "'b': not in theirs.pth"
    assert lines[2] == "'c': cosine 0.750000, lowest 0.500000, 4 frames, there 2"
    assert lines[3].startswith("'d': ") and lines[3].endswith(": other widths")
    assert lines[4:] == [
        f"{tmp_path / 'theirs.pth'}: 2 videos compared, mean cosine 0.875000, lowest of a frame "
        "0.500000; 1 have another number of frames, 2 cannot be compared"
    ]
    nothing = Comparison(num_missing=3).summary(Path("x"))
    assert nothing == "x: none of 3 videos can be compared"
