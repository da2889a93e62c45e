"""Bin packing: how a step's questions are divided over ranks and micro-batches."""

from itertools import chain, combinations

from hypothesis import example, given
from hypothesis import strategies as st

from vico.data.bin_packing import best_fill, first_fit, greedy_balance

SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(SIZES, st.integers(1, 9))
def test_greedy_balance(sizes: list[int], num_bins: int) -> None:
    bins = greedy_balance(sizes, num_bins)
    assert sorted(chain.from_iterable(bins)) == list(range(len(sizes)))
    counts = [len(b) for b in bins]
    assert len(bins) == num_bins and max(counts) - min(counts) <= 1


@given(SIZES, st.integers(1, 2000))
@example([6, 4], 10)  # a bin may be full
def test_first_fit(sizes: list[int], budget: int) -> None:
    """A bin above the budget holds one item, which is too large; no two bins fit into one."""
    bins = first_fit(sizes, budget)
    assert sorted(chain.from_iterable(bins)) == list(range(len(sizes)))
    loads = []
    for items in bins:
        loads.append(sum(sizes[i] for i in items))
        assert loads[-1] <= budget or len(items) == 1
    assert all(one + other > budget for one, other in combinations(loads, 2))


FEW_SIZES = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@given(FEW_SIZES, st.integers(1, 4), st.none() | st.integers(20, 150))
@example([7, 20, 10, 8, 9, 5], 3, 32)  # 20 + 7 + 5, though 27 is 10 + 9 + 8 first
def test_best_fill(sizes: list[int], max_items: int, budget: int | None) -> None:
    chosen = best_fill(sizes, max_items, budget)
    assert len(set(chosen)) == len(chosen) and 1 <= len(chosen) <= max_items
    totals: list[int] = []
    for count in range(1, max_items + 1):
        totals += [sum(subset) for subset in combinations(sizes, count)]
    fits = [total for total in totals if budget is None or total <= budget]
    if budget is None or max(sizes) <= budget:
        assert sum(sizes[i] for i in chosen) == max(fits)
    else:
        assert [sizes[i] for i in chosen] == [max(sizes)], "a question that is too long is alone"


def test_packing_is_the_same_each_time() -> None:
    """Which of equal fills is taken is part of a run: its order of questions is repeated."""
    assert best_fill([5, 3, 4, 6], 2, 9) == [0, 2], "not 6 + 3, found later"
    assert best_fill([2, 2, 4, 3, 1], 3, 8) == [2, 0, 1], "not 4 + 3 + 1, found later"
    assert best_fill([4, 4, 4], 2, 8) == [0, 1] and best_fill([1, 9, 2], 2, None) == [1, 2]
    assert best_fill([7, 3, 5], 2, 6) == [0] and best_fill([6, 3, 5], 2, 6) == [0]
    assert first_fit([3, 6, 2, 5, 1], 7) == [[1, 4], [3, 2], [0]]
    assert greedy_balance([3, 6, 2, 5, 1], 2) == [[1, 2, 4], [0, 3]]
