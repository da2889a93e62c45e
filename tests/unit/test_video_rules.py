"""Rules of `vico extract` without an encoder: ends, pictures, lists, parts and records."""

import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("av")

import av

from support.errors import refusal
from support.videos import picture
from vico.video import frames, listing, parts, provenance
from vico.video.compare import GivenFeatures
from vico.video.filters import Sampler
from vico.video.frames import VideoError
from vico.video.listing import Video, find_frames, find_videos
from vico.video.parts import Parts
from vico.video.pictures import decode_pictures, pictures_in
from vico.video.provenance import Provenance

# ---- streams and ends ---------------------------------------------------------------------------


def stream_of(width: int, height: int, disposition: int = 0, kind: str = "video") -> Any:
    codec = SimpleNamespace(width=width, height=height)
    return SimpleNamespace(codec_context=codec, disposition=disposition, type=kind)


class Streams(tuple[Any, ...]):
    @property
    def video(self) -> list[Any]:
        return [stream for stream in self if stream.type == "video"]


def container_of(*streams: Any) -> Any:
    return SimpleNamespace(streams=Streams(streams))


def test_the_stream_that_ffmpeg_chooses() -> None:
    """The most pixels, where being the default counts as five million; never a cover."""
    small, large = stream_of(100, 50), stream_of(2500, 2000)
    default, cover = stream_of(100, 50, 0x0001), stream_of(9000, 9000, 0x0400)
    chosen = frames._video_stream
    assert chosen(container_of(small, large), Path("a")) is large
    assert chosen(container_of(cover, small), Path("a")) is small
    assert chosen(container_of(large, default), Path("a")) is default
    assert frames._preference(default) == 5_005_000 and frames._preference(large) == 5_000_000
    sound, text = stream_of(0, 0, kind="audio"), stream_of(0, 0, kind="subtitle")
    for streams, has in (
        ((), "no stream; it may be cut off"),
        ((text, cover, sound, sound), "audio and subtitle only"),
    ):
        said = refusal(chosen, container_of(*streams), Path("a.mp4"))
        assert said == f"a.mp4: has no pictures: the file holds {has}"


def source_of(name: str, duration: int | None, start: int | None) -> Any:
    """Of a file that states its duration and start in microseconds."""
    kind = SimpleNamespace(name=name, flags=0)
    container = SimpleNamespace(format=kind, duration=duration, start_time=start)
    codec = SimpleNamespace(framerate=None)
    stream = SimpleNamespace(
        codec_context=codec, average_rate=None, start_time=None, time_base=None
    )
    return frames._Source(av, container, stream, Path("a.mp4"))


@pytest.mark.parametrize(
    ("name", "duration", "start", "fault"),
    [
        ("avi", 5_000_000, 0, ""),
        ("avi", 5_000_001, 0, "it ends at 4.0 s of the 5.0 s that it states"),
        ("avi", 5_500_000, None, "it ends at 4.0 s of the 5.5 s that it states"),
        ("flv", 3_000_000, 2_000_000, ""),
        ("asf", 3_500_000, 2_000_000, "it ends at 2.0 s of the 3.5 s that it states"),
        ("mov,mp4,m4a,3gp,3g2,mj2", 9_000_000, 0, "it ends at 4.0 s of the 9.0 s that it states"),
        ("matroska,webm", 9_000_000, 0, "it ends at 4.0 s of the 9.0 s that it states"),
        ("mpegts", 9_000_000, 0, ""),
        ("avi", None, 0, ""),
    ],
)
def test_a_file_that_ends_a_second_early(
    name: str, duration: int | None, start: int | None, fault: str
) -> None:
    """Its header says how long it is; the last end of a packet, of any stream, where it ends."""
    source, unit = source_of(name, duration, start), Fraction(1, 1000)
    times = [(3000, 1000), (3900, None), (None, 5000), (1000, 10)]
    for pts, length in times:
        source._note_end(SimpleNamespace(pts=pts, duration=length, time_base=unit))
    source._note_end(SimpleNamespace(pts=9000, duration=9000, time_base=None))
    source._check_end()
    assert source.faults == ([fault] if fault else [])


