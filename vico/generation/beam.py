"""Beam search as transformers (5.x) defines it: the same candidates, scores and stopping."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vico.generation.search import Hypothesis
from vico.generation.settings import GenerationSettings


@dataclass(slots=True)
class _Beam:
    """A hypothesis and its score.

    Of a running one that is the sum of its log-probabilities; of a finished one it is divided by
    length ** length_penalty.
    """

    score: float
    hypothesis: Hypothesis


@dataclass(slots=True)
class _Candidate:
    """A beam with one token more."""

    beam: _Beam
    row: int  # which of the prompt's running beams it continues
    ends: bool  # by EOS, or at max_new_tokens


@dataclass(slots=True)
class _Beams:
    """The state of one prompt; the best first in both lists."""

    running: list[_Beam] = field(default_factory=lambda: [_Beam(0.0, Hypothesis())])
    finished: list[_Beam] = field(default_factory=list)


class BeamSearch:
    """`num_beams` running hypotheses per prompt, and as many finished ones at most."""

    def __init__(self, num_prompts: int, settings: GenerationSettings, eos: int) -> None:
        self._settings, self._eos = settings, eos
        self._all = [_Beams() for _ in range(num_prompts)]
        self._open = list(self._all)  # whose running beams are the rows, in this order

    def advance(self, log_probabilities_BW: Tensor) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        parents: list[int] = []
        still_open = []
        first = 0
        for beams in self._open:
            stop = first + len(beams.running)
            candidates = self._candidates(beams, log_probabilities_BW[first:stop])
            self._finish(beams, candidates)
            going_on = [c for c in candidates if not c.ends][: self._settings.num_beams]
            beams.running = [candidate.beam for candidate in going_on]
            if beams.running and self._may_improve(beams):
                still_open.append(beams)
                ids += [beam.hypothesis.token_ids[-1] for beam in beams.running]
                parents += [first + candidate.row for candidate in going_on]
            first = stop
        self._open = still_open
        return ids, parents

    def _candidates(self, beams: _Beams, log_probabilities_nW: Tensor) -> list[_Candidate]:
        """The best continuations of a prompt's beams.

        Twice as many as beams: as many go on even if the best of each beam is EOS.
        """
        scores = [beam.score for beam in beams.running]
        scores_n1 = torch.tensor(scores, device=log_probabilities_nW.device)[:, None]
        sums = (scores_n1 + log_probabilities_nW).flatten()
        best, places = sums.topk(min(2 * self._settings.num_beams, len(sums)))
        chosen = log_probabilities_nW.flatten()[places].tolist()
        candidates = []
        for score, place, log_probability in zip(
            best.tolist(), places.tolist(), chosen, strict=True
        ):
            row, token = divmod(place, log_probabilities_nW.shape[1])
            before = beams.running[row].hypothesis
            hypothesis = Hypothesis(
                [*before.token_ids, token], [*before.log_probabilities, log_probability]
            )
            is_full = len(hypothesis.token_ids) == self._settings.max_new_tokens
            ends = token == self._eos or is_full
            candidates.append(_Candidate(_Beam(score, hypothesis), row, ends))
        return candidates

    def _finish(self, beams: _Beams, candidates: list[_Candidate]) -> None:
        """Those that end become finished, if they are among the best `num_beams` candidates."""
        num_beams = self._settings.num_beams
        for candidate in candidates[:num_beams]:
            if candidate.ends:
                beam = candidate.beam
                length = len(beam.hypothesis.token_ids)
                score = beam.score / length**self._settings.length_penalty
                beams.finished.append(_Beam(score, beam.hypothesis))
        beams.finished.sort(key=lambda beam: -beam.score)
        del beams.finished[num_beams:]

    def _may_improve(self, beams: _Beams) -> bool:
        """Whether a running beam may become better than a finished one, as far as one can guess."""
        settings, best = self._settings, beams.running[0]
        if len(beams.finished) < settings.num_beams:
            return True
        if settings.early_stopping is True:
            return False
        length = len(best.hypothesis.token_ids)
        if settings.early_stopping == "never" and settings.length_penalty > 0:
            length = settings.max_new_tokens
        return best.score / length**settings.length_penalty > beams.finished[-1].score

    def results(self) -> list[Hypothesis]:
        return [beams.finished[0].hypothesis for beams in self._all]
