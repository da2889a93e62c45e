"""Medians and percentiles of repeated measurements."""

from collections.abc import Sequence
from typing import Any

import numpy as np

UNKNOWN = "n/a"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and the number of values."""
    p10, median, p90 = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90), "rounds": len(values)}


def ratio_spread(numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, float]:
    """The spread of the ratios within each round: what slows down a whole round cancels."""
    return spread([a / b for a, b in zip(numerators, denominators, strict=True)])


def median_of(metric: Any) -> float | None:
    """The median of a spread, or None for "n/a"."""
    return float(metric["median"]) if isinstance(metric, dict) else None