class Decoding:
    """A stream that gives these frames for any packet."""

    def __init__(self, *given: Any) -> None:
        self.codec_context = self
        self.given, self.framerate, self.average_rate = given, None, None
        self.start_time, self.time_base = None, Fraction(1)

    def decode(self, packet: Any) -> Iterable[Any]:
        if isinstance(self.given[0], Exception):
            raise self.given[0]
        return self.given


def frame_of(pts: int, width: int = 9, height: int = 9, is_corrupt: bool = False) -> Any:
    return SimpleNamespace(
        pts=pts,
        dts=None,
        duration=1,
        time_base=Fraction(1),
        width=width,
        height=height,
        is_corrupt=is_corrupt,
    )


def decoded(*given: Any, packet: Any = None) -> tuple[int, list[str]]:
    """(frames of a packet, faults)."""
    container = SimpleNamespace(format=SimpleNamespace(name="avi", flags=0), start_time=0)
    stream: Any = Decoding(*given)
    source = frames._Source(av, container, stream, Path("a.mp4"))
    return len(list(source._decode(packet))), source.faults


def test_what_a_packet_may_hold() -> None:
    """Frames of up to 16,384 pixels a side, no more than six hours apart."""
    assert decoded(frame_of(0, 1 << 14, 9), frame_of(21_600, 9, 1 << 14)) == (2, [])
    for sides in ((9, 16_385), (16_385, 9)):
        said = refusal(decoded, frame_of(0, *sides))
        assert said == f"a.mp4: a picture of {sides[0]} x {sides[1]} pixels"
    said = refusal(decoded, frame_of(0), frame_of(21_601))
    assert said == "a.mp4: damaged: a gap of 21,601 s between two frames"
    assert decoded(frame_of(0, is_corrupt=True)) == (1, ["a frame is incomplete"])
    for size, is_corrupt, faults in (
        (9, True, ["a packet is cut off"]),
        (0, True, []),
        (9, False, []),
    ):
        packet = SimpleNamespace(size=size, is_corrupt=is_corrupt)
        assert decoded(frame_of(0), packet=packet) == (1, faults)
    assert decoded(EOFError()) == (0, [])
    assert decoded(av.InvalidDataError(1, "Invalid data")) == (
        0,
        ["a part cannot be decoded (Invalid data)"],
    )


def test_an_error_says_its_path_once(tmp_path: Path) -> None:
    """On one line, and whole where a process sends it to another."""
    problem = VideoError(Path("a.mp4"), "cut\noff")
    kind, arguments = problem.__reduce__()
    assert kind is VideoError and str(kind(*arguments)) == str(problem)
    assert (problem.path, problem.reason) == (Path("a.mp4"), arguments[1])
    assert "\n" not in str(problem) and str(problem).startswith("a.mp4: cut")
    (tmp_path / "a").write_bytes(b"abc")
    assert frames.require_readable(tmp_path / "a") == b"ab"
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf \n#EXTM3U")
    assert frames._unreadable(tmp_path / "b", ValueError()).startswith("a playlist, which names")
    words = frames._unreadable(tmp_path / "a", ValueError("odd"))
    assert words == "no video that FFmpeg can read (odd); it may be cut off or damaged"


# ---- pictures -----------------------------------------------------------------------------------


def sampled(fps: Fraction, times: list[int], duration: int = 1) -> list[int]:
    """Which pictures, each of one grey, stand for each 1 / fps of a second."""
    sampler = Sampler(av, fps, 16)
    greys = []
    for number, time in enumerate(times, start=1):
        frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 40 * number, np.uint8), "rgb24")
        frame.pts, frame.time_base, frame.duration = time, Fraction(1), duration
        greys += [int(f.to_ndarray().mean()) for f in sampler.push(frame)]
    greys += [int(f.to_ndarray().mean()) for f in sampler.finish()]
    assert sampler.num_out == len(greys)
    return [round(grey / 40) for grey in greys]


def test_a_picture_stands_until_the_next() -> None:
    """A first one that begins late, from the beginning on; one that is too short, once."""
    assert sampled(Fraction(1), [0, 1, 2]) == [1, 2, 3]
    assert sampled(Fraction(1), [2, 3]) == [1, 1, 1, 2]
    assert sampled(Fraction(2), [0, 2]) == [1, 1, 1, 1, 2, 2]
    assert sampled(Fraction(1, 9), [0]) == [1] and sampled(Fraction(1), []) == []


