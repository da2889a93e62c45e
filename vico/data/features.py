"""The CLIP features of the videos: several GB, mapped once per machine, a few rows per question.

The published code took a missing or empty video for a row of zeros, silently. Here every video
that a question uses is checked before training.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.data import feature_files
from vico.data.feature_files import Container, describe
from vico.data.mapped_numbers import FILE
from vico.data.readers.rows import MAX_EXAMPLES
from vico.data.types import FeatureRows, Question
from vico.data.video_ids import VideoIds
from vico.errors import TrainingError, UserError, fail, show
from vico.io.input_files import InputFiles, Stamp, is_other_file, stamp_of
from vico.io.safe_load import is_float_tensor, release_pages
from vico.model.config import FEATURE_WIDTH

# Read between two releases of the mapped file's memory.
RELEASE_BYTES = 1 << 28
NUM_LOOKED_AT = 9  # videos that say how wide features are
Progress = Callable[[str], object]  # is told what long reading has done so far


def _silent(_: str) -> None:
    pass


@dataclass(frozen=True)
class Scan:
    """Videos of a feature file with something wrong, found by reading all of it."""

    malformed: tuple[str, ...]  # not [frames, width] of floating-point numbers
    not_finite: tuple[str, ...]
    with_zeros: tuple[str, ...]  # with an all-zero frame: the extraction failed there


@dataclass(frozen=True)
class Header:
    """What a video's features are, without their numbers."""

    length: int
    num_bytes: int
    dtype: torch.dtype
    fault: str | None  # what lies there in place of features


