"""The report's frames: which videos, how many, from where, and what is said of damaged ones."""

import base64
import io
import itertools
from pathlib import Path

import numpy as np
import pytest

from support.errors import refusal
from support.plain_user import as_plain_user, folder_of_anyone
from support.report_runs import Report
from vico.cli.report import main
from vico.report.frames import data_uri, few_pictures, find_files, frames_of, ordered_videos
from vico.report.load import load_runs
from vico.report.questions import join
from vico.video.listing import find_videos

av = pytest.importorskip("av")
videos = pytest.importorskip("support.videos")


def decoded(uri: str) -> np.ndarray:
    """The picture of a data URI, [height, width, 3]."""
    kind, text = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    with av.open(io.BytesIO(base64.b64decode(text)), format="mjpeg") as container:
        picture: np.ndarray = next(container.decode(video=0)).to_ndarray(format="rgb24")
    return picture


def test_a_picture_as_jpeg() -> None:
    """The colours stay within a few levels, and a picture takes a few kB."""
    picture = np.zeros((112, 112, 3), np.uint8)
    picture[:56, :, 0], picture[56:, :, 1] = 200, 160
    uri = data_uri(av, picture)
    difference = np.abs(decoded(uri).astype(int) - picture)
    assert difference.mean() < 4 and len(uri) < 10_000


def test_pictures_are_spread_over_a_video(tmp_path: Path) -> None:
    """Of 23 seconds the first, the last and two between; of one, the one that there is."""
    path = videos.make_video(tmp_path / "a.mp4", num_frames=23 * 2, rate=2)
    pictures, fault = few_pictures(path)
    assert fault is None and len(pictures) == 4
    assert {picture.shape for picture in pictures} == {(112, 112, 3)}
    pairs = itertools.pairwise(pictures)
    assert all((first != second).any() for first, second in pairs)
    short = videos.make_video(tmp_path / "b.mp4", num_frames=1)
    assert len(few_pictures(short)[0]) == 1


def test_changed_answers_come_first(tmp_path: Path) -> None:
    """Then wrong ones. At most --max_videos are read; what is damaged or not there is said."""
    made = Report(tmp_path, 28)
    made.write_questions()
    paths = [made.write_run("a", wrong_every=14), made.write_run("b", wrong_every=28)]
    runs = load_runs(paths)
    sets, _ = join(runs)
    order = ordered_videos(runs, sets)
    assert order == ["video2", "video0", "video1", "video3"]
    folder = tmp_path / "videos"
    (folder / "sub").mkdir(parents=True)
    videos.make_video(folder / "sub" / "video2.mp4", num_frames=50)
    (folder / "video0.mkv").write_bytes(b"no video")
    videos.make_video(folder / "video1.mp4", num_frames=50)
    (folder / "notes.txt").write_text("x")
    assert list(find_files(folder)) == ["sub/video2.mp4", "video0.mkv", "video1.mp4"]
    frames = frames_of(runs, sets, folder, 2)
    assert list(frames.uris) == ["video2"]
    assert frames.caption.startswith("Frames are those of 1 of 4 videos: 3 are in ")
    assert frames.notes[0].startswith(f"1 videos are damaged, first: {folder}/video0.mkv: ")
    target = tmp_path / "report.html"
    flags = ["--videos", str(folder), "--output", str(target)]
    assert main([*map(str, paths), *flags]) == 0
    page = target.read_text()
    assert page.count("data:image/jpeg;base64,") == len(frames.uris["video2"]) * 2
    assert "and at most 100 are read (--max_videos)" in page


def test_a_folder_without_videos(tmp_path: Path) -> None:
    made = Report(tmp_path, 8)
    made.write_questions()
    run = made.write_run("a", wrong_every=4)
    flags = [str(run), "--output", str(tmp_path / "r.html"), "--videos"]
    assert "holds no video (.mp4, .mkv, .webm" in refusal(main, [*flags, str(run)])
    assert "nowhere: no such folder; name" in refusal(main, [*flags, str(tmp_path / "nowhere")])


def test_the_kinds_of_videos_are_those_of_extract(tmp_path: Path) -> None:
    for name in ("a.MP4", "b.ts", "c.3gp", "d.txt", ".e.mp4"):
        (tmp_path / name).touch()
    assert list(find_files(tmp_path)) == ["a.MP4", "b.ts", "c.3gp"]
    assert [video.id for video in find_videos(tmp_path)[0]] == ["a", "b", "c"]


def test_a_folder_that_cannot_be_read() -> None:
    with folder_of_anyone() as folder:
        (folder / "a.mp4").touch()
        (folder / "closed").mkdir(mode=0)
        message = as_plain_user(lambda: refusal(find_files, folder))
        assert f"{folder}/closed: cannot be read" in message
