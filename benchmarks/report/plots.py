"""The report's plots: what of a record can be drawn, and how. Each function gives the files it wrote; none where there is nothing to draw.

Colours mean the same in every plot: plain is grey, fast is blue, a kind of operator keeps its colour.
"""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.measure.metrics import median_of

PLAIN, FAST, IDEAL = "#8a8f98", "#1b6ca8", "#c4c7cc"
KINDS = 7  # of operators that are told apart; the others are one more
PALETTE = ("#1b6ca8", "#e08e1b", "#3f8f5b", "#b5473c", "#7a5aa6", "#7f5b3a", "#d177a8", "#c4c7cc")
REST = "everything else"
DPI = 150
STEPS = {
    "train": "training step",
    "train_vqa": "questions alone",
    "train_cap": "captions alone",
    "score": "scoring step",
}


def time_splits(record: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """By title ("wide, training step"): seconds by variant and kind of operator."""
    sources = {
        f"{name}, ": measured.get("time_split")
        for name, measured in record.get("geometries", {}).items()
    }
    sources[""] = record.get("time_split")
    return {
        f"{prefix}{what}": {variant: split[key] for variant, split in found.items()}
        for prefix, found in sources.items()
        if found
        for key, what in STEPS.items()
        if all(key in split for split in found.values())
    }


def waterfalls(record: dict[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """By title: (variant, how many times as fast as plain: the median over rounds), in the order in which they build on each other."""
    found = {}
    for name, measured in record.get("geometries", {}).items():
        for key, what in (("train", "training"), ("score", "scoring")):
            seconds = measured.get("cpu_seconds", {}).get(key, {})
            if len(seconds) > 2:
                ratios = [
                    (
                        v,
                        float(
                            np.median([a / b for a, b in zip(seconds["plain"], times, strict=True)])
                        ),
                    )
                    for v, times in seconds.items()
                ]
                found[f"{name}, {what}"] = ratios
    return found


def memory_bars(record: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By what was run: GiB of (plain, fast)."""
    memory = record.get("memory") or {}
    if (
        "plain" in memory
    ):  # the cpu suite: growth over a training step, and what autograd holds of it
        gib = {
            v: (memory[v]["growth_mib"] / 1024, memory[v]["held_mib"] / 1024)
            for v in ("plain", "fast")
        }
        return {
            "training step, peak growth": (gib["plain"][0], gib["fast"][0]),
            "held for backward": (gib["plain"][1], gib["fast"][1]),
        }
    names = {"train": "training step, peak", "score": "scoring step, peak"}
    return {
        names[key]: (by["plain"]["allocated_gib"], by["fast"]["allocated_gib"])
        for key, by in memory.items()
    }


def draw_time_split(splits: dict[str, dict[str, dict[str, float]]], path: Path) -> list[Path]:
    if not splits:
        return []
    totals: dict[str, float] = {}
    for by_variant in splits.values():
        for kinds in by_variant.values():
            for kind, seconds in kinds.items():
                totals[kind] = totals.get(kind, 0.0) + seconds / max(
                    sum(k) for k in [[*v.values()] for v in by_variant.values()]
                )
    shown = sorted(totals, key=lambda kind: -totals[kind])[:KINDS]
    figure = Figure(figsize=(9, 1.2 + 1.5 * len(splits)), layout="constrained")
    for i, (title, by_variant) in enumerate(splits.items()):
        axes = figure.add_subplot(len(splits), 1, i + 1)
        _stack(axes, by_variant, shown)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("seconds")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=8)
    return [_save(figure, path)]


def _stack(axes: Axes, by_variant: dict[str, dict[str, float]], shown: list[str]) -> None:
    variants = list(by_variant)[::-1]  # the first one on top
    left = np.zeros(len(variants))
    for kind, colour in zip([*shown, REST], PALETTE[: len(shown)] + PALETTE[-1:], strict=True):
        widths = [
            sum(s for k, s in by_variant[v].items() if k not in shown)
            if kind == REST
            else by_variant[v].get(kind, 0.0)
            for v in variants
        ]
        axes.barh(variants, widths, left=left, color=colour, label=kind, height=0.6)
        left += np.array(widths)
    _plain_frame(axes)


def draw_waterfall(falls: dict[str, list[tuple[str, float]]], path: Path) -> list[Path]:
    if not falls:
        return []
    figure = Figure(
        figsize=(4.8 * min(2, len(falls)), 3.4 * -(-len(falls) // 2)), layout="constrained"
    )
    for i, (title, steps) in enumerate(falls.items()):
        axes = figure.add_subplot(-(-len(falls) // 2), min(2, len(falls)), i + 1)
        values = [ratio for _, ratio in steps]
        for place, value in enumerate(values):
            before = values[place - 1] if place else 0.0
            colour = PLAIN if place == 0 else FAST if value >= before else PALETTE[3]
            axes.bar(place, abs(value - before), bottom=min(before, value), color=colour, width=0.7)
            axes.annotate(
                f"{value:.2f}x", (place, max(before, value)), ha="center", va="bottom", fontsize=8
            )
        axes.set_xticks(range(len(steps)), [fill(name, 12) for name, _ in steps], fontsize=8)
        axes.set_ylim(0, max(values) * 1.15)
        axes.set_ylabel("times as fast as plain")
        axes.set_title(title, loc="left", fontsize=10)
        _plain_frame(axes)
    return [_save(figure, path)]


def draw_memory(bars: dict[str, tuple[float, float]], path: Path) -> list[Path]:
    if not bars:
        return []
    small = max(max(pair) for pair in bars.values()) < 1
    bars = {
        name: (1024 * pair[0], 1024 * pair[1]) if small else pair for name, pair in bars.items()
    }
    figure = Figure(figsize=(2.2 + 2.2 * len(bars), 3.4), layout="constrained")
    axes = figure.add_subplot()
    for offset, (name, colour) in enumerate((("plain", PLAIN), ("fast", FAST))):
        places = np.arange(len(bars)) + (offset - 0.5) * 0.38
        drawn = axes.bar(
            places, [pair[offset] for pair in bars.values()], width=0.36, color=colour, label=name
        )
        axes.bar_label(drawn, fmt="%.0f" if small else "%.2f", fontsize=8)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("MiB" if small else "GiB")
    axes.legend(frameon=False)
    _plain_frame(axes)
    return [_save(figure, path)]


def draw_scaling(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """One figure for weak and one for strong scaling, where there are at least two numbers of ranks."""
    written = []
    for kind in ("weak", "strong"):
        lines: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["scaling"] == kind and not isinstance(row["efficiency"], str):
                lines.setdefault(f"{row['size']} ZeRO-{row['stage']}", []).append(row)
        if not lines:
            continue
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        speed, share = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
        for (name, members), colour in zip(lines.items(), PALETTE * 8, strict=False):
            ranks = [row["ranks"] for row in members]
            speed.plot(
                ranks,
                [row["real_tokens_per_second"] for row in members],
                "o-",
                color=colour,
                label=name,
            )
            ideal = [members[0]["real_tokens_per_second"] * n / ranks[0] for n in ranks]
            speed.plot(ranks, ideal, "--", color=colour, linewidth=0.8, alpha=0.6)
            share.plot(
                ranks, [100 * row["efficiency"] for row in members], "o-", color=colour, label=name
            )
        ticks = sorted({row["ranks"] for members in lines.values() for row in members})
        for axes in (speed, share):
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, [str(n) for n in ticks])
            axes.set_xlabel("ranks")
            axes.set_ylim(bottom=0)
            _plain_frame(axes)
        speed.plot([], [], "--", color=IDEAL, linewidth=0.8, label="in proportion to the ranks")
        speed.set_ylabel("real tokens/s, all ranks")
        share.set_ylabel("efficiency, %")
        speed.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{kind} scaling", x=0.02, ha="left", fontsize=10)
        written.append(_save(figure, folder / f"scaling-{kind}.png"))
    return written


def draw_node_memory(cases: Sequence[dict[str, Any]], path: Path) -> list[Path]:
    """Peak of the rank that holds most, by size, stage and ranks."""
    held = {
        f"{c['size']}\nZeRO-{c['stage']}\n{c['ranks']} rank(s)": c["memory"]["allocated_gib"]
        for c in cases
        if "memory" in c and c["scaling"] == "weak"
    }
    if not held:
        return []
    figure = Figure(figsize=(2 + 0.9 * len(held), 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(
        axes.bar(list(held), list(held.values()), color=FAST, width=0.6), fmt="%.2f", fontsize=8
    )
    axes.set_ylabel("GiB, rank that holds most")
    axes.tick_params(axis="x", labelsize=8)
    _plain_frame(axes)
    return [_save(figure, path)]


def draw_budgets(budgets: dict[str, Any], path: Path) -> list[Path]:
    """The fast variant's speed by tokens of a step."""
    points = [
        (
            int(b),
            median_of(f["figures"]["real_tokens_per_second"]) or 0.0,
            float(f["memory"]["allocated_gib"]),
        )
        for b, f in budgets.items()
        if "figures" in f
    ]
    if len(points) < 2:
        return []
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for i, (column, label) in enumerate(((1, "real tokens/s"), (2, "peak memory, GiB"))):
        axes = figure.add_subplot(1, 2, i + 1)
        axes.plot([p[0] for p in points], [p[column] for p in points], "o-", color=FAST)
        axes.set_xlabel("tokens of a step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        _plain_frame(axes)
    return [_save(figure, path)]


def _plain_frame(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    return path
