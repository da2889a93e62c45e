"""What of a record can be drawn."""

from collections.abc import Sequence
from typing import Any

from benchmarks.measure.spreads import median_of, ratio_spread

STEPS = {
    "train": "training step",
    "train_both": "training step",
    "train_vqa": "questions alone",
    "train_cap": "captions alone",
    "train_both_long": "training step, longer captions",
    "train_long": "training step, longer captions",
    "score": "scoring step",
}
Record = dict[str, Any]
TimeSplit = dict[str, dict[str, float]]  # seconds by variant and category


def time_splits(record: Record) -> dict[str, TimeSplit]:
    """Time splits by title ("wide, training step")."""
    sources = {"": record.get("time_split")}
    if "geometries" in record:
        sources = {f"{name}, ": g.get("time_split") for name, g in record["geometries"].items()}
    splits = {}
    for prefix, by_variant in sources.items():
        for key, title in STEPS.items():
            if by_variant and all(key in split for split in by_variant.values()):
                of_step = {variant: split[key] for variant, split in by_variant.items()}
                splits[f"{prefix}{title}"] = of_step
    return splits


def waterfalls(record: Record) -> dict[str, list[tuple[str, float]]]:
    """By title: each variant with its speed relative to plain, a median over rounds.

    The variants build on each other, in the order of the record.
    """
    falls = {}
    for name, measured in record.get("geometries", {}).items():
        for key, title in (("train", "training"), ("score", "scoring")):
            seconds = measured.get("cpu_seconds", {}).get(key, {})
            if len(seconds) <= 2:
                continue
            steps = []
            for variant, times in seconds.items():
                steps.append((variant, ratio_spread(seconds["plain"], times)["median"]))
            falls[f"{name}, {title}"] = steps
    return falls


def memory_bars(record: Record) -> dict[str, tuple[float, float]]:
    """GiB of (plain, fast) by what was run."""
    memory = record.get("memory") or {}
    if "plain" in memory:
        # The cpu suite: growth over a training step, and what autograd saves of it.
        plain, fast = memory["plain"], memory["fast"]
        return {
            "training step, peak growth": (plain["growth_mib"] / 1024, fast["growth_mib"] / 1024),
            "held for backward": (plain["held_mib"] / 1024, fast["held_mib"] / 1024),
        }
    names = {"train": "training step, peak", "score": "scoring step, peak"}
    bars = {}
    for key, by_variant in memory.items():
        plain, fast = by_variant["plain"], by_variant["fast"]
        bars[names[key]] = (plain["allocated_gib"], fast["allocated_gib"])
    return bars


def node_memory(cases: Sequence[Record]) -> dict[str, float]:
    """GiB of the rank with the highest peak, by size, stage and ranks; weak scaling."""
    bars = {}
    for case in cases:
        if "memory" in case and case["scaling"] == "weak":
            label = f"{case['size']}\nZeRO-{case['stage']}\n{case['ranks']} rank(s)"
            bars[label] = case["memory"]["allocated_gib"]
    return bars


def scaling_lines(rows: Sequence[Record], kind: str) -> dict[str, list[Record]]:
    """The rows of weak or strong scaling by size and stage, if several numbers of ranks ran."""
    lines: dict[str, list[Record]] = {}
    for row in rows:
        if row["scaling"] == kind and not isinstance(row["efficiency"], str):
            lines.setdefault(f"{row['size']} ZeRO-{row['stage']}", []).append(row)
    return lines


def budget_points(budgets: Record) -> list[tuple[int, float, float]]:
    """(tokens of a step, real tokens/s, peak memory in GiB) of the fast variant."""
    points = []
    for budget, measured in budgets.items():
        if "figures" in measured:
            speed = median_of(measured["figures"]["real_tokens_per_second"]) or 0.0
            points.append((int(budget), speed, float(measured["memory"]["allocated_gib"])))
    return points