class Features:
    """Features by video id. Pickling carries the path alone: a data worker maps the file again.

    `path`: a file with all videos, or a folder with a file for each.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reset()
        files = feature_files.files_of(path)
        before = InputFiles(files)
        self._open(files)
        self._stamps = {file: before.stamp(file) or _stamp(file) for file in files}
        self.width = self._most_common_width()

    def _most_common_width(self) -> int:
        """Of the first videos. Raises UserError if one is damaged and none says a width."""
        widths: Counter[int] = Counter()
        damaged: UserError | None = None
        for key in islice(self._ids.keys, NUM_LOOKED_AT):
            try:
                value = self._value(key)
            except UserError as error:  # of a folder: refused where a question uses it
                damaged = damaged or error
                continue
            if _is_clip(value, None):
                widths[value.shape[1]] += 1
        if damaged is not None and not widths:
            raise damaged
        return widths.most_common(1)[0][0] if widths else FEATURE_WIDTH

    def _reset(self) -> None:
        self._opened: tuple[Container, VideoIds] | None = None
        self._headers: dict[str, Header] = {}
        self._unreleased_bytes = 0

    def _open(self, files: list[Path]) -> tuple[Container, VideoIds]:
        container = feature_files.open_container(self.path, files)
        self._opened = container, VideoIds(container.keys(), self.path)
        return self._opened

    @property
    def _container(self) -> Container:
        return self._reopened()[0]

    @property
    def _ids(self) -> VideoIds:
        return self._reopened()[1]

    def _reopened(self) -> tuple[Container, VideoIds]:
        if self._opened is None:  # in a worker, where an error must come with the first batch
            self.check_unchanged()
            return self._open(self.paths)
        return self._opened

    @property
    def paths(self) -> list[Path]:
        """All files of it."""
        return list(self._stamps)

    @property
    def num_bytes(self) -> int:
        """Of all files."""
        return sum(stamp[0] for stamp in self._stamps.values())

    @property
    def notes(self) -> list[str]:
        """How the features are read, where that is not as usual; after `check`."""
        notes = list(self._container.notes)
        if self.path.name != feature_files.DEFAULT_NAME:
            notes.insert(0, f"features: {self.path}, {self.width} wide")
        if any(header.dtype == torch.float64 for header in self._headers.values()):
            notes.append(f"{self.path}: holds float64, which is cast to float32 as it is read")
        return notes

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "stamps": self._stamps, "width": self.width}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self._stamps, self.width = state["path"], state["stamps"], state["width"]
        self._reset()

    def __contains__(self, video: str) -> bool:
        return self.key(video) is not None

    def __len__(self) -> int:
        return len(self._ids.keys)

    def key(self, video: str) -> str | None:
        """What the file calls a video; None: it does not hold it. Raises UserError for two."""
        return self._ids.find(video)

    def _value(self, video: str) -> Any:
        """What lies there under a video's id."""
        key = self._ids.find(video)
        if key is None:
            fail(f"{self.path}: has no features of video {show(video)}")
        return self._container.value(self._ids.keys[key])

    def header(self, video: str) -> Header:
        """Read once."""
        known = self._headers.get(video)
        if known is None:
            value = self._value(video)
            if _is_clip(value, self.width):
                known = Header(len(value), value.nbytes, value.dtype, None)
            else:
                known = Header(0, 0, torch.float32, describe(value))
            self._headers[video] = known
        return known

    def check_unchanged(self) -> None:
        """Raise TrainingError if the file was overwritten: its mapping may hold noise or kill the
        process.

        Costs one stat per file. InputFiles compares the content where only an entry has changed.
        """
        for path, stamp in self._stamps.items():
            if is_other_file(stamp, _stamp(path)):
                raise TrainingError(
                    f"{path}: {FILE} changed during the run; start again, "
                    "and leave the file alone meanwhile"
                )

    def check(self, questions: Sequence[Question], progress: Progress = _silent) -> int:
        """Number of questions whose clip begins past the end of its video.

        `sample` gives zeros for such a clip, so the caller must report their number. Opens each
        file of a folder once. Raises UserError if the video of a question is missing or malformed,
        and if all clips are such.
        """
        missing = {q.video for q in questions if q.video not in self}
        hint = ""
        if len(missing) == len({q.video for q in questions}):
            hint = f" (the file's ids are like {self.example})"
        self._refuse(questions, missing, "have no features", hint=hint)
        malformed = {}
        videos = dict.fromkeys(q.video for q in questions)
        for number, video in enumerate(videos, start=1):
            progress(f"{self.path}: looked at {number} of {len(videos)} videos")
            if (fault := self.header(video).fault) is not None:
                malformed[video] = fault
        problem = f"have features that are no floating-point tensor [frames >= 1, {self.width}]"
        self._refuse(questions, malformed.keys(), problem, malformed)
        past_end = [q for q in questions if self._begins_past_end(q)]
        if questions and len(past_end) == len(questions):
            first = past_end[0]
            assert first.feature_rows is not None, "it begins past the end"
            fail(
                f"{self.path}: the clips of all {len(questions)} questions begin past the end of "
                f"their videos' features, e.g. {show(first.video)}: at frame "
                f"{first.feature_rows[0]} of {self.header(first.video).length}; extract them at "
                "the frame rate that this data set counts in"
            )
        return len(past_end)

    @property
    def example(self) -> str:
        """An id of the file, for messages."""
        return show(next(iter(self._ids.keys)))

    def _begins_past_end(self, question: Question) -> bool:
        if question.feature_rows is None:
            return False
        return question.feature_rows[0] >= self.header(question.video).length

    def check_finite(
        self, questions: Sequence[Question], num_frames: int, progress: Progress = _silent
    ) -> None:
        """Raise UserError for NaN or infinity in a row that will be used.

        Each row is read once: minutes for a large set on a cold disk.
        """
        clips = dict.fromkeys((q.video, q.feature_rows) for q in questions)
        not_finite = set()
        for number, (video, rows) in enumerate(clips, start=1):
            progress(f"{self.path}: read {number} of {len(clips)} clips")
            if not torch.isfinite(self.sample(video, rows, num_frames)).all():
                not_finite.add(video)
        self.refuse_not_finite(questions, not_finite)

    def refuse_not_finite(self, questions: Sequence[Question], not_finite: Iterable[str]) -> None:
        """Raise UserError if a question uses one of the videos with NaN or infinite values."""
        bad = set(not_finite)
        used = {q.video for q in questions if q.video in bad or self.key(q.video) in bad}
        self._refuse(questions, used, "have features with NaN or infinite values")

    def scan(self, progress: Progress = _silent) -> Scan:
        """Read the whole file: seconds per GB. Raises UserError for a wrong checksum."""
        malformed, not_finite, with_zeros = [], [], []
        for number, video in enumerate(self._ids.keys, start=1):
            progress(f"{self.path}: read {number} of {len(self)} videos")
            try:
                fault = self.header(video).fault
            except UserError as problem:  # no question need use it
                fault = str(problem)
            if fault is not None:
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
        hint: str = "",
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
            f"{problem}, e.g. {', '.join(examples)}{hint}; "
            "extract them, or fetch the feature file that belongs to these questions"
        )

    def verify(self, video: str) -> None:
        """Raise UserError if the video's bytes are not those that torch.save wrote."""
        key = self.key(video)
        assert key is not None, "check was called"
        self._container.verify(self._ids.keys[key])

    def frames(self, video: str) -> Tensor:
        """[frames, width]: a whole video as it lies in the mapped file. It must not be written to.

        For who reads all videos: the memory of those before is given back now and then.
        """
        frames: Tensor = self._value(video).detach()
        self._unreleased_bytes += frames.nbytes
        if self._unreleased_bytes > RELEASE_BYTES:  # those of a folder are unmapped anyway
            release_pages(self.path)
            self._unreleased_bytes = 0
        return frames

    def sample(self, video: str, rows: FeatureRows | None, num_frames: int) -> Tensor:
        """[num_frames, width] fp32: frames spread evenly over the clip; zero rows pad a short one.

        Always a copy: the mapping itself must never be written to.
        """
        clip = self._value(video).detach()
        return sample_frames(clip if rows is None else clip[rows[0] : rows[1]], num_frames)

    def finite_sample(self, video: str, rows: FeatureRows | None, num_frames: int) -> Tensor:
        """As `sample`. Raises UserError for NaN or infinite values."""
        sample_FC = self.sample(video, rows, num_frames)
        if not sample_FC.isfinite().all():
            fail(
                f"{self.path}: the features of video {show(video)} hold NaN or infinite values; "
                "extract them again"
            )
        return sample_FC


