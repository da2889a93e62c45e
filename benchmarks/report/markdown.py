"""Parts of the report as Markdown: numbers, tables, plots."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure.spreads import UNKNOWN, median_of

NOT_MEASURED = "not measured"


def number(metric: Any, digits: int = 4) -> str:
    """The number, or median and percentiles of a spread, or "n/a"."""
    if isinstance(metric, dict):
        median, p10, p90 = (number(metric[key], digits) for key in ("median", "p10", "p90"))
        return f"{median} ({p10} to {p90})"
    if not isinstance(metric, int | float):
        return UNKNOWN
    return f"{metric:,.0f}" if abs(metric) >= 10**digits else f"{metric:.{digits}g}"


def percent(metric: Any) -> str:
    median = median_of(metric)
    return UNKNOWN if median is None else f"{median:.1%}"


def measured(metrics: dict[str, Any], key: str, form: Callable[[Any], str] = number) -> str:
    """A metric that older records lack."""
    return form(metrics[key]) if key in metrics else NOT_MEASURED


@dataclass
class Section:
    """A section of the report: its lines, and the files of its plots."""

    lines: list[str] = field(default_factory=list)
    plots: list[Path] = field(default_factory=list)

    def add_text(self, text: str) -> None:
        self.lines += [text, ""]

    def add_table(self, columns: list[str], rows: list[list[str]]) -> None:
        self.lines.append(_row(columns))
        self.lines.append("|" + "---|" * len(columns))
        self.lines += [_row(row) for row in rows]
        self.lines.append("")

    def add_plots(self, paths: list[Path], subject: str, why_none: str) -> None:
        if paths:
            self.lines += [f"![{subject}]({path.parent.name}/{path.name})" for path in paths]
        else:
            self.lines.append(f"No plot of {subject}: {why_none}.")
        self.lines.append("")
        self.plots += paths


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
