"""What a rank makes of its videos: kept, left out, or an error; and features beside given ones."""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from support.errors import refusal
from vico.distributed.world import World
from vico.video import extract
from vico.video.compare import GivenFeatures, compare
from vico.video.extract import Extraction, Share
from vico.video.features import to_half
from vico.video.frames import Frames, VideoError
from vico.video.listing import Video
from vico.video.parts import Parts


class Means:
    """In the encoder's place: a frame's features are its mean, twice. NaN for frames of 255."""

    device, size = torch.device("cpu"), 2

    def encode(self, frames: Frames) -> torch.Tensor:
        means = torch.from_numpy(frames).float().mean((1, 2, 3))
        means[means == 255] = torch.nan
        return means[:, None].repeat(1, 2)


class Blocks(Extraction):
    """Videos of blocks of frames of one grey each; None is damage."""

    given: ClassVar[dict[str, tuple[int | None, ...]]] = {}

    def decode(self, video: Video, size: int) -> Iterator[Frames]:
        for grey in self.given[video.id]:
            if grey is None:
                raise VideoError(video.path, "cut off")
            if grey < 0:
                raise ZeroDivisionError("a bug")
            yield np.full((2, size, size, 3), grey, np.uint8)


def extracted(
    tmp_path: Path,
    keep_damaged: bool = False,
    num_workers: int = 2,
    **given: tuple[int | None, ...],
) -> tuple[Share, dict[str, list[float]]]:
    """What came of the videos, and the first column of each part."""
    how = Blocks(Fraction(1), None, 2, num_workers, keep_damaged)
    object.__setattr__(how, "given", given)
    videos = [Video(name, Path(f"{name}.mp4"), 5, name) for name in given]
    parts, encoder = Parts(tmp_path / "out.pth"), Means()
    parts.folder.mkdir(parents=True)
    world = World(0, 1, torch.device("cpu"), None)
    share = extract.extract(videos, encoder, how, parts, world)  # type: ignore[arg-type]
    found = {path.name: np.load(path) for path in sorted(parts.folder.iterdir())}
    assert all(x.dtype == np.float16 and (x[:, 0] == x[:, 1]).all() for x in found.values())
    return share, {name: x[:, 0].tolist() for name, x in found.items()}


def test_what_becomes_of_videos(tmp_path: Path) -> None:
    """The number of threads changes nothing; all frames that were encoded are counted."""
    given = {"good": (1, 2), "cut": (3, None), "none": (), "bad": (None,), "white": (4, 255)}
    not_finite = "the encoder's features are not finite in fp16; try another video"
    left_out = {"none": "no frame can be decoded", "bad": "cut off", "white": not_finite}
    good = {"good.npy": [1.0, 1.0, 2.0, 2.0]}
    for num_workers in (1, 3):
        share, parts = extracted(tmp_path / f"{num_workers}", False, num_workers, **given)
        assert parts == good and share.left_out == {**left_out, "cut": "cut off"}
        assert (share.num_videos, share.num_frames, share.damaged) == (1, 10, {})
        assert share.num_workers == num_workers
    share, parts = extracted(tmp_path / "kept", True, **given)
    assert parts == {**good, "cut.damaged.npy": [3.0, 3.0]} and share.left_out == left_out
    assert (share.num_videos, share.damaged) == (2, {"cut": "cut off"})


def test_threads_are_as_before(tmp_path: Path) -> None:
    """Sums over several would have other last bits; after a bug, too, which is raised."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for is_cpu, number in ((True, 1), (False, 2)):
            with extract._one_thread_each(is_cpu):
                assert torch.get_num_threads() == number
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError, match="a bug"):
            extracted(tmp_path, a=(1, 2, 3), b=(1, -1), c=(1,) * 50)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_threads_decode_at_once() -> None:
    assert Share(decode_seconds=6.0, num_workers=3).decoding_seconds == 2.0
    assert Share().decoding_seconds == 0.0


@pytest.mark.parametrize(("size", "others"), [(1, ""), (4, " of rank 0 of 4")])
def test_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch, size: int, others: str) -> None:
    """By bytes: the rest takes as long as those before."""
    said, clock = list[str](), iter([100.0, 110.0, 140.0, 150.0])
    monkeypatch.setattr(extract.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(extract.log, "ProgressLog", lambda *_: said.append)
    videos = [Video(str(n), Path("a"), num_bytes, "") for n, num_bytes in enumerate((1, 3, 0))]
    left = extract._TimeLeft(videos, World(0, size, torch.device("cpu"), None))
    for video, num_frames in zip(videos, (25, 80, 100), strict=True):
        left(video, Share(num_frames=num_frames))
    assert said == [
        f"1 of 3 videos{others}, 2.5 frames/s, about 30 s left",
        f"2 of 3 videos{others}, 2.0 frames/s, about 0 s left",
        f"3 of 3 videos{others}, 2.0 frames/s, about 0 s left",
    ]


def test_the_time_that_is_left_of_files_without_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    said, clock = list[str](), iter([0.0, 8.0])
    monkeypatch.setattr(extract.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(extract.log, "ProgressLog", lambda *_: said.append)
    video = Video("a", Path("a"), 0, "a")
    extract._TimeLeft([video], World(0, 1, torch.device("cpu"), None))(video, Share(num_frames=4))
    assert said == ["1 of 1 videos, 0.5 frames/s, about 0 s left"]


def test_half_precision_holds_features() -> None:
    """Up to 65,504."""
    largest = torch.tensor([[65504.0, -65504.0]])
    half = to_half(largest, Path("a.mp4"))
    assert half.dtype == torch.float16 and torch.equal(half.float(), largest)
    for value in (7e4, torch.inf, torch.nan):
        said = refusal(to_half, torch.tensor([[1.0, value]]), Path("a.mp4"))
        assert said.startswith("a.mp4: the encoder's features are not finite in fp16")


def test_a_comparison_of_odd_features(tmp_path: Path) -> None:
    """Cosines of the frames that both have, in double precision; 0 where there are none."""
    own = {
        "a": torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
        "b": torch.ones(2, 2),
        "c": torch.ones(1, 2),
    }
    own |= {"d": torch.ones(1, 2), "e": torch.ones(1, 2), "f": torch.full((1, 2), 3e4).half()}
    given: dict[str, Any] = {"a": torch.tensor([[4.0, 3.0], [-2.0, 0.0]]), "b": torch.ones(0, 2)}
    given |= {"c": torch.ones(2), "d": torch.ones(1, 2, dtype=torch.int64), "e": torch.ones(1, 3)}
    given |= {"f": torch.full((1, 2), 3e4).half()}
    for name, features in (("own.pth", own), ("given.pth", given)):
        torch.save(features, tmp_path / name)
    path = tmp_path / "given.pth"
    lines = list(compare(tmp_path / "own.pth", own, GivenFeatures(path)))
    assert lines == [
        "'a': cosine -0.020000, lowest -1.000000, 2 frames, there 2",
        "'b': cosine 0.000000, lowest 0.000000, 2 frames, there 0",
        "'c': [1, 2] float32, there [2] float32: other widths",
        "'d': [1, 2] float32, there [1, 2] int64: other widths",
        "'e': [1, 2] float32, there [1, 3] float32: other widths",
        "'f': cosine 1.000000, lowest 1.000000, 1 frames, there 1",
        f"{path}: 3 videos compared, mean cosine 0.326667, lowest of a frame -1.000000; 1 have "
        "another number of frames, 3 cannot be compared",
    ]
