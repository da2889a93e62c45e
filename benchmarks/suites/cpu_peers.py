"""The peers of the `cpu` suite: they train and score in the rounds of plain and fast.

The best tuned peer pads groups of sequences of like length, runs its head at the targets and uses
ViCo's products, so that what is left of a ratio is ViCo's own. Packing without a kernel that skips
other sequences' keys is slower on a CPU.
"""

from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from typing import Any

from benchmarks.baseline.models import gates_at_zero, take_gradients
from benchmarks.baseline.peers import LETTERS, HfModel, Peer, PeerKind, PeerScoring, Score
from benchmarks.baseline.variants import Packed
from benchmarks.measure.clocks import cpu_seconds
from benchmarks.measure.spreads import ratio_spread
from benchmarks.measure.workload import ScoringWork, TrainingWork
from benchmarks.suites.cpu_rounds import (
    CPU,
    GRADIENT_RTOL,
    LOSS_RTOL,
    SCORE_ATOL,
    Seconds,
    or_infinity,
)

KINDS = (
    PeerKind("HF + PEFT LoRA, padded to the longest, SDPA", "LoRA", "longest"),
    PeerKind("HF + PEFT LoRA, tuned", "LoRA", "sorted", own_products=True),
    PeerKind("HF + PEFT AdaptionPrompt, tuned", "AdaptionPrompt", "sorted", own_products=True),
)
SCORING_KIND = 1  # whose model scores


class CpuPeers:
    """Peers over the weights of `fast`."""

    def __init__(self, fast: Packed) -> None:
        self._fast = fast
        self._peers = [Peer(kind, HfModel(fast.model, kind), CPU) for kind in KINDS]
        self._scoring = PeerScoring(self._peers[SCORING_KIND].model, CPU).ways()
        self.seconds: Seconds = defaultdict(lambda: defaultdict(list))

    def differences(self, training: TrainingWork, scoring: ScoringWork) -> dict[str, float]:
        """The largest distances of any peer to fast with its gates at 0; also warms up.

        The letters' logits are one of four tokens' and cannot be compared.
        """
        with gates_at_zero(self._fast.model):
            losses = self._fast.train(training)
            gradients = take_gradients(self._fast.model)
            scores = self._fast.score(scoring)
        loss = gradient = 0.0
        exact = gradients["visual_proj.weight"]
        for peer in self._peers:
            for a, b in zip(peer.train(training), losses, strict=True):
                loss = max(loss, or_infinity(abs(a - b) / abs(b)))
            mine = take_gradients(peer.model)["visual_proj"]
            largest = (mine - exact).abs().max() / exact.abs().max()
            gradient = max(gradient, or_infinity(float(largest)))
        score = 0.0
        for name, way in self._scoring.items():
            distance = or_infinity(float((way(scoring) - scores).abs().max()))
            score = score if name == LETTERS else max(score, distance)
        return {"loss_relative": loss, "gradient_relative": gradient, "score_absolute": score}

    def run_round(
        self, works: Mapping[str, TrainingWork], scoring: ScoringWork, index: int
    ) -> None:
        """Every peer in turn; every other round in reverse order."""
        step = 1 if index % 2 == 0 else -1
        for what, training in works.items():
            for peer in self._peers[::step]:
                seconds, _ = cpu_seconds(partial(peer.train, training))
                self.seconds[what][peer.name].append(seconds)
                take_gradients(peer.model)
        ways: list[tuple[str, Score]] = list(self._scoring.items())
        for name, way in ways[::step]:
            seconds, _ = cpu_seconds(partial(way, scoring))
            self.seconds["score"][name].append(seconds)

    def ratios(self, fast_seconds: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
        """By what was run and peer: the peer's time over that of fast, within each round."""
        out: dict[str, dict[str, Any]] = {}
        for what, by_peer in self.seconds.items():
            out[what] = {}
            for name, seconds in by_peer.items():
                out[what][name] = ratio_spread(seconds, fast_seconds[what])
        return out


def is_equal(differences: Mapping[str, float]) -> bool:
    """Whether the differences are no larger than rounding."""
    return (
        differences["loss_relative"] <= LOSS_RTOL
        and differences["gradient_relative"] <= GRADIENT_RTOL
        and differences["score_absolute"] <= SCORE_ATOL
    )


def best(ratios: Mapping[str, Any]) -> dict[str, Any]:
    """The fastest peer: its name and its ratio."""
    name = min(ratios, key=lambda peer: ratios[peer]["median"])
    return {"peer": name, **ratios[name]}
