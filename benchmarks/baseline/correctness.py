"""Correctness before speed: does a device compute what the definition computes?

Each check returns its distances: relative, in the L2 norm, |a - b| / |b|. The bounds allow for
rounding; every record has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from benchmarks.baseline.models import (
    make_fast,
    make_plain,
    random_weights,
    set_weights,
    take_gradients,
)
from benchmarks.baseline.variants import (
    CAPTION_WEIGHT,
    Packed,
    Plain,
    Variant,
    scoring_batches,
    training_batch,
)
from benchmarks.measure.clocks import Clock
from benchmarks.measure.spreads import spread
from benchmarks.measure.workload import ScoringWork, SyntheticWorkload, TrainingWork
from vico.errors import UserError
from vico.model.attention.backends import choose_attention
from vico.model.attention.masks import Attend, AttentionMask, attention_mask, restrict_queries
from vico.model.attention.reference import attend_plain
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.train.config import RunConfig
from vico.train.optim import make_optimizer

CPU = torch.device("cpu")
# fp32: sums in another order. bf16: 8 bits, of the output and of what the kernel keeps between its
# products; the published arithmetic has 5e-3 on outputs and gradients, fused kernels 2e-3 to 4e-3;
# gate2's gradient sums over rows and heads.
ATTENTION_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
NUM_STEPS = 20
STEPS_LR = 1e-2
# Of the loss of any of the steps, relative to fp32's on the CPU.
STEPS_LOSS_BOUND = 1e-2
# How much farther from fp32 the fast variant may be than the baseline in the same type. Both only
# round, so the ratio is 1 up to chance: on a CPU 0.85 to 1.18 for single draws of toy weights,
# 0.91 to 1.11 for the mean of three.
DISTANCE_RATIO_BOUNDS = {"score_distance": 1.25, "gradient_distance": 1.25}
TOY_SEEDS = (0, 1, 2)
COMPARED_TENSORS = ("output", "q", "k", "v", "gate2")


def backend_names() -> list[str]:
    """The values of --attention except "auto"; the definition comes last."""
    choices = get_args(get_type_hints(RunConfig)["attention"])
    return [*(name for name in choices if name not in ("auto", "plain")), "plain"]


@dataclass(frozen=True)
class _AttentionCase:
    """A stream's mask, random inputs and output gradient, and what the definition gives in fp32."""

    name: str
    mask: AttentionMask
    inputs: list[Tensor]  # q, k, v, gate2
    upstream: Tensor
    expected: list[Tensor | None]  # the output, then the inputs' gradients


