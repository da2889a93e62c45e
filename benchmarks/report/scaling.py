"""Scaling over ranks: efficiency, and whether all cases computed the same losses."""

from collections import defaultdict
from typing import Any

from benchmarks.measure.spreads import UNKNOWN, median_of

CASE_NAMES = ("size", "stage", "ranks", "scaling")

Case = dict[str, Any]


def disagreements(cases: list[Case], bound: float) -> list[dict[str, Any]]:
    """Cases whose losses differ from those of the first case with the same model and samples."""
    first: dict[tuple[Any, ...], Case] = {}
    found = []
    for case in cases:
        if "losses" not in case:
            continue
        samples = (case["questions_per_step"], *case.get("captions", ()))
        other = first.setdefault((case["size"], *samples), case)
        pairs = _loss_pairs(case, other)
        # Written so that NaN differs, too.
        if all(abs(a - b) <= bound * abs(b) for a, b in pairs):
            continue
        relative = max(abs(a - b) / abs(b) for a, b in pairs)
        found.append({"relative": relative, "bound": bound, "cases": [_name(case), _name(other)]})
    return found


def _name(case: Case) -> dict[str, Any]:
    return {name: case[name] for name in CASE_NAMES}


def _loss_pairs(case: Case, other: Case) -> list[tuple[float, float]]:
    pairs: list[tuple[float, float]] = []
    for losses, other_losses in zip(case["losses"], other["losses"], strict=True):
        pairs += zip(losses, other_losses, strict=True)
    return pairs


def scaling(cases: list[Case]) -> list[dict[str, Any]]:
    """Tokens per second by number of ranks, and their efficiency.

    Efficiency is the speed of n ranks divided by n/m times the speed of m ranks, where m is the
    smallest number measured; "n/a" where only one number was measured.
    """
    groups: dict[tuple[Any, ...], list[Case]] = defaultdict(list)
    for case in cases:
        if "figures" in case:
            groups[case["size"], case["stage"], case["scaling"]].append(case)
    rows = []
    for (size, stage, kind), members in groups.items():
        members.sort(key=lambda case: case["ranks"])
        base = members[0]
        for case in members:
            efficiency: float | str = UNKNOWN
            if len(members) > 1:
                efficiency = _speed(case) / _speed(base) * base["ranks"] / case["ranks"]
            rows.append(
                {
                    "size": size,
                    "stage": stage,
                    "scaling": kind,
                    "ranks": case["ranks"],
                    "real_tokens_per_second": _speed(case),
                    "efficiency": efficiency,
                    "against_ranks": base["ranks"],
                }
            )
    return rows


def _speed(case: Case) -> float:
    return median_of(case["figures"]["real_tokens_per_second"]) or 0.0
