"""Which videos a folder, a list or a folder of frames names, and their ids."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from vico.data.video_ids import VIDEO_EXTENSIONS, reduced
from vico.errors import fail, show
from vico.io.digest import digest_json
from vico.io.paths import exists, is_folder
from vico.io.text import read_text
from vico.video.pictures import pictures_in

STAMP_LENGTH = 16
SOME_KINDS = ", ".join(f".{name}" for name in VIDEO_EXTENSIONS[:6]) + " ..."


@dataclass(frozen=True)
class Video:
    """`path`: a file, or a folder of pictures."""

    id: str
    path: Path
    num_bytes: int  # 0: not there
    stamp: str  # changes when the video is replaced


def find_videos(source: Path) -> tuple[list[Video], list[str]]:
    """(videos by id, notes): those of a folder and below it, of a list, or one file.

    Raises UserError where there is none, and for two files of one id.
    """
    if not exists(source):
        fail(f"{source}: no such file or folder; name a folder of videos, or a list of them")
    if is_folder(source):
        paths, others = videos_below(source)
        if not paths:
            fail(f"{source}: holds no video ({SOME_KINDS}); name another folder, or a list")
        notes = [f"{source}: {len(others)} other files, as {others[0].name}"] if others else []
        return _with_ids(paths, source), notes
    if _is_video(source):
        return _with_ids([source], source), []
    return _with_ids(_listed(source), source), []


def find_frames(folder: Path) -> tuple[list[Video], list[str]]:
    """As `find_videos`, of folders with pictures."""
    if not is_folder(folder):
        fail(f"--frames_dir {folder}: no such folder; it holds a folder of pictures per video")
    paths = [Path(place) for place, _, _ in os.walk(folder) if Path(place) != folder]
    paths = sorted(path for path in paths if pictures_in(path))
    if not paths:
        fail(f"--frames_dir {folder}: no folder in it holds pictures (.jpg, .png)")
    return _with_ids(paths, folder), []


def videos_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """(videos, other files) in a folder and below it, without hidden ones.

    Raises UserError for a folder that cannot be read.
    """
    found: list[Path] = []
    for place, _, names in os.walk(folder, onerror=_cannot_list):
        found += [Path(place, name) for name in names if not name.startswith(".")]
    videos = sorted(path for path in found if _is_video(path))
    return videos, sorted(set(found).difference(videos))


def _cannot_list(problem: OSError) -> None:
    fail(f"{problem.filename}: cannot be read ({problem.strerror}); correct its permissions")


def _is_video(path: Path) -> bool:
    return path.suffix.lower().removeprefix(".") in VIDEO_EXTENSIONS


def _listed(path: Path) -> list[Path]:
    """A path per line, relative to the list's folder or else to the current one."""
    lines = [line.strip() for line in read_text(path, "the list of videos").splitlines()]
    names = [line for line in lines if line and not line.startswith("#")]
    if not names:
        fail(f"{path}: lists no video; write a path per line")
    beside = [path.parent / name for name in names]
    pairs = zip(names, beside, strict=True)
    return [p if exists(p) or not exists(Path(name)) else Path(name) for name, p in pairs]


def _with_ids(paths: Iterable[Path], source: Path) -> list[Video]:
    videos: dict[str, Video] = {}
    for path in paths:
        video = _video(path)
        if not video.id:
            fail(f"{path}: its name gives no id; rename it")
        if other := videos.get(video.id):
            fail(
                f"{source}: {other.path} and {path} are both of the video {show(video.id)}; keep "
                "one, or rename it"
            )
        videos[video.id] = video
    return [videos[key] for key in sorted(videos)]


def _video(path: Path) -> Video:
    name = reduced(path.name)
    try:
        status = path.stat()
    except (OSError, ValueError):
        return Video(name, path, 0, digest_json([name], STAMP_LENGTH))
    num_bytes = status.st_size
    return Video(name, path, num_bytes, digest_json([name, num_bytes, status.st_mtime_ns], 16))
