"""How the next tokens of some sequences are chosen from the model's probabilities."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from vico.generation.settings import GenerationSettings


@dataclass(slots=True)
class Hypothesis:
    """The tokens of one sequence so far, and the log-probability of each."""

    token_ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)


class Search(Protocol):
    """Decides for all sequences of a batch, a token at a time."""

    def advance(self, log_probabilities_BW: Tensor) -> tuple[list[int], list[int]]:
        """(next tokens, the row that each continues); both empty once all sequences have ended.

        `log_probabilities_BW`: one row for each token of the last call, at first for each prompt.
        """
        ...

    def results(self) -> list[Hypothesis]:
        """One for each prompt."""
        ...


class TokenByToken:
    """Each sequence goes on with its likeliest token, or with one that is drawn."""

    def __init__(
        self,
        keys: list[int],
        settings: GenerationSettings,
        eos: int,
        decode: Callable[[list[int]], str],
    ) -> None:
        """`keys`: of each sequence; with the seed they determine what is drawn for it."""
        self._settings, self._eos, self._decode = settings, eos, decode
        self._hypotheses = [Hypothesis() for _ in keys]
        self._generators = [np.random.default_rng([settings.seed, key]) for key in keys]
        self._running = list(range(len(keys)))  # the sequence of each row

    def advance(self, log_probabilities_BW: Tensor) -> tuple[list[int], list[int]]:
        ids_B = self._choose(log_probabilities_BW)
        chosen_B = log_probabilities_BW.gather(1, ids_B[:, None]).squeeze(1)
        ids, parents, running = [], [], []
        pairs = zip(ids_B.tolist(), chosen_B.tolist(), strict=True)
        for row, (token, log_probability) in enumerate(pairs):
            sequence = self._running[row]
            hypothesis = self._hypotheses[sequence]
            hypothesis.token_ids.append(token)
            hypothesis.log_probabilities.append(log_probability)
            if token != self._eos and not self._has_ended(hypothesis.token_ids):
                ids.append(token)
                parents.append(row)
                running.append(sequence)
        self._running = running
        return ids, parents

    def _has_ended(self, ids: list[int]) -> bool:
        if len(ids) == self._settings.max_new_tokens:
            return True
        return bool(self._settings.stop) and self._settings.has_stopped(self._decode(ids))

    def _choose(self, log_probabilities_BW: Tensor) -> Tensor:
        temperature, top_p = self._settings.temperature, self._settings.top_p
        if temperature is None:
            return log_probabilities_BW.argmax(dim=1)
        draws = [self._generators[sequence].random() for sequence in self._running]
        draws_B1 = torch.tensor(draws, dtype=torch.float64, device=log_probabilities_BW.device)
        # In double precision: a draw must not depend on how sums are rounded in another batch.
        probabilities_BW = (log_probabilities_BW.double() / temperature).softmax(dim=1)
        if top_p < 1:
            probabilities_BW = _likeliest(probabilities_BW, top_p)
        sums_BW = probabilities_BW.cumsum(dim=1)
        # The first token whose sum is above the draw; so one of probability 0 is never taken.
        ids_B1 = torch.searchsorted(sums_BW, draws_B1[:, None] * sums_BW[:, -1:], right=True)
        last_B = (probabilities_BW > 0).long().cumsum(dim=1).argmax(dim=1)
        return torch.minimum(ids_B1.squeeze(1), last_B)

    def results(self) -> list[Hypothesis]:
        return self._hypotheses


def _likeliest(probabilities_BW: Tensor, top_p: float) -> Tensor:
    """With 0 for all but the fewest tokens that together have `top_p` (Holtzman et al. 2020)."""
    sorted_BW, order_BW = probabilities_BW.sort(dim=1, descending=True, stable=True)
    before_BW = sorted_BW.cumsum(dim=1) - sorted_BW
    kept_BW = torch.where(before_BW < top_p, sorted_BW, 0.0)
    return torch.zeros_like(probabilities_BW).scatter_(1, order_BW, kept_BW)
