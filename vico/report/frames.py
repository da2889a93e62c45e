"""A few small frames of each video, as JPEG inside the page."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vico.data.video_ids import VideoIds
from vico.errors import fail
from vico.io.paths import is_folder
from vico.report.load import Run
from vico.report.questions import Item, QuestionSet
from vico.video.frames import VideoError, decode_frames, require_av
from vico.video.listing import SOME_KINDS, videos_below

FRAMES_PER_VIDEO = 4
SIDE = 112  # pixels of a frame, which shows the middle of the picture
FRAMES_PER_SECOND = Fraction(1)  # of which a few are kept
Picture = NDArray[np.uint8]  # [SIDE, SIDE, 3]: red, green, blue


@dataclass(frozen=True)
class Frames:
    """`uris`: by video id its frames. `caption`: of how many videos, and why not of all."""

    uris: Mapping[str, list[str]] = field(default_factory=dict)
    caption: str = ""
    notes: tuple[str, ...] = ()  # on damaged videos


def frames_of(
    runs: Sequence[Run], sets: Sequence[QuestionSet], folder: Path, max_videos: int
) -> Frames:
    """Of the `max_videos` videos that matter most.

    First those of questions that runs answer differently, then of wrong answers, then the others,
    then those with captions alone. Raises UserError where `folder` holds no video.
    """
    av = require_av()
    files = find_files(folder)
    wanted = ordered_videos(runs, sets)
    ids = VideoIds(files, folder)
    found = {video: key for video in wanted if (key := ids.find(video)) is not None}
    uris: dict[str, list[str]] = {}
    faults: list[VideoError] = []
    for video in list(found)[:max_videos]:
        pictures, fault = few_pictures(files[found[video]])
        faults += [fault] if fault is not None else []
        if pictures:
            uris[video] = [data_uri(av, picture) for picture in pictures]
    caption = (
        f"Frames are those of {len(uris):,} of {len(wanted):,} videos: {len(found):,} are in "
        f"{folder}, and at most {max_videos:,} are read (--max_videos)."
    )
    notes = [f"{len(faults)} videos are damaged, first: {faults[0]}"] if faults else []
    return Frames(uris, caption, tuple(notes))


def find_files(folder: Path) -> dict[str, Path]:
    """The videos in a folder and below it, by relative path. Raises UserError without any."""
    if not is_folder(folder):
        fail(f"--videos {folder}: no such folder; name the folder of the videos")
    videos, _ = videos_below(folder)
    if not videos:
        fail(f"--videos {folder}: holds no video ({SOME_KINDS}); name another")
    return {path.relative_to(folder).as_posix(): path for path in videos}


def ordered_videos(runs: Sequence[Run], sets: Sequence[QuestionSet]) -> list[str]:
    """All video ids, those to look at first at the beginning."""
    items = [item for questions in sets for item in questions.items]
    videos = [item.key[0] for item in sorted(items, key=_urgency)]
    for run in runs:
        videos += [caption.video for caption in run.captions]
    return list(dict.fromkeys(videos))


def _urgency(item: Item) -> int:
    given = {answer.prediction for answer in item.answers if answer is not None}
    if len(given) > 1:
        return 0
    return 1 if any(item.is_right(run) is False for run in range(len(item.answers))) else 2


def few_pictures(path: Path) -> tuple[list[Picture], VideoError | None]:
    """(pictures spread evenly over the video, what is wrong with its file)."""
    kept: list[Picture] = []
    spacing, fault = 1, None
    try:
        for number, picture in enumerate(_pictures(path)):
            if number % spacing == 0:
                kept.append(picture)
            if len(kept) == 2 * FRAMES_PER_VIDEO:  # of a long video few stay in memory
                kept, spacing = kept[::2], 2 * spacing
    except VideoError as problem:
        fault = problem
    chosen = np.linspace(0, len(kept) - 1, min(len(kept), FRAMES_PER_VIDEO)).round()
    return [kept[int(i)] for i in chosen], fault


def _pictures(path: Path) -> Iterable[Picture]:
    for block in decode_frames(path, FRAMES_PER_SECOND, SIDE):
        yield from block


def data_uri(av: Any, picture: Picture) -> str:
    """The picture as a JPEG, by FFmpeg's encoder."""
    target = io.BytesIO()
    with av.open(target, "w", format="mjpeg") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuvj420p"
        stream.options = {"qmin": "6", "qmax": "6"}
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        for packet in (*stream.encode(frame), *stream.encode(None)):
            container.mux(packet)
    return f"data:image/jpeg;base64,{base64.b64encode(target.getvalue()).decode()}"
