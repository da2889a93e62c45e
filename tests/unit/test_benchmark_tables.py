"""Every figure of the README's benchmark tables has its record."""

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from benchmarks.paths import RESULTS, ROOT

TABLES = (
    ("README.md", "Benchmarks"),
    ("README.md", "What the LLaMA keeps"),
    ("benchmarks/README.md", "Results"),
    ("launch/README.md", "What the LLaMA keeps"),
)
NUMBER = re.compile(r"(\d[\d,]*(?:\.\d+)?)(?: %)?")


@cache
def recorded() -> tuple[float, ...]:
    values: list[float] = []
    for path in RESULTS.glob("*.json"):
        values += numbers(json.loads(path.read_text(encoding="utf-8")))
    return tuple(values)


def numbers(value: Any) -> Iterator[float]:
    """Of medians, peaks and ratios, at any depth; not of lists of single times, nor of settings."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "cases":
                for case in inner:
                    yield from numbers(case)
            elif not isinstance(inner, list) and key != "settings":
                yield from numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)


def cells(document: str, heading: str) -> Iterator[tuple[str, list[str]]]:
    """(first cell, the other cells that are numbers) of each table row of the document's part."""
    text = (ROOT / document).read_text(encoding="utf-8").split(f"\n## {heading}\n")[1]
    for line in text.split("\n## ")[0].splitlines():
        first, *others = [cell.strip() for cell in line.strip("|").split("|")]
        found = [cell for cell in others if NUMBER.fullmatch(cell)]
        if line.startswith("|") and found:
            yield first, found


def is_recorded(cell: str, values: tuple[float, ...]) -> bool:
    match = NUMBER.fullmatch(cell)
    assert match is not None
    digits = match[1].replace(",", "")
    decimals = len(digits.partition(".")[2])
    scale = 100 if cell.endswith("%") else 1
    return any(f"{scale * value:.{decimals}f}" == digits for value in values)


def quotient(found: list[str]) -> tuple[float, ...]:
    """Of a row's first two figures, which may come from two records."""
    values = [float(cell.replace(",", "")) for cell in found if not cell.endswith("%")]
    return (values[0] / values[1],) if len(values) > 1 and values[1] else ()


@pytest.mark.parametrize(("document", "heading"), TABLES)
def test_figures_have_records(document: str, heading: str) -> None:
    rows = list(cells(document, heading))
    assert len(rows) >= 4
    for first, found in rows:
        for cell in found:
            assert is_recorded(cell, recorded() + quotient(found)), f"{first}: {cell}"


def test_a_wrong_figure_is_found() -> None:
    assert is_recorded("19,380", recorded()) and is_recorded("50.8 %", recorded())
    assert not is_recorded("19,381", recorded()) and not is_recorded("77.77 %", recorded())