def save_picture(path: Path, t: int) -> None:
    av.VideoFrame.from_ndarray(picture(48, 32, t), format="rgb24").save(path)


def test_pictures_come_in_natural_order(tmp_path: Path) -> None:
    names = ["2b.png", "10a.png", "a1b2.png", "a1b10.png", "a02.PNG", "b1.jpg", "b.jpeg"]
    for name in [*reversed(names), "a.gif", "c.txt"]:
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == names


def test_32_frames_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """A picture of one second is 40 frames at 40 a second."""
    save_picture(tmp_path / "0.png", 0)
    blocks = list(decode_pictures(tmp_path, Fraction(1), Fraction(40), 16))
    assert [block.shape for block in blocks] == [(32, 16, 16, 3), (8, 16, 16, 3)]
    assert (blocks[1] == blocks[0][0]).all()


def test_damaged_pictures_are_counted(tmp_path: Path) -> None:
    """The others come first, each at its own time; the first fault is named."""
    one = Fraction(1)
    assert refusal(list, decode_pictures(tmp_path, one, one, 16)) == (
        f"{tmp_path}: the folder holds no pictures (.jpg, .jpeg, .png)"
    )
    for t in range(4):
        save_picture(tmp_path / f"{t}.png", t)
    whole = [block[0] for block in decode_pictures(tmp_path, one, one, 16, block=1)]
    assert len(whole) == 4
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").write_bytes(b"")
    found: list[Any] = []
    with pytest.raises(VideoError) as caught:
        for block in decode_pictures(tmp_path, one, one, 16):
            found += list(block)
    # The first picture stands for the lost ones, too.
    expected = [whole[i] for i in (0, 0, 0, 3)]
    assert len(found) == 4 and np.array_equal(np.stack(found), np.stack(expected))
    assert caught.value.reason == ("damaged: 1.png: is no JPEG or PNG (2 pictures, 4 frames left)")


# ---- which videos -------------------------------------------------------------------------------


