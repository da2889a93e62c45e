"""Features of one's own beside given ones of the same videos."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.data.feature_files import Container, describe, files_of, open_container
from vico.data.video_ids import VideoIds
from vico.errors import show
from vico.io.paths import MAX_BYTES
from vico.io.safe_load import is_float_tensor


class GivenFeatures:
    """Raises UserError for a file that holds no features."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._container: Container = open_container(path, files_of(path), MAX_BYTES)
        self._ids = VideoIds(self._container.keys(), path)

    def find(self, video: str) -> Any:
        """What the file holds for a video; None: nothing."""
        text = self._ids.find(video)
        return None if text is None else self._container.value(self._ids.keys[text])


@dataclass
class Comparison:
    """What a comparison of all videos came to."""

    num_compared: int = 0
    num_missing: int = 0
    num_other_lengths: int = 0
    sum_of_cosines: float = 0.0
    lowest: float = 1.0

    def summary(self, path: Path) -> str:
        if not self.num_compared:
            return f"{path}: none of {self.num_missing} videos can be compared"
        mean = self.sum_of_cosines / self.num_compared
        return (
            f"{path}: {self.num_compared} videos compared, mean cosine {mean:.6f}, lowest of a "
            f"frame {self.lowest:.6f}; {self.num_other_lengths} have another number of frames, "
            f"{self.num_missing} cannot be compared"
        )


def compare(own: Path, videos: Iterable[str], given: GivenFeatures) -> Iterator[str]:
    """A line per video, then a summary. Cosines are of the frames that both have."""
    features, result = GivenFeatures(own), Comparison()
    for video in videos:
        ours, theirs = features.find(video), given.find(video)
        if theirs is None:
            result.num_missing += 1
            yield f"{show(video)}: not in {given.path.name}"
            continue
        if not is_float_tensor(theirs) or theirs.ndim != 2 or theirs.shape[1] != ours.shape[1]:
            result.num_missing += 1
            yield f"{show(video)}: {describe(ours)}, there {describe(theirs)}: other widths"
            continue
        yield f"{show(video)}: {_line(ours, theirs, result)}"
    yield result.summary(given.path)


def _line(ours: Tensor, theirs: Tensor, result: Comparison) -> str:
    num_both = min(len(ours), len(theirs))
    pair = ours[:num_both].double(), theirs[:num_both].double()
    cosines = torch.cosine_similarity(*pair, dim=1) if num_both else torch.zeros(1)
    result.num_compared += 1
    result.num_other_lengths += len(ours) != len(theirs)
    result.sum_of_cosines += float(cosines.mean())
    result.lowest = min(result.lowest, float(cosines.min()))
    return (
        f"cosine {float(cosines.mean()):.6f}, lowest {float(cosines.min()):.6f}, "
        f"{len(ours)} frames, there {len(theirs)}"
    )
