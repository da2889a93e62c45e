"""Feature files, and questions about their videos."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vico.data.types import FeatureRows, Question

WIDTH = 768  # of CLIP ViT-L/14


def numbered(length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """[length, 768] whose row r holds r + 1, so that a zero row is padding."""
    return torch.arange(1, length + 1, dtype=dtype)[:, None].expand(length, WIDTH).contiguous()


def save(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def questions_about(*clips: tuple[str, FeatureRows | None]) -> list[Question]:
    """One question per (video, rows of its features)."""
    return [
        Question(i, str(i), video, "CW", "why", ("a", "b"), 0, rows)
        for i, (video, rows) in enumerate(clips)
    ]
