"""What a scenario of the self-test is given, and what it returns."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How many cases a scenario runs, and where: `folder` is empty, and removed after it."""

    quick: bool
    seed: int
    folder: Path


@dataclass(frozen=True)
class Result:
    """`passed` of `of` cases. `facts` can be written as JSON; its "failures" are lines of text."""

    passed: int
    of: int
    facts: dict[str, Any] = field(default_factory=dict)


class SkippedError(Exception):
    """A scenario cannot run here; the message says why."""
