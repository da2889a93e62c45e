"""The CLIP features of the videos: several GB in one file, mapped once per machine, a few rows of it read per question.

A missing or empty video was a silent row of zeros in the lineage; here everything is checked before training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.data.readers.rows import NUM_SHOWN, strip_ids
from vico.data.types import Question
from vico.errors import TrainingError, UserError, fail, show
from vico.io.safe_load import is_float_tensor, load_tensors

WIDTH = 768  # CLIP ViT-L/14
Rows = tuple[int, int]


@dataclass(frozen=True)
class Scan:
    """Videos of a feature file, by what reading all of it showed."""

    odd: tuple[str, ...]  # no [frames, 768] of floating-point numbers
    not_finite: tuple[str, ...]
    with_zeros: tuple[str, ...]  # with a frame that is all zeros: an extraction that failed there


class Features:
    """Features by video id. Pickling carries the path alone: a data-loader worker maps the file anew and copies nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Any] | None = load_tensors(path, "the video feature file")
        self._stamp = _stamp(path)
        if not isinstance(self._videos, dict) or not self._videos:
            fail(
                f"{path}: holds {_describe(self._videos)}, not a dict from video id to features; fetch the right file"
            )
        if odd := [key for key in self._videos if not isinstance(key, str)]:
            fail(
                f"{path}: {len(odd)} of {len(self._videos)} keys are no text, e.g. {show(odd[0])}; save it with str(video id) as keys"
            )
        self._mapped = strip_ids(self._videos, path)

    @property
    def _videos(self) -> dict[str, Any]:
        if self._mapped is None:  # in a worker, where an error must come with the first batch
            self.check_unchanged()
            self._mapped = strip_ids(load_tensors(self.path, "the video feature file"), self.path)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._stamp, self._mapped = state["path"], state["stamp"], None

    def __contains__(self, video: str) -> bool:
        return video in self._videos

    def __len__(self) -> int:
        return len(self._videos)

    def check_unchanged(self) -> None:
        """Cheap (one stat): a file overwritten under its mapping turns into noise, or kills the process."""
        if _stamp(self.path) != self._stamp:
            raise TrainingError(
                f"{self.path}: the video feature file changed during the run; start again, and leave the file alone meanwhile"
            )

    def check(self, questions: Sequence[Question]) -> int:
        """Each question's video is there and well formed; returns how many clips lie wholly past the end of their video.

        Such clips are all zeros in `sample`: the caller must say how many there are.
        """
        self._refuse(
            questions,
            {q.video for q in questions if q.video not in self._videos},
            "have no features",
        )
        odd = {}
        for video in dict.fromkeys(q.video for q in questions):
            value = self._videos[video]
            if not _is_clip(value):
                odd[video] = _describe(value)
        self._refuse(
            questions,
            odd.keys(),
            f"have features that are no floating-point tensor [frames >= 1, {WIDTH}]",
            odd,
        )
        return sum(
            q.feature_rows is not None and q.feature_rows[0] >= len(self._videos[q.video])
            for q in questions
        )

    def check_finite(self, questions: Sequence[Question], num_frames: int) -> None:
        """No NaN or infinity in the rows that will be used (each is read once: minutes for a large set on a cold disk)."""
        clips = dict.fromkeys((q.video, q.feature_rows) for q in questions)
        bad = {
            video
            for video, rows in clips
            if not torch.isfinite(self.sample(video, rows, num_frames)).all()
        }
        self.refuse_not_finite(questions, bad)

    def refuse_not_finite(self, questions: Sequence[Question], bad: Iterable[str]) -> None:
        """`bad`: videos that hold NaN or infinite values, asked about or not."""
        self._refuse(
            questions,
            {q.video for q in questions} & set(bad),
            "have features with NaN or infinite values",
        )

    def scan(self) -> Scan:
        """All of the file is read: seconds per GB."""
        odd, not_finite, with_zeros = [], [], []
        for video, value in self._videos.items():
            if not _is_clip(value):
                odd.append(video)
                continue
            clip = value.detach()
            lowest_T, highest_T = (
                clip.amin(1).float(),
                clip.amax(1).float(),
            )  # both keep NaN; ten times as fast as isfinite
            if not (lowest_T.isfinite().all() and highest_T.isfinite().all()):
                not_finite.append(video)
            if ((lowest_T == 0) & (highest_T == 0)).any():
                with_zeros.append(video)
        return Scan(tuple(odd), tuple(not_finite), tuple(with_zeros))

    def _refuse(
        self,
        questions: Sequence[Question],
        videos: Iterable[str],
        what: str,
        notes: dict[str, str] | None = None,
    ) -> None:
        bad = set(videos)
        if not bad:
            return
        shown = [q.video for q in questions if q.video in bad]
        examples = ", ".join(
            show(v) + (f" ({notes[v]})" if notes else "")
            for v in list(dict.fromkeys(shown))[:NUM_SHOWN]
        )
        fail(
            f"{self.path}: {len(shown)} of {len(questions)} questions ({len(bad)} videos) {what}, e.g. {examples}; "
            "extract them, or fetch the feature file that belongs to these questions"
        )

    def frames(self, video: str) -> Tensor:
        """[frames, 768]: a whole video as it lies in the mapped file; only to be read."""
        rows: Tensor = self._videos[video].detach()
        return rows

    def sample(self, video: str, rows: Rows | None, num_frames: int) -> Tensor:
        """[num_frames, 768] fp32: frames spread evenly over the clip, zero rows after a clip that has fewer."""
        clip = self._videos[video].detach()
        if rows is not None:
            clip = clip[rows[0] : rows[1]]
        length = len(clip)
        out = torch.zeros(
            num_frames, WIDTH
        )  # always a copy: the mapping itself must not get out and be written to
        if length > num_frames:
            # Not clip[list]: that one forks threads for ten rows, and took 7 ms instead of 20 us on two busy cores.
            out.copy_(
                clip.index_select(
                    0, torch.tensor([(j * length) // num_frames for j in range(num_frames)])
                )
            )
        else:
            out[:length] = clip
        return out


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as problem:
        raise UserError(
            f"{path}: the video feature file cannot be opened ({problem.strerror})"
        ) from None
    return status.st_size, status.st_mtime_ns


def _is_clip(value: Any) -> bool:
    return (
        is_float_tensor(value)
        and value.ndim == 2
        and value.shape[0] >= 1
        and value.shape[1] == WIDTH
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor) and not value.is_nested:  # which cannot say its shape
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return (
        f"{type(value).__name__} of length {len(value)}"
        if isinstance(value, (list, tuple, dict))
        else type(value).__name__
    )
