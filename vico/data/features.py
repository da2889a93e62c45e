"""The CLIP features of the videos: several GB, mapped once per machine, a few rows per question.

The published code took a missing or empty video for a row of zeros, silently. Here every video
that a question uses is checked before training.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.data.readers.rows import MAX_EXAMPLES, strip_ids
from vico.data.types import FeatureRows, Question
from vico.errors import TrainingError, UserError, fail, show
from vico.io.input_files import InputFiles, Stamp, is_other_file, stamp_of
from vico.io.safe_load import StoredChecksums, is_float_tensor, load_tensors, release_pages

WIDTH = 768  # CLIP ViT-L/14
FILE = "the video feature file"  # in messages
# Read between two releases of the mapped file's memory.
RELEASE_BYTES = 1 << 28


@dataclass(frozen=True)
class Scan:
    """Videos of a feature file with something wrong, found by reading all of it."""

    malformed: tuple[str, ...]  # not [frames, 768] of floating-point numbers
    not_finite: tuple[str, ...]
    with_zeros: tuple[str, ...]  # with an all-zero frame: the extraction failed there


class Features:
    """Features by video id. Pickling carries the path alone: a data worker maps the file again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mapped: dict[str, Any] | None = None
        before = InputFiles([path]).stamp(path)
        self._unreleased_bytes = 0
        content = load_tensors(path, FILE)
        self._stamp = before or _stamp(path)
        self._checksums = StoredChecksums(path, FILE)
        if not isinstance(content, dict) or not content:
            found = _describe(content)
            fail(
                f"{path}: holds {found}, not a dict from video id to features; fetch the right file"
            )
        bad_keys = [key for key in content if not isinstance(key, str)]
        if bad_keys:
            fail(
                f"{path}: {len(bad_keys)} of {len(content)} keys are no text, "
                f"e.g. {show(bad_keys[0])}; save it with str(video id) as keys"
            )
        self._mapped = strip_ids(content, path)

    @property
    def _videos(self) -> dict[str, Any]:
        if self._mapped is None:  # in a worker, where an error must come with the first batch
            self.check_unchanged()
            self._mapped = strip_ids(load_tensors(self.path, FILE), self.path)
        return self._mapped

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stamp": self._stamp}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._stamp, self._mapped = state["path"], state["stamp"], None
        self._checksums = StoredChecksums(self.path, FILE)
        self._unreleased_bytes = 0

    def __contains__(self, video: str) -> bool:
        return video in self._videos

    def __len__(self) -> int:
        return len(self._videos)

    def check_unchanged(self) -> None:
        """Raise TrainingError if the file was overwritten: its mapping may hold noise or kill the
        process.

        Costs one stat. InputFiles compares the content where only the file's entry has changed.
        """
        if is_other_file(self._stamp, _stamp(self.path)):
            raise TrainingError(
                f"{self.path}: {FILE} changed during the run; start again, "
                "and leave the file alone meanwhile"
            )

    def check(self, questions: Sequence[Question]) -> int:
        """Number of questions whose clip begins past the end of its video.

        `sample` gives zeros for such a clip, so the caller must report their number. Raises
        UserError if the video of a question is missing or malformed.
        """
        missing = {q.video for q in questions if q.video not in self._videos}
        self._refuse(questions, missing, "have no features")
        malformed = {}
        for video in dict.fromkeys(q.video for q in questions):
            value = self._videos[video]
            if not _is_clip(value):
                malformed[video] = _describe(value)
        problem = f"have features that are no floating-point tensor [frames >= 1, {WIDTH}]"
        self._refuse(questions, malformed.keys(), problem, malformed)
        return sum(self._begins_past_end(q) for q in questions)

    def _begins_past_end(self, question: Question) -> bool:
        if question.feature_rows is None:
            return False
        return question.feature_rows[0] >= len(self._videos[question.video])

    def check_finite(self, questions: Sequence[Question], num_frames: int) -> None:
        """Raise UserError for NaN or infinity in a row that will be used.

        Each row is read once: minutes for a large set on a cold disk.
        """
        clips = dict.fromkeys((q.video, q.feature_rows) for q in questions)
        not_finite = set()
        for video, rows in clips:
            if not torch.isfinite(self.sample(video, rows, num_frames)).all():
                not_finite.add(video)
        self.refuse_not_finite(questions, not_finite)

    def refuse_not_finite(self, questions: Sequence[Question], not_finite: Iterable[str]) -> None:
        """Raise UserError if a question uses one of the videos with NaN or infinite values."""
        used = {q.video for q in questions} & set(not_finite)
        self._refuse(questions, used, "have features with NaN or infinite values")

    def scan(self) -> Scan:
        """Read the whole file: seconds per GB. Raises UserError for a wrong checksum."""
        malformed, not_finite, with_zeros = [], [], []
        for video, value in self._videos.items():
            if not _is_clip(value):
                malformed.append(video)
                continue
            self.verify(video)
            clip = self.frames(video)
            # Both keep NaN, and are ten times as fast as isfinite on the whole clip.
            lowest_T, highest_T = clip.amin(1).float(), clip.amax(1).float()
            if not (lowest_T.isfinite().all() and highest_T.isfinite().all()):
                not_finite.append(video)
            if ((lowest_T == 0) & (highest_T == 0)).any():
                with_zeros.append(video)
        return Scan(tuple(malformed), tuple(not_finite), tuple(with_zeros))

    def _refuse(
        self,
        questions: Sequence[Question],
        videos: Iterable[str],
        problem: str,
        details: dict[str, str] | None = None,
    ) -> None:
        """Raise UserError if questions are about `videos`: how many, and examples."""
        bad = set(videos)
        if not bad:
            return
        affected = [q.video for q in questions if q.video in bad]
        examples = []
        for video in list(dict.fromkeys(affected))[:MAX_EXAMPLES]:
            detail = f" ({details[video]})" if details else ""
            examples.append(show(video) + detail)
        fail(
            f"{self.path}: {len(affected)} of {len(questions)} questions ({len(bad)} videos) "
            f"{problem}, e.g. {', '.join(examples)}; "
            "extract them, or fetch the feature file that belongs to these questions"
        )

    def verify(self, video: str) -> None:
        """Raise UserError if the video's bytes are not those that torch.save wrote."""
        self._checksums.verify(f"the features of video {show(video)}", self._videos[video])

    def frames(self, video: str) -> Tensor:
        """[frames, 768]: a whole video as it lies in the mapped file. It must not be written to.

        For who reads all videos: the memory of those before is given back now and then.
        """
        frames: Tensor = self._videos[video].detach()
        self._unreleased_bytes += frames.nbytes
        if self._unreleased_bytes > RELEASE_BYTES:
            release_pages(self.path)
            self._unreleased_bytes = 0
        return frames

    def sample(self, video: str, rows: FeatureRows | None, num_frames: int) -> Tensor:
        """[num_frames, 768] fp32: frames spread evenly over the clip; zero rows pad a shorter one.

        Always a copy: the mapping itself must never be written to.
        """
        clip = self._videos[video].detach()
        if rows is not None:
            clip = clip[rows[0] : rows[1]]
        length = len(clip)
        out = torch.zeros(num_frames, WIDTH)
        if length > num_frames:
            spread = [(j * length) // num_frames for j in range(num_frames)]
            # clip[list] forks threads for ten rows: 7 ms instead of 20 us on two busy cores.
            out.copy_(clip.index_select(0, torch.tensor(spread)))
        else:
            out[:length] = clip
        return out


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as problem:
        raise UserError(f"{path}: {FILE} cannot be opened ({problem.strerror})") from None


def _is_clip(value: Any) -> bool:
    return (
        is_float_tensor(value)
        and value.ndim == 2
        and value.shape[0] >= 1
        and value.shape[1] == WIDTH
    )


def _describe(value: object) -> str:
    if isinstance(value, Tensor) and not value.is_nested:  # a nested tensor has no shape
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, (list, tuple, dict)):
        return f"{type(value).__name__} of length {len(value)}"
    return type(value).__name__
