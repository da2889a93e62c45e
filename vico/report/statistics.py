"""Intervals and tests for counts of right answers. Pure functions, without a library."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054  # of the normal distribution, for intervals of 95 %


@dataclass(frozen=True)
class Share:
    """`right` of `n` questions."""

    right: int
    n: int

    @property
    def value(self) -> float:
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.right, self.n)


@dataclass(frozen=True)
class Paired:
    """Two runs on the same questions. `only_first`: questions that the first alone got right."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def n(self) -> int:
        return self.both + self.only_first + self.only_second + self.neither

    @property
    def difference(self) -> float:
        """Accuracy of the second minus that of the first."""
        return (self.only_second - self.only_first) / self.n

    @property
    def p_value(self) -> float:
        return mcnemar(self.only_first, self.only_second)


def share(is_right: Iterable[bool]) -> Share:
    values = list(is_right)
    return Share(sum(values), len(values))


def pair(first: Sequence[bool], second: Sequence[bool]) -> Paired:
    """`first`, `second`: whether each run answered each of the same questions right."""
    pairs = list(zip(first, second, strict=True))
    orders = ((True, True), (True, False), (False, True), (False, False))
    return Paired(*(pairs.count(order) for order in orders))


def wilson(right: int, n: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share, within 0 to 1.

    Unlike the normal interval it holds for few questions, and for 0 or all of them right.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"{right} of {n}")
    observed, scale = right / n, 1 + z * z / n
    centre = (observed + z * z / (2 * n)) / scale
    half = z * math.sqrt(observed * (1 - observed) / n + z * z / (4 * n * n)) / scale
    low = 0.0 if right == 0 else max(0.0, centre - half)
    high = 1.0 if right == n else min(1.0, centre + half)
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test (1947), by whole numbers.

    Where the two runs are equally good, each question that one of them alone got right is a toss
    of a fair coin.
    """
    if only_first < 0 or only_second < 0:
        raise ValueError(f"{only_first}, {only_second}")
    n, fewer = only_first + only_second, min(only_first, only_second)
    ways = total = 1
    for i in range(fewer):
        ways = ways * (n - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**n)


def confusion(pairs: Iterable[tuple[int, int]]) -> list[list[int]]:
    """[right answer][given answer] -> number of questions, both by position.

    `pairs`: (right answer, given answer).
    """
    known = list(pairs)
    size = 1 + max((max(pair) for pair in known), default=-1)
    table = [[0] * size for _ in range(size)]
    for right, given in known:
        table[right][given] += 1
    return table


def bucket_means(
    points: Sequence[tuple[float, float]], max_points: int
) -> tuple[list[tuple[float, float]], int]:
    """(points, how many of the given ones each is the mean of), at most `max_points` of them.

    The x of a mean is that of its last point.
    """
    size = max(1, math.ceil(len(points) / max_points))
    means = []
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        means.append((bucket[-1][0], sum(y for _, y in bucket) / len(bucket)))
    return means, size
