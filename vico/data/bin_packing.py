"""How a step's sequences are divided: over the ranks, into micro-batches, under a token budget.

All three functions are greedy heuristics over sizes, deterministic, and return positions in
`sizes`.
"""

from collections.abc import Sequence


def greedy_balance(sizes: Sequence[int], num_bins: int) -> list[list[int]]:
    """Divide the items over bins of about equal total size; counts differ by at most one.

    The longest-processing-time rule (Graham 1969): largest item first, each onto the lightest bin
    that has room. The positions in a bin are ascending.
    """
    min_count, num_larger_bins = divmod(len(sizes), num_bins)
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for item in _largest_first(sizes):
        larger_bins_filled = sum(len(members) > min_count for members in bins)
        capacity = min_count + 1 if larger_bins_filled < num_larger_bins else min_count
        open_bins = [b for b in range(num_bins) if len(bins[b]) < capacity]
        lightest = min(open_bins, key=lambda b: loads[b])
        bins[lightest].append(item)
        loads[lightest] += sizes[item]
    return [sorted(members) for members in bins]


def first_fit(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Divide the items over as many bins as needed, each of at most `budget` in total.

    First-fit decreasing: largest item first, each into the first bin where it fits. An item above
    the budget gets a bin of its own.
    """
    bins: list[list[int]] = []
    loads: list[int] = []
    for item in _largest_first(sizes):
        fitting = [b for b, load in enumerate(loads) if load + sizes[item] <= budget]
        if fitting:
            bins[fitting[0]].append(item)
            loads[fitting[0]] += sizes[item]
        else:
            bins.append([item])
            loads.append(sizes[item])
    return bins


def best_fill(sizes: Sequence[int], max_items: int, budget: int | None) -> list[int]:
    """At most `max_items` items whose total comes as close to `budget` as it may.

    Without a budget, the largest items. If the largest item exceeds the budget, it alone.
    Otherwise a subset sum by dynamic programming: `subset_of` keeps one subset per total, of the
    fewest items. So a total that `max_items` items can reach is always found.
    """
    by_size = _largest_first(sizes)
    if budget is None:
        return by_size[:max_items]
    largest = by_size[0]
    if sizes[largest] > budget:
        return [largest]
    subset_of: dict[int, tuple[int, ...]] = {0: ()}  # total -> items with this total
    for item in by_size:
        for total, subset in list(subset_of.items()):
            new_total = total + sizes[item]
            if new_total > budget or len(subset) == max_items:
                continue
            known = subset_of.get(new_total)
            if known is None or len(subset) + 1 < len(known):
                subset_of[new_total] = (*subset, item)
    best_total = max(subset_of)
    return list(subset_of[best_total])


def _largest_first(sizes: Sequence[int]) -> list[int]:
    """Positions by falling size; the earlier one first where sizes are equal."""
    return sorted(range(len(sizes)), key=lambda i: -sizes[i])
