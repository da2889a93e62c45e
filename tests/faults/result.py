"""What a scenario of the self-test is given, and what it gives back."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How much a scenario shall do, and where: `folder` is its own, empty, and removed after it."""

    quick: bool
    seed: int
    folder: Path


@dataclass(frozen=True)
class Result:
    """`passed` of `of` cases; `facts`: what JSON can hold, above all the failures with their reasons."""

    passed: int
    of: int
    facts: dict[str, Any] = field(default_factory=dict)