def sample_frames(clip: Tensor, num_frames: int) -> Tensor:
    """[num_frames, width] fp32 of a clip [frames, width], as `Features.sample` says."""
    length, width = clip.shape
    out = torch.zeros(num_frames, width)
    if length > num_frames:
        spread = [(j * length) // num_frames for j in range(num_frames)]
        # clip[list] forks threads for ten rows: 7 ms instead of 20 us on two busy cores.
        out.copy_(clip.index_select(0, torch.tensor(spread, dtype=torch.int64)))
    else:
        out[:length] = clip
    return out


class _InMemory:
    """A dict of tensors that no file holds."""

    def __init__(self, videos: Mapping[str, Tensor]) -> None:
        self.notes = list[str]()
        self._videos = videos

    def keys(self) -> Iterable[object]:
        return self._videos

    def value(self, key: object) -> Any:
        return self._videos[str(key)]

    def verify(self, key: object) -> None:
        """There is no file to be compared with."""


class FeaturesInMemory(Features):
    """Features that no file holds: of a video that was encoded just now, or of a Python program.

    `videos`: [frames, width] by video id. `label`: what messages call them. For this process alone.
    """

    def __init__(self, videos: Mapping[str, Tensor], label: str) -> None:
        self.path, self._stamps = Path(label), {}
        self._reset()
        self._opened = _InMemory(videos), VideoIds(videos, self.path)
        self.width = self._most_common_width()


def common_width(features: Mapping[str, Features]) -> int:
    """The width of all data sets' features (0: of none). Raises UserError for several."""
    widths = {name: opened.width for name, opened in features.items()}
    if len(set(widths.values())) > 1:
        found = " and ".join(
            f"{name}: {opened.path}, {opened.width} wide" for name, opened in features.items()
        )
        fail(
            f"the data sets' features differ: {found}; one model reads features of one width: use "
            "those of one extractor for all (--features NAME=PATH,NAME=PATH)"
        )
    return next(iter(widths.values()), 0)


def _stamp(path: Path) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as problem:
        raise UserError(f"{path}: {FILE} cannot be opened ({problem.strerror})") from None


def _is_clip(value: Any, width: int | None) -> bool:
    """Whether it is [frames >= 1, width >= 1]; of any width for None."""
    if not is_float_tensor(value) or value.ndim != 2 or not value.numel():
        return False
    return width is None or value.shape[1] == width