def test_lists_of_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the list, else in the current folder; what is nowhere, beside the list."""
    (tmp_path / "here").mkdir()
    for path in (tmp_path / "a.mp4", tmp_path / "here" / "a.mp4", tmp_path / "here" / "b.mp4"):
        path.write_bytes(b"1")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "list").write_text("a.mp4\n  b.mp4 \nc.mp4\n", encoding="utf-8")
    expected = [tmp_path / "a.mp4", Path("b.mp4"), tmp_path / "c.mp4"]
    assert [video.path for video in find_videos(tmp_path / "list")[0]] == expected
    (tmp_path / "list").write_text("x/.mp4\n", encoding="utf-8")
    said = f"{tmp_path}/x/.mp4: its name gives no id; rename it"
    assert refusal(find_videos, tmp_path / "list") == said
    end = "no such file or folder; name a folder of videos, or a list of them"
    assert refusal(find_videos, tmp_path / "none") == f"{tmp_path}/none: {end}"
    (tmp_path / "empty").mkdir()
    kinds = ".mp4, .mkv, .webm, .avi, .mov, .flv ..."
    said = f"{tmp_path}/empty: holds no video ({kinds}); name another folder, or a list"
    assert refusal(find_videos, tmp_path / "empty") == said
    end = "no such folder; it holds a folder of pictures per video"
    assert refusal(find_frames, tmp_path / "list") == f"--frames_dir {tmp_path}/list: {end}"
    said = refusal(listing._cannot_list, PermissionError(13, "Permission denied", "/x"))
    assert said == "/x: cannot be read (Permission denied); correct its permissions"


def test_a_stamp_is_of_name_size_and_time(tmp_path: Path) -> None:
    """16 letters, as long as the video stays; of one that is not there, of its name."""
    path = tmp_path / "a.mp4"
    stamps = [listing._video(path).stamp, listing._video(tmp_path / "b.mp4").stamp]
    assert listing._video(path).num_bytes == 0
    for content, time in ((b"1", 1), (b"12", 1), (b"12", 2)):
        path.write_bytes(content)
        os.utime(path, ns=(time, time))
        stamps += [listing._video(path).stamp]
    assert len(set(stamps)) == 5 and {len(stamp) for stamp in stamps} == {16}
    assert listing._video(path) == Video("a", path, 2, stamps[-1])


# ---- parts and records --------------------------------------------------------------------------

VIDEOS = [Video(name, Path(name), 1, f"stamp{name}") for name in "ab"]
FEATURES = {"a": torch.ones(2, 3).half(), "b": torch.full((1, 3), 2.0).half()}


def written(output: Path) -> Parts:
    made = Parts(output)
    made.begin({"fps": "1"})
    for video in VIDEOS:
        made.write(video, FEATURES[video.id], is_damaged=video.id == "b")
    return made


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_parts_become_a_file_or_a_folder(tmp_path: Path, suffix: str) -> None:
    """Those of damaged videos are in it; made again, they are still missing."""
    made = written(tmp_path / f"out{suffix}")
    assert made.folder == tmp_path / f"out{suffix}.parts"
    assert [video.id for video in made.missing(VIDEOS)] == ["b"]
    made.assemble(VIDEOS, {"b": "cut off"})
    found = GivenFeatures(made.output)
    for video in VIDEOS:
        assert torch.equal(torch.as_tensor(found.find(video.id)), FEATURES[video.id])
    made.remove()
    assert [path.name for path in tmp_path.iterdir()] == [made.output.name]
    said = refusal(Parts(made.output).begin, {"fps": "1"})
    assert said == f"--output {made.output}: exists already; name another, or remove it"


def test_parts_of_other_settings(tmp_path: Path) -> None:
    made = written(tmp_path / "out.pth")
    assert Parts(made.output).begin({"fps": "1"}) == []
    for settings, words in (({"fps": "2"}, "fps '1', not '2'"), ({}, "fps '1', not None")):
        assert refusal(Parts(made.output).begin, settings) == (
            f"{made.folder}: its features have {words}; remove that folder, or name another "
            "--output"
        )
    said = refusal(Parts(made.output).begin, {"fps": "1", "size": 3})
    assert "its features have size None, not 3" in said
    made.path(VIDEOS[0]).write_bytes(b"odd")
    said = refusal(made.assemble, VIDEOS[:1], {})
    assert said.startswith(f"{made.path(VIDEOS[0])}: cannot be read (")
    assert said.endswith("); remove it and start again")


def test_parts_of_many_videos_are_not_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system lets a process map 65,530 files."""
    assert 50_000 < parts.MAX_MAPPED < 65_000
    made, modes, load = written(tmp_path / "out.pth"), list[Any](), parts._load

    def noted(path: Path, mode: Any) -> Any:
        modes.append(mode)
        return load(path, mode)

    monkeypatch.setattr(parts, "_load", noted)
    for most in (2, 1):
        monkeypatch.setattr(parts, "MAX_MAPPED", most)
        made.assemble(VIDEOS, {"b": ""})
    assert modes == ["c", "c", None, None]


def test_the_record_of_an_encoder(tmp_path: Path) -> None:
    """It counts as long as the features have their bytes; a folder has none."""
    made = Provenance("clip", "0f", Fraction(7, 2))
    for path in (tmp_path / "f.pth", tmp_path / "folder"):
        assert provenance.read(path) is None
    (tmp_path / "f.pth").write_bytes(b"123")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "f.pth", tmp_path / "folder"):
        assert provenance.read(path) is None
        provenance.write(path, made)
        assert provenance.path_of(path) == path.with_name(f"{path.name}.encoder.json")
        assert provenance.read(path) == made
    (tmp_path / "f.pth").write_bytes(b"1234")
    assert provenance.read(tmp_path / "f.pth") is None
    record = provenance.path_of(tmp_path / "folder")
    record.write_text(record.read_text().replace("7/2", "7/0"))
    end = "encoder, encoder_sha256, fps and bytes are expected; remove it, or extract the features"
    assert end in refusal(provenance.read, tmp_path / "folder")
    (tmp_path / "folder").rmdir()
    assert provenance.read(tmp_path / "folder") is None
