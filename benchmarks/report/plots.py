"""The report's plots. Each function returns the files it wrote, none if there is nothing to draw.

Colours mean the same in every plot: plain is grey, fast is blue, a category of operators keeps its
colour.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.plot_data import TimeSplit, budget_points, scaling_lines

PLAIN, FAST, IDEAL = "#8a8f98", "#1b6ca8", "#c4c7cc"
MAX_CATEGORIES = 7  # shown one by one; the others are one more
PALETTE = ("#1b6ca8", "#e08e1b", "#3f8f5b", "#b5473c", "#7a5aa6", "#7f5b3a", "#d177a8", "#c4c7cc")
SLOWER = PALETTE[3]
OTHERS = "everything else"
DPI = 150


def draw_time_split(splits: dict[str, TimeSplit], path: Path) -> list[Path]:
    if not splits:
        return []
    shown = _largest_categories(splits)
    figure = Figure(figsize=(9, 1.2 + 1.5 * len(splits)), layout="constrained")
    for i, (title, by_variant) in enumerate(splits.items()):
        axes = figure.add_subplot(len(splits), 1, i + 1)
        _stack_categories(axes, by_variant, shown)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("seconds")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return [_save(figure, path)]


def _largest_categories(splits: dict[str, TimeSplit]) -> list[str]:
    """The categories with the largest share of the slowest variant's time, over all subplots."""
    shares: dict[str, float] = {}
    for by_variant in splits.values():
        slowest = max(sum(categories.values()) for categories in by_variant.values())
        for categories in by_variant.values():
            for category, seconds in categories.items():
                shares[category] = shares.get(category, 0.0) + seconds / slowest
    return sorted(shares, key=lambda category: -shares[category])[:MAX_CATEGORIES]


def _stack_categories(axes: Axes, by_variant: TimeSplit, shown: list[str]) -> None:
    variants = list(by_variant)[::-1]  # matplotlib draws the first one at the bottom
    left = np.zeros(len(variants))
    colours = (*PALETTE[: len(shown)], PALETTE[-1])
    for category, colour in zip([*shown, OTHERS], colours, strict=True):
        widths = []
        for variant in variants:
            seconds = by_variant[variant]
            if category == OTHERS:
                widths.append(sum(s for name, s in seconds.items() if name not in shown))
            else:
                widths.append(seconds.get(category, 0.0))
        axes.barh(variants, widths, left=left, color=colour, label=category, height=0.6)
        left += np.array(widths)
    _remove_frame(axes)


def draw_waterfall(falls: dict[str, list[tuple[str, float]]], path: Path) -> list[Path]:
    if not falls:
        return []
    num_columns, num_rows = min(2, len(falls)), -(-len(falls) // 2)
    figure = Figure(figsize=(4.8 * num_columns, 3.4 * num_rows), layout="constrained")
    for i, (title, steps) in enumerate(falls.items()):
        axes = figure.add_subplot(num_rows, num_columns, i + 1)
        values = [ratio for _, ratio in steps]
        before = 0.0
        for x, value in enumerate(values):
            colour = FAST if value >= before else SLOWER
            bottom, top = min(before, value), max(before, value)
            axes.bar(x, abs(value - before), bottom=bottom, color=colour if x else PLAIN, width=0.7)
            axes.annotate(f"{value:.2f}x", (x, top), ha="center", va="bottom", fontsize=8)
            before = value
        axes.set_xticks(range(len(steps)), [fill(name, 12) for name, _ in steps], fontsize=8)
        axes.set_ylim(0, max(values) * 1.15)
        axes.set_ylabel("times as fast as plain")
        axes.set_title(title, loc="left", fontsize=10)
        _remove_frame(axes)
    return [_save(figure, path)]


def draw_memory(bars: dict[str, tuple[float, float]], path: Path) -> list[Path]:
    """Bars of plain and fast by what was run; in MiB where all are below 1 GiB."""
    if not bars:
        return []
    in_mib = all(max(pair) < 1 for pair in bars.values())
    figure = Figure(figsize=(2.2 + 2.2 * len(bars), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, colour) in enumerate((("plain", PLAIN), ("fast", FAST))):
        x = np.arange(len(bars)) + (i - 0.5) * 0.38
        heights = [pair[i] * (1024 if in_mib else 1) for pair in bars.values()]
        drawn = axes.bar(x, heights, width=0.36, color=colour, label=name)
        axes.bar_label(drawn, fmt="%.0f" if in_mib else "%.2f", fontsize=8)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("MiB" if in_mib else "GiB")
    axes.legend(frameon=False)
    _remove_frame(axes)
    return [_save(figure, path)]


def draw_scaling(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One plot for weak and one for strong scaling, if at least two numbers of ranks ran."""
    paths = []
    for kind in ("weak", "strong"):
        lines = scaling_lines(rows, kind)
        if lines:
            paths.append(_draw_scaling(lines, kind, folder / f"scaling-{kind}.png"))
    return paths


def _draw_scaling(lines: dict[str, list[dict[str, Any]]], kind: str, path: Path) -> Path:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, efficiency = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    ticks: set[int] = set()
    for i, (name, rows) in enumerate(lines.items()):
        colour = PALETTE[i % len(PALETTE)]
        ranks = [row["ranks"] for row in rows]
        speeds = [row["real_tokens_per_second"] for row in rows]
        ideal = [speeds[0] * n / ranks[0] for n in ranks]
        percentages = [100 * row["efficiency"] for row in rows]
        speed.plot(ranks, speeds, "o-", color=colour, label=name)
        speed.plot(ranks, ideal, "--", color=colour, linewidth=0.8, alpha=0.6)
        efficiency.plot(ranks, percentages, "o-", color=colour, label=name)
        ticks.update(ranks)
    for axes in (speed, efficiency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(ticks), [str(n) for n in sorted(ticks)])
        axes.set_xlabel("ranks")
        axes.set_ylim(bottom=0)
        _remove_frame(axes)
    speed.plot([], [], "--", color=IDEAL, linewidth=0.8, label="in proportion to the ranks")
    speed.set_ylabel("real tokens/s, all ranks")
    efficiency.set_ylabel("efficiency, %")
    speed.legend(frameon=False, fontsize=8)
    figure.suptitle(f"{kind} scaling", x=0.02, ha="left", fontsize=10)
    return _save(figure, path)


def draw_node_memory(bars: dict[str, float], path: Path) -> list[Path]:
    if not bars:
        return []
    figure = Figure(figsize=(2 + 0.9 * len(bars), 3.6), layout="constrained")
    axes = figure.add_subplot()
    drawn = axes.bar(list(bars), list(bars.values()), color=FAST, width=0.6)
    axes.bar_label(drawn, fmt="%.2f", fontsize=8)
    axes.set_ylabel("GiB, rank that holds most")
    axes.tick_params(axis="x", labelsize=8)
    _remove_frame(axes)
    return [_save(figure, path)]


def draw_budgets(budgets: dict[str, Any], path: Path) -> list[Path]:
    """Speed and peak memory of the fast variant by the number of tokens of a step."""
    points = budget_points(budgets)
    if len(points) < 2:
        return []
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for i, label in enumerate(("real tokens/s", "peak memory, GiB"), start=1):
        axes = figure.add_subplot(1, 2, i)
        axes.plot([p[0] for p in points], [p[i] for p in points], "o-", color=FAST)
        axes.set_xlabel("tokens of a step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _remove_frame(axes)
    return [_save(figure, path)]


def _remove_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
