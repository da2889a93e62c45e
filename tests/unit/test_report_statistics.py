"""Intervals and tests of the report, against sums over whole distributions and known values."""

import math
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vico.report.results import Difference
from vico.report.sections import sentence
from vico.report.statistics import (
    Z_95,
    Paired,
    Share,
    bucket_means,
    confusion,
    mcnemar,
    pair,
    share,
    wilson,
)


@pytest.mark.parametrize(
    "right, n, low, high",
    [  # Newcombe (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_as_published(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_solves_its_equation(counts: tuple[int, int]) -> None:
    """Each end p is z standard errors from the observed share, with the error that p would have."""
    right, n = counts
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    for end in (low, high):
        error = Z_95 * math.sqrt(end * (1 - end) / n)
        assert abs(right / n - end) == pytest.approx(error, abs=1e-6)
    mirrored = wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("right, n", [(0, 0), (3, 2), (-1, 4)])
def test_wilson_refuses_impossible_counts(right: int, n: int) -> None:
    with pytest.raises(ValueError):
        wilson(right, n)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_sums_what_is_as_unlikely(first: int, second: int) -> None:
    """The probability of all splits of fair coins that are at least as uneven."""
    n, uneven = first + second, abs(first - second)
    likely = [Fraction(math.comb(n, k), 2**n) for k in range(n + 1) if abs(n - 2 * k) >= uneven]
    assert mcnemar(first, second) == pytest.approx(float(sum(likely)), rel=1e-12)
    assert mcnemar(first, second) == mcnemar(second, first)


def test_mcnemar_known_values() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(0, 5) == 0.0625
    assert mcnemar(1, 9) == pytest.approx(22 / 1024)
    assert 0 <= mcnemar(0, 100_000) < 1e-300
    with pytest.raises(ValueError):
        mcnemar(-1, 2)


def test_pairs() -> None:
    paired = pair([True, True, False, False, True], [True, False, True, False, False])
    assert paired == Paired(both=1, only_first=2, only_second=1, neither=1)
    assert (paired.n, paired.difference, paired.p_value) == (5, pytest.approx(-0.2), 1)
    with pytest.raises(ValueError):
        pair([True], [])
    assert share([True, False, True, True]) == Share(3, 4)


def test_confusion_is_by_right_and_given_answer() -> None:
    assert confusion([(0, 2), (0, 2), (1, 1), (2, 0)]) == [[0, 0, 2], [0, 1, 0], [1, 0, 0]]
    assert confusion([]) == []


@given(st.lists(st.floats(-1e6, 1e6), max_size=200), st.integers(1, 40))
def test_bucket_means(values: list[float], max_points: int) -> None:
    """They keep the last x, the sum and the bound on the number of points."""
    points = [(float(x), y) for x, y in enumerate(values)]
    means, size = bucket_means(points, max_points)
    assert len(means) <= max_points
    assert [x for x, _ in means][-1:] == [x for x, _ in points][-1:]
    total = sum(y * min(size, len(points) - i * size) for i, (_, y) in enumerate(means))
    assert total == pytest.approx(sum(values), abs=1e-3)


def test_which_run_is_better() -> None:
    """The better run is named first, whichever is given first; none where both are equal."""
    runs: Any = [SimpleNamespace(name="A"), SimpleNamespace(name="B")]
    tail = "(10 questions of both, McNemar's exact test: p = 0.375)."
    one_better = sentence(Difference(0, 1, "all", Paired(3, 1, 4, 2)), runs, "val")
    assert one_better == f"val: B is 30.0 points above A {tail}"
    other = sentence(Difference(0, 1, "all", Paired(3, 4, 1, 2)), runs, "val")
    assert other == f"val: A is 30.0 points above B {tail}"
    same = sentence(Difference(1, 0, "all", Paired(3, 1, 1, 2)), runs, "val")
    assert same.startswith("val: B and A have the same accuracy (7 questions of both, ")
