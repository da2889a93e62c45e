"""The rounds of the `cpu` suite: every variant trains and scores in turn, and all must agree."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline.models import make_pair, take_gradients, with_vico_products
from benchmarks.baseline.variants import Packed, Plain, Variant, training_batch
from benchmarks.measure.clocks import cpu_seconds
from benchmarks.measure.lengths import MAX_CAP_LEN, MAX_SEQ_LEN
from benchmarks.measure.metrics import WorkCounts, count_packed, count_plain
from benchmarks.measure.workload import ScoringWork, TrainingWork, Workload
from vico.io import log
from vico.model.config import LlamaConfig

CPU = torch.device("cpu")
# fp32 rounding in another order, through 8 layers. Observed: losses 1e-7, scores 2e-6, gradients
# 2e-6 of the largest entry.
LOSS_RTOL, GRADIENT_RTOL, SCORE_ATOL = 1e-5, 1e-4, 1e-5
# Index of the first batch for warming up; rounds count from 0.
FIRST_WARMUP = 10**6

# Of samples with the captions of lengths.json, and with its longer ones.
TRAINING = ("train", "train_long")
Works = Mapping[str, TrainingWork]  # by the names of TRAINING

Seconds = dict[str, dict[str, list[float]]]  # one of TRAINING or "score" -> variant -> by round


@dataclass
class Round:
    """Results of one round, by variant name."""

    # Per task, of the first of TRAINING and then of the second.
    losses: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    scores: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))


class Measurements:
    """What the rounds of one geometry gave, as lists over rounds."""

    def __init__(self) -> None:
        self.seconds: Seconds = defaultdict(lambda: defaultdict(list))
        self.real_tokens: dict[str, list[int]] = defaultdict(list)
        self.counts: dict[str, list[WorkCounts]] = defaultdict(list)  # training steps, by variant
        self.rounds: list[dict[str, Any]] = []

    def add(
        self,
        result: Round,
        worst: dict[str, float],
        counts: dict[str, WorkCounts],
        works: Works,
        scoring: ScoringWork,
    ) -> None:
        for what, by_variant in result.seconds.items():
            for name in result.losses:
                self.seconds[what][name].append(by_variant[name])
        for name, value in counts.items():
            self.counts[name].append(value)
        for what, training in works.items():
            self.real_tokens[what].append(training.num_real_tokens)
        self.real_tokens["score"].append(scoring.num_real_tokens)
        predictions = {name: scores.argmin(1).tolist() for name, scores in result.scores.items()}
        self.rounds.append(
            {
                "losses": result.losses,
                "predictions": predictions,
                "questions_scored": len(scoring.questions),
                "differences": worst,
            }
        )


def make_variants(config: LlamaConfig, waterfall: bool) -> list[Variant]:
    """Plain first, fast last; `waterfall` adds the steps between them."""
    plain, fast = make_pair(config)
    between: list[Variant] = []
    if waterfall:
        between = [
            Plain(plain, CPU, longest=True, name="plain, padded to the longest"),
            Plain(with_vico_products(plain), CPU, longest=True, name="and ViCo's products"),
            Packed(fast, CPU, share=False, name="packed, nothing shared"),
        ]
    return [Plain(plain, CPU), *between, Packed(fast, CPU)]


def warm_up(
    variants: list[Variant],
    workload: Workload,
    num_rounds: int,
    num_questions: int,
    num_videos: int,
) -> None:
    """`num_rounds` rounds of the packed variants. The slow plain ones train on one question."""
    for variant in variants:
        is_packed = isinstance(variant, Packed)
        for i in range(num_rounds if is_packed else 1):
            index = FIRST_WARMUP + i
            variant.train(workload.training(index, num_questions if is_packed else 1))
            if is_packed:
                variant.score(workload.scoring(index, num_videos))
            take_gradients(variant.model)


def run_round(variants: list[Variant], works: Works, scoring: ScoringWork, index: int) -> Round:
    """Every variant in turn; every other round in reverse order."""
    result = Round()
    ordered = variants if index % 2 == 0 else variants[::-1]
    for what, training in works.items():
        for variant in ordered:
            seconds, losses = cpu_seconds(partial(variant.train, training))
            result.seconds[what][variant.name] = seconds
            result.losses[variant.name] += losses
            for name, gradient in take_gradients(variant.model).items():
                result.gradients[variant.name][f"{what} {name}"] = gradient
    for variant in ordered:
        seconds, scores = cpu_seconds(partial(variant.score, scoring))
        result.seconds["score"][variant.name] = seconds
        result.scores[variant.name] = scores
    return result


def differences(result: Round, baseline: str) -> dict[str, float]:
    """The largest distances of any variant to the baseline, and the number of other predictions."""
    loss = gradient = score = predictions = 0.0
    exact_losses, exact_gradients = result.losses[baseline], result.gradients[baseline]
    exact_scores = result.scores[baseline]
    for name in result.losses:
        for a, b in zip(result.losses[name], exact_losses, strict=True):
            loss = max(loss, or_infinity(abs(a - b) / abs(b)))
        gradients = result.gradients[name]
        assert set(gradients) == set(exact_gradients), f"{name}: other trainables than {baseline}"
        for parameter, exact in exact_gradients.items():
            largest = (gradients[parameter] - exact).abs().max() / exact.abs().max()
            gradient = max(gradient, or_infinity(float(largest)))
        scores = result.scores[name]
        score = max(score, or_infinity(float((scores - exact_scores).abs().max())))
        predictions += int((scores.argmin(1) != exact_scores.argmin(1)).sum())
    return {
        "loss_relative": loss,
        "gradient_relative": gradient,
        "score_absolute": score,
        "predictions": predictions,
    }


def or_infinity(distance: float) -> float:
    """Infinity for NaN, which no bound accepts."""
    return distance if distance == distance else float("inf")


def is_equal(worst: dict[str, float]) -> bool:
    """Whether the differences are no larger than rounding."""
    return (
        worst["loss_relative"] <= LOSS_RTOL
        and worst["gradient_relative"] <= GRADIENT_RTOL
        and worst["score_absolute"] <= SCORE_ATOL
        and worst["predictions"] == 0
    )


def count(variant: Variant, work: TrainingWork, config: LlamaConfig) -> WorkCounts:
    """How much work a training step of this variant is."""
    if isinstance(variant, Packed):
        batch, num_questions = training_batch(work, variant.share), len(work.vqa)
        return count_packed(config, [batch], 2 * num_questions, num_questions, training=True)
    assert isinstance(variant, Plain)
    widths = (variant.width(work.vqa, MAX_SEQ_LEN), variant.width(work.cap, MAX_CAP_LEN))
    return count_plain(config, work, widths)


def print_round(geometry: str, index: int, result: Round, worst: dict[str, float]) -> None:
    for variant, losses in result.losses.items():
        train, score = (result.seconds[what][variant] for what in ("train", "score"))
        predictions = "".join("ABCDE"[p] for p in result.scores[variant].argmin(1).tolist())
        log.info(
            f"{geometry:12s} round {index + 1}  {variant:28s}{train:7.2f} s train {score:7.2f} s "
            f"score  vqa {losses[0]:.6f} cap {losses[1]:.6f}  {predictions}"
        )
    distances = ", ".join(f"{key} {value:.1e}" for key, value in worst.items())
    log.info(f"             largest differences: {distances}")