def attention_backends(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Every backend against the definition in fp32.

    The streams are real ones: a training stream and a scoring tree, each with all rows as queries
    and with the few that the last layer needs.
    """
    work = SyntheticWorkload(config.vocab_size)
    streams = {
        "training": training_batch(work.training(0, 8)),
        "scoring": scoring_batches(work.scoring(0, 2))[0],
    }
    cases: list[_AttentionCase] = []
    whole_streams: dict[str, _AttentionCase] = {}
    for stream, batch in streams.items():
        mask = attention_mask(batch.segments)
        masks = {"all rows": mask, "asked rows": restrict_queries(mask, batch.wanted_rows_R)}
        for rows, visible in masks.items():
            case = _make_case(f"{stream}, {rows}", visible, batch.num_rows, config, device, dtype)
            cases.append(case)
            if visible is mask:
                whole_streams[stream] = case
    bound = ATTENTION_BOUNDS[dtype]
    backends: dict[str, dict[str, Any]] = {}
    for name in backend_names():
        try:
            attend, reason = choose_attention(name, device, dtype)
        except UserError as error:
            backends[name] = {"runs": False, "why": str(error)}
            continue
        distances = {case.name: _attention_distances(attend, case) for case in cases}
        seconds = {
            stream: _attention_seconds(attend, case, device, repeats)
            for stream, case in whole_streams.items()
        }
        worst = max(max(by_tensor.values()) for by_tensor in distances.values())
        backends[name] = {
            "runs": True,
            "why": reason,
            "distances": distances,
            "seconds": seconds,
            "worst": worst,
            "equal": worst <= bound,
        }
    return {
        "bound": bound,
        "head_dim": config.head_dim,
        "heads": config.n_heads,
        "backends": backends,
        "equal": all(entry.get("equal", True) for entry in backends.values()),
    }


def _make_case(
    name: str,
    mask: AttentionMask,
    num_rows: int,
    config: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> _AttentionCase:
    """Random numbers are drawn on the host: they are the same on every device."""
    generator = torch.Generator().manual_seed(num_rows)
    num_queries = num_rows if mask.query_rows is None else len(mask.query_rows)
    heads = (config.n_heads, config.head_dim)
    inputs = []
    for rows in (num_queries, num_rows, num_rows):
        inputs.append(torch.randn((rows, *heads), generator=generator).to(device, dtype))
    inputs.append(torch.randn(config.n_heads, generator=generator).to(device))
    upstream = torch.randn((num_queries, *heads), generator=generator).to(device, dtype)
    fp32_inputs = [x.float() for x in inputs]
    expected = _output_and_gradients(attend_plain, fp32_inputs, upstream.float(), mask)
    return _AttentionCase(name, mask, inputs, upstream, expected)


def _output_and_gradients(
    attend: Attend, inputs: list[Tensor], upstream: Tensor, mask: AttentionMask
) -> list[Tensor | None]:
    q, k, v, gate2 = (x.detach().requires_grad_() for x in inputs)
    out = attend(q, k, v, gate2, mask)
    out.backward(upstream)
    return [out.detach(), q.grad, k.grad, v.grad, gate2.grad]


def _attention_distances(attend: Attend, case: _AttentionCase) -> dict[str, float]:
    actual = _output_and_gradients(attend, case.inputs, case.upstream, case.mask)
    return {
        name: distance(a, b)
        for name, a, b in zip(COMPARED_TENSORS, actual, case.expected, strict=True)
    }


def _attention_seconds(
    attend: Attend, case: _AttentionCase, device: torch.device, repeats: int
) -> dict[str, float]:
    """Forward and backward of one layer."""

    def run() -> None:
        _output_and_gradients(attend, case.inputs, case.upstream, case.mask)

    clock = Clock(device)
    for _ in range(2):
        run()
    return spread([clock.time(run) for _ in range(repeats)])


def distance(actual: Tensor | None, expected: Tensor | None) -> float:
    """|actual - expected| / |expected|; infinite where it is NaN, so that no bound accepts it."""
    assert actual is not None and expected is not None
    exact = expected.detach().double()
    value = float((actual.detach().double() - exact).norm() / exact.norm())
    return value if value == value else float("inf")


def _toy_variant(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, plain: bool, seed: int = 0
) -> Variant:
    """A variant with toy weights, the same on every device and in every type up to rounding."""
    weights = random_weights(make_plain(config, torch.float32), seed)
    if plain:
        baseline = make_plain(config, dtype)
        set_weights(baseline, weights)
        return Plain(baseline.to(device), device)
    fast = make_fast(config, dtype)
    set_weights(fast, weights)
    attend, _ = choose_attention("auto", device, dtype)
    choose_block_runners(fast.to(device), attend)
    return Packed(fast, device)


def twenty_steps(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, num_steps: int = NUM_STEPS
) -> dict[str, Any]:
    """How far losses of training steps in `dtype` on `device` are from those in fp32 on the CPU."""
    exact = _loss_curve(config, CPU, torch.float32, num_steps)
    actual = _loss_curve(config, device, dtype, num_steps)
    worst = max(abs(a - b) / abs(b) for a, b in zip(actual, exact, strict=True))
    falls = exact[-1] < exact[0] and actual[-1] < actual[0]
    dtype_name = str(dtype).removeprefix("torch.")
    return {
        "losses": {"fp32 on the CPU": exact, f"{dtype_name} on {device.type}": actual},
        "worst_relative": worst,
        "bound": STEPS_LOSS_BOUND,
        "losses_fall": falls,
        "equal": worst <= STEPS_LOSS_BOUND and falls,
    }


def _loss_curve(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, num_steps: int
) -> list[float]:
    """Losses of steps on the same samples, which must fall."""
    variant = _toy_variant(config, device, dtype, plain=False)
    work = SyntheticWorkload(config.vocab_size).training(0, 4)
    trainables = [p for p in variant.model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trainables, weight_decay=0.0)
    optimizer.param_groups[0]["lr"] = STEPS_LR
    losses = []
    for _ in range(num_steps):
        vqa, cap = variant.train(work)
        optimizer.step()
        variant.model.zero_grad(set_to_none=True)
        losses.append(vqa + CAPTION_WEIGHT * cap)
    return losses


@dataclass(frozen=True)
class _ToyResult:
    losses: list[float]
    gradients: dict[str, Tensor]
    scores: Tensor

    @classmethod
    def of(cls, variant: Variant, training: TrainingWork, scoring: ScoringWork) -> "_ToyResult":
        losses = variant.train(training)
        gradients = take_gradients(variant.model)
        return cls(losses, gradients, variant.score(scoring).float())

    def distances(self, exact: "_ToyResult") -> dict[str, float]:
        differing = self.scores.argmin(1) != exact.scores.argmin(1)
        gradients = [distance(self.gradients[n].cpu(), g) for n, g in exact.gradients.items()]
        losses = zip(self.losses, exact.losses, strict=True)
        return {
            "score_distance": float((self.scores - exact.scores).abs().mean()),
            "predictions_other_than_fp32": float(differing.sum()),
            "gradient_distance": _mean(gradients),
            "loss_distance": max(abs(a - b) / abs(b) for a, b in losses),
        }


def toy_distances(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, videos: int
) -> dict[str, Any]:
    """How far plain and fast in `dtype` on `device` are from plain in fp32 on the CPU.

    Two correct programs in half precision are not equal; both should be equally far from fp32.
    """
    work = SyntheticWorkload(config.vocab_size)
    training, scoring = work.training(0, 8), work.scoring(0, videos)
    draws: dict[str, list[dict[str, float]]] = {"plain": [], "fast": []}
    for seed in TOY_SEEDS:
        baseline = _toy_variant(config, CPU, torch.float32, True, seed)
        exact = _ToyResult.of(baseline, training, scoring)
        for name, distances in draws.items():
            variant = _toy_variant(config, device, dtype, name == "plain", seed)
            distances.append(_ToyResult.of(variant, training, scoring).distances(exact))
    means = {name: _mean_by_key(distances) for name, distances in draws.items()}
    ratios = {key: means["fast"][key] / means["plain"][key] for key in DISTANCE_RATIO_BOUNDS}
    return {
        "questions": len(scoring.questions),
        "draws": draws,
        "means": means,
        "fast_over_plain": ratios,
        "bounds": DISTANCE_RATIO_BOUNDS,
        "equal": all(ratios[key] <= bound for key, bound in DISTANCE_RATIO_BOUNDS.items()),
    }


def _mean_by_key(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    means = {}
    for key in rows[0]:
        means[key] = _mean([row[key] for row in rows])
    return means


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
