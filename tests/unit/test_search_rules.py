"""Searches by tables of probabilities: beams against all texts there are, and how tokens are drawn.

A table has a row of log-probabilities for each beginning of a text.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vico.generation.beam import BeamSearch, _Beam, _Beams
from vico.generation.search import Hypothesis, Search, TokenByToken, _likeliest
from vico.generation.settings import GenerationSettings

EOS, WIDTH, LENGTH = 0, 3, 3
Table = dict[tuple[int, ...], Tensor]


def table_of(seed: int) -> Table:
    generator = torch.Generator().manual_seed(seed)
    rows: Table = {}
    for length in range(LENGTH):
        for begin in itertools.product(range(WIDTH), repeat=length):
            rows[begin] = torch.randn(WIDTH, generator=generator).mul(1.5).log_softmax(dim=0)
    return rows


def drive(search: Search, tables: list[Table]) -> list[Hypothesis]:
    """Goes on until all have ended; each row has the beginning that the search asks for."""
    rows: list[tuple[Table, tuple[int, ...]]] = [(table, ()) for table in tables]
    while rows:
        ids, parents = search.advance(torch.stack([table[begin] for table, begin in rows]))
        assert len(ids) == len(parents)
        rows = [
            (rows[parent][0], (*rows[parent][1], token))
            for token, parent in zip(ids, parents, strict=True)
        ]
    return search.results()


def texts_of(table: Table) -> list[tuple[list[int], list[float]]]:
    """All texts that end by EOS or have LENGTH tokens, with the log-probability of each token."""
    found = []
    for length in range(1, LENGTH + 1):
        for ids in itertools.product(range(WIDTH), repeat=length):
            if EOS not in ids[:-1] and (ids[-1] == EOS or length == LENGTH):
                of_tokens = [float(table[ids[:i]][token]) for i, token in enumerate(ids)]
                found.append((list(ids), of_tokens))
    return found


@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
def test_enough_beams_find_the_best_of_all_texts(length_penalty: float) -> None:
    """Of each prompt by itself, whatever the others do."""
    settings = GenerationSettings(
        LENGTH, num_beams=30, length_penalty=length_penalty, early_stopping="never"
    )
    tables = [table_of(seed) for seed in range(12)]
    found = drive(BeamSearch(len(tables), settings, EOS), tables)
    lengths = set()
    for hypothesis, table in zip(found, tables, strict=True):
        ids, best = max(
            texts_of(table), key=lambda text: sum(text[1]) / len(text[0]) ** length_penalty
        )
        assert hypothesis.token_ids == ids
        assert hypothesis.log_probabilities == pytest.approx(best)
        lengths.add(len(ids))
    assert len(lengths) > 1


def test_a_single_beam_is_greedy() -> None:
    """As token by token; both give the model's own log-probabilities."""
    tables = [table_of(seed) for seed in range(8)]
    settings = GenerationSettings(LENGTH)
    greedy = drive(TokenByToken([0] * 8, settings, EOS, str), tables)
    for hypothesis, table in zip(greedy, tables, strict=True):
        ids = hypothesis.token_ids
        for i, token in enumerate(ids):
            assert token == int(table[tuple(ids[:i])].argmax())
        assert hypothesis.log_probabilities == pytest.approx(
            [float(table[tuple(ids[:i])][token]) for i, token in enumerate(ids)]
        )
        assert ids[-1] == EOS or len(ids) == LENGTH
    assert drive(BeamSearch(8, settings, EOS), tables) == greedy


def beams_of(running: float, length: int, *finished: float) -> _Beams:
    hypothesis = Hypothesis([5] * length, [running / length] * length)
    return _Beams([_Beam(running, hypothesis)], [_Beam(score, Hypothesis()) for score in finished])


@pytest.mark.parametrize(
    ("settings", "beams", "may"),
    [
        ({}, beams_of(-99.0, 2, -1.0), True),  # fewer have ended than there are beams
        ({"early_stopping": True}, beams_of(-1.0, 2, -5.0, -9.0), False),
        ({}, beams_of(-4.0, 2, -1.0, -2.5), True),  # -2 a token, above the worst
        ({}, beams_of(-4.0, 2, -1.0, -2.0), False),  # as good is no better
        ({}, beams_of(-4.0, 2, -1.0, -1.5), False),
        ({"early_stopping": "never"}, beams_of(-4.0, 2, -1.0, -0.75), True),  # -0.5 at 8 tokens
        ({"early_stopping": "never"}, beams_of(-4.0, 2, -0.1, -0.25), False),
        ({"length_penalty": 0.0}, beams_of(-4.0, 2, -1.0, -5.0), True),
        ({"length_penalty": 2.0}, beams_of(-4.0, 2, -0.5, -1.5), True),  # -1
        (
            {"length_penalty": -1.0, "early_stopping": "never"},  # longer is worse: -8 now
            beams_of(-4.0, 2, -1.0, -9.0),
            True,
        ),
    ],
)
def test_when_a_running_beam_may_become_better(
    settings: dict[str, Any], beams: _Beams, may: bool
) -> None:
    search = BeamSearch(1, GenerationSettings(8, num_beams=2, **settings), EOS)
    assert search._may_improve(beams) is may


# ---- drawing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.2, [1]), (0.5, [1]), (0.51, [1, 3]), (0.75, [1, 3]), (0.76, [0, 1, 3])]
)
def test_the_fewest_tokens_that_have_so_much(top_p: float, kept: list[int]) -> None:
    """The others have none; of equal ones the first."""
    probabilities = torch.tensor([[0.125, 0.5, 0.125, 0.25], [0.25] * 4]).double()
    first, equal = _likeliest(probabilities, top_p)
    expected = [p if i in kept else 0.0 for i, p in enumerate(probabilities[0].tolist())]
    assert first.tolist() == expected
    num = math.ceil(top_p / 0.25)
    assert equal.tolist() == [0.25] * num + [0.0] * (4 - num)


class Draw:
    """A generator that always draws this number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def random(self) -> float:
        return self.number


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.2499, 1), (0.2501, 3), (0.7499, 3), (0.7501, 4), (1.0, 4)]
)
def test_the_token_of_a_draw(number: float, token: int) -> None:
    """The first whose sum is above it; one of probability 0 is never taken, also at the ends."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    search = TokenByToken([0], GenerationSettings(temperature=1.0), -1, str)
    search._generators = [Draw(number)]  # type: ignore[list-item]
    ids, parents = search.advance(probabilities.log())
    assert (ids, parents) == ([token], [0])
    (hypothesis,) = search.results()
    assert hypothesis.log_probabilities == [float(probabilities[0, token].log())]


def test_a_temperature_divides_logits() -> None:
    """At one half the odds are squared: 1 to 9 of 1 to 3."""
    search = TokenByToken([0, 1], GenerationSettings(temperature=0.5), -1, str)
    search._generators = [Draw(0.0999), Draw(0.1001)]  # type: ignore[list-item]
    ids, _ = search.advance(torch.tensor([[0.25, 0.75]] * 2).log())
    assert ids == [0, 1]
