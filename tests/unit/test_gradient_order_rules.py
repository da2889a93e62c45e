"""The order of gradients: how two lists are compared, and until when."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vico.train.gradient_order import GradientOrder, _disagreement, _first_difference


@pytest.mark.parametrize(
    ("names", "expected", "place", "said"),
    [
        ("abc", "abd", 2, "c against d"),
        ("ba", "ab", 0, "b against a"),
        ("ab", "abc", 2, "none against c"),
        ("abc", "ab", 2, "c against none"),
        ("", "a", 0, "none against a"),
    ],
)
def test_where_two_orders_differ_first(names: str, expected: str, place: int, said: str) -> None:
    assert _first_difference([*names], [*expected]) == (place, said)
    with pytest.raises(ValueError, match="the lists are the same"):
        _first_difference([*names], [*names])


def test_the_ranks_that_differ_are_named() -> None:
    """With the host of the first of them, which is compared with rank 0."""
    reports = [("h0", ["a", "b"]), ("h0", ["a", "b"]), ("h1", ["a", "c"]), ("h2", ["x"])]
    error = _disagreement(reports)
    assert error.of_all_ranks
    assert str(error) == (
        "the ranks' gradients arrive in different orders, so sums over ranks would mix "
        "parameters: rank(s) 2, 3 (the first on h1) against rank 0; first at number 2: c against "
        "b; nothing of this start is saved; use equal GPUs and the same environment on all hosts, "
        "or VICO_GRAPHS=off"
    )


class World:
    """Two ranks that always agree; counts what they exchange."""

    size = 2

    def __init__(self) -> None:
        self.exchanged: list[int] = []

    def gather(self, values: Any) -> Any:
        self.exchanged.append(int(values))
        return torch.stack([values, values])


def test_eleven_checks_are_made() -> None:
    """Of the dry run and ten steps, each of what has arrived since the last; then no hook is left.

    The digests of one order are equal, and those of another are not.
    """
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    order, world = GradientOrder({"first": first, "second": second}), World()
    for number in range(13):
        for parameter in (second, first) if number == 5 else (first, second):
            parameter.sum().backward()  # type: ignore[no-untyped-call]
        assert bool(first._backward_hooks) == (number < 11)
        order.check(world)  # type: ignore[arg-type]
    assert len(world.exchanged) == 11 and len({*world.exchanged}) == 2
    assert world.exchanged[5] != world.exchanged[4] == world.exchanged[6]
    assert all(0 <= digest < 2**56 for digest in world.exchanged)


def test_one_rank_has_nobody_to_compare_with() -> None:
    order = GradientOrder({"first": nn.Parameter(torch.ones(1))})
    world: Any = SimpleNamespace(size=1, gather=lambda values: values[None])
    order.check(world)
    order.check(SimpleNamespace(size=1))  # type: ignore[arg-type]
    assert order._checks_left == 0
