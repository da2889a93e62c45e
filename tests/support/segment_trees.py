"""Random streams of segments, and which rows see which, straight from the definition."""

import random

import torch
from torch import Tensor

from vico.model.batch import Segment

Segments = tuple[Segment, ...]


def random_segments(seed: int, lengths: tuple[int, ...] = (1, 2, 5, 15, 16, 17, 33)) -> Segments:
    """Up to six segments, with parents, videos and siblings; lengths around a tile of 16 rows."""
    numbers = random.Random(seed)
    segments: list[Segment] = []
    for i in range(numbers.randint(1, 6)):
        start = segments[-1].stop if segments else 0
        parents = [None, numbers.randrange(i), i - 1, segments[-1].parent] if i else [None]
        kind = numbers.choice(["video", "after", "plain"])
        parent, length = numbers.choice(parents), numbers.choice(lengths)
        segments.append(Segment(start, start + length, parent, kind == "video", kind == "after"))
    return tuple(segments)


def visible_pairs(segments: Segments) -> tuple[Tensor, Tensor]:
    """(visible, gated), bool [T, T], row by row as METHOD section 1 says."""
    num_rows = segments[-1].stop
    visible = torch.zeros(num_rows, num_rows, dtype=torch.bool)
    gated = torch.zeros_like(visible)
    for segment in segments:
        for row in range(segment.start, segment.stop):
            visible[row, segment.start : row + 1] = True
        parent = segment.parent
        while parent is not None:
            above = segments[parent]
            visible[segment.start : segment.stop, above.start : above.stop] = True
            if segment.after_video and above.is_video:
                gated[segment.start : segment.stop, above.start : above.stop] = True
            parent = above.parent
    return visible, gated
