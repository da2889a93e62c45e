"""Correctness before speed: what runs on a device computes what the definition computes. Each check returns its distances.

Distances are relative in the L2 norm, |a - b| / |b|. The bounds are those of rounding: they are stated in every record.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from benchmarks.baseline.variants import (
    CAPTION_WEIGHT,
    Packed,
    Plain,
    Variant,
    fill,
    make_fast,
    make_plain,
    random_weights,
    scoring_batches,
    take_gradients,
    training_batch,
)
from benchmarks.measure.clocks import Clock, spread
from benchmarks.measure.workload import SyntheticWorkload
from vico.errors import UserError
from vico.model.attention.backends import choose_attention
from vico.model.attention.masks import Attend, AttentionMask, attention_mask, restrict_queries
from vico.model.attention.reference import attend_plain
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.train.config import RunConfig
from vico.train.optim import make_optimizer

CPU = torch.device("cpu")
# fp32: sums in another order. bf16: 8 bits, of the output and of what the kernel keeps between its products; the published
# arithmetic has 5e-3 on outputs and gradients, fused kernels 2e-3 to 4e-3, gate2's gradient sums over rows and heads.
ATTENTION_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
STEPS, STEPS_LR, STEPS_LOSS_BOUND = (
    20,
    1e-2,
    1e-2,
)  # of the loss of any of the steps, relative to fp32's on the CPU
# How much farther from fp32 than the plain baseline in the same type fast may be: scores, gradients. Both only round, so the
# ratio is 1 but for chance: on a CPU 0.85 to 1.18 of single draws of toy weights, 0.91 to 1.11 of the mean of three.
NO_FARTHER = {"score_distance": 1.25, "gradient_distance": 1.25}
TOY_SEEDS = (0, 1, 2)


def backend_names() -> list[str]:
    """What --attention can be, the definition last."""
    names = [
        name
        for name in get_args(get_type_hints(RunConfig)["attention"])
        if name not in ("auto", "plain")
    ]
    return [*names, "plain"]


@dataclass(frozen=True)
class _Case:
    """A stream, who asks in it, random q, k, v, gate2 and gradient of the output, and what the definition makes of them in fp32."""

    name: str
    seen: AttentionMask
    inputs: list[Tensor]
    upstream: Tensor
    expected: list[Tensor | None]  # the output, then the inputs' gradients


def attention_backends(
    shape: LlamaConfig, device: torch.device, dtype: torch.dtype, repeats: int
) -> dict[str, Any]:
    """Every backend against the definition in fp32, on real streams: training, scoring's tree, and the last layer's few rows."""
    work = SyntheticWorkload(shape.vocab_size)
    streams = {
        "training": training_batch(work.training(0, 8)),
        "scoring": scoring_batches(work.scoring(0, 2))[0],
    }
    cases = []
    for stream, batch in streams.items():
        seen = attention_mask(batch.segments)
        for rows, visible in (
            ("all rows", seen),
            ("asked rows", restrict_queries(seen, batch.wanted_rows_R)),
        ):
            cases.append(_case(f"{stream}, {rows}", visible, batch.num_rows, shape, device, dtype))
    bound = ATTENTION_BOUNDS[dtype]
    found: dict[str, Any] = {
        "bound": bound,
        "head_dim": shape.head_dim,
        "heads": shape.n_heads,
        "backends": {},
    }
    for name in backend_names():
        try:
            attend, why = choose_attention(name, device, dtype)
        except UserError as problem:
            found["backends"][name] = {"runs": False, "why": str(problem)}
            continue
        entry: dict[str, Any] = {
            "runs": True,
            "why": why,
            "distances": {case.name: _attention_distances(attend, case) for case in cases},
        }
        entry["seconds"] = {
            stream: _attention_seconds(attend, cases[2 * i], device, repeats)
            for i, stream in enumerate(streams)
        }
        entry["worst"] = max(d for by in entry["distances"].values() for d in by.values())
        entry["equal"] = entry["worst"] <= bound
        found["backends"][name] = entry
    found["equal"] = all(entry.get("equal", True) for entry in found["backends"].values())
    return found


def _case(
    name: str,
    seen: AttentionMask,
    rows: int,
    shape: LlamaConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> _Case:
    """Made on the host: the same on every device."""
    generator = torch.Generator().manual_seed(rows)
    asking = rows if seen.query_rows is None else len(seen.query_rows)
    sizes = [(asking, shape.n_heads, shape.head_dim), *[(rows, shape.n_heads, shape.head_dim)] * 2]
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    inputs.append(torch.randn(shape.n_heads, generator=generator).to(device))
    upstream = torch.randn(sizes[0], generator=generator).to(device, dtype)
    return _Case(
        name,
        seen,
        inputs,
        upstream,
        _results(attend_plain, [x.float() for x in inputs], upstream.float(), seen),
    )


def _results(
    attend: Attend, inputs: list[Tensor], upstream: Tensor, seen: AttentionMask
) -> list[Tensor | None]:
    q, k, v, gate2 = (x.detach().requires_grad_() for x in inputs)
    out = attend(q, k, v, gate2, seen)
    out.backward(upstream)
    return [out.detach(), q.grad, k.grad, v.grad, gate2.grad]


def _attention_distances(attend: Attend, case: _Case) -> dict[str, float]:
    found = _results(attend, case.inputs, case.upstream, case.seen)
    return {
        name: distance(a, b)
        for name, a, b in zip(("output", "q", "k", "v", "gate2"), found, case.expected, strict=True)
    }


def _attention_seconds(
    attend: Attend, case: _Case, device: torch.device, repeats: int
) -> dict[str, float]:
    """Forward and backward of one layer."""
    clock = Clock(device)
    for _ in range(2):
        _results(attend, case.inputs, case.upstream, case.seen)
    return spread(
        [
            clock.time(lambda: _results(attend, case.inputs, case.upstream, case.seen))
            for _ in range(repeats)
        ]
    )


def distance(found: Tensor | None, expected: Tensor | None) -> float:
    assert found is not None and expected is not None
    value = float(
        (found.detach().double() - expected.detach().double()).norm()
        / expected.detach().double().norm()
    )
    return value if value == value else float("inf")  # nan is no agreement


def _toy(
    shape: LlamaConfig, device: torch.device, dtype: torch.dtype, plain: bool, seed: int = 0
) -> Variant:
    """A variant with the toy weights, the same on every device and in every type but for rounding."""
    values = random_weights(make_plain(shape, torch.float32), seed)
    if plain:
        baseline = make_plain(shape, dtype)
        fill(baseline, values)
        return Plain(baseline.to(device), device)
    fast = make_fast(shape, dtype)
    fill(fast, values)
    choose_block_runners(fast.to(device), choose_attention("auto", device, dtype)[0])
    return Packed(fast, device)


def twenty_steps(
    shape: LlamaConfig, device: torch.device, dtype: torch.dtype, steps: int = STEPS
) -> dict[str, Any]:
    """The same training steps in `dtype` on `device` and in fp32 on the CPU: their losses, and the largest distance."""
    curves = {}
    for name, place, kind in (
        ("fp32 on the CPU", CPU, torch.float32),
        (f"{str(dtype)[6:]} on {device.type}", device, dtype),
    ):
        variant, work = _toy(shape, place, kind, plain=False), SyntheticWorkload(shape.vocab_size)
        optimizer = make_optimizer(
            [p for p in variant.model.parameters() if p.requires_grad], weight_decay=0.0
        )
        optimizer.param_groups[0]["lr"] = STEPS_LR
        curve = []
        for _ in range(steps):  # always the same samples: a loss that falls is seen to fall
            vqa, cap = variant.train(work.training(0, 4))
            optimizer.step()
            variant.model.zero_grad(set_to_none=True)
            curve.append(vqa + CAPTION_WEIGHT * cap)
        curves[name] = curve
    exact, found = curves.values()
    worst = max(abs(a - b) / abs(b) for a, b in zip(found, exact, strict=True))
    falls = exact[-1] < exact[0] and found[-1] < found[0]
    return {
        "losses": curves,
        "worst_relative": worst,
        "bound": STEPS_LOSS_BOUND,
        "losses_fall": falls,
        "equal": worst <= STEPS_LOSS_BOUND and falls,
    }


def toy_distances(
    shape: LlamaConfig, device: torch.device, dtype: torch.dtype, videos: int
) -> dict[str, Any]:
    """How far plain and fast in `dtype` on `device` are from plain in fp32 on the CPU: half precision has no equality."""
    work = SyntheticWorkload(shape.vocab_size)
    training, scoring = work.training(0, 8), work.scoring(0, videos)
    draws: dict[str, list[dict[str, float]]] = {"plain": [], "fast": []}
    for seed in TOY_SEEDS:
        exact = _toy(shape, CPU, torch.float32, True, seed)
        losses, gradients, scores = (
            exact.train(training),
            take_gradients(exact.model),
            exact.score(scoring),
        )
        for name, found in draws.items():
            variant = _toy(shape, device, dtype, name == "plain", seed)
            mine_losses, mine = variant.train(training), take_gradients(variant.model)
            mine_scores = variant.score(scoring).float()
            found.append(
                {
                    "score_distance": float((mine_scores - scores).abs().mean()),
                    "predictions_other_than_fp32": float(
                        (mine_scores.argmin(1) != scores.argmin(1)).sum()
                    ),
                    "gradient_distance": _mean(
                        [distance(mine[n].cpu(), gradients[n]) for n in gradients]
                    ),
                    "loss_distance": max(
                        abs(a - b) / abs(b) for a, b in zip(mine_losses, losses, strict=True)
                    ),
                }
            )
    means = {
        name: {key: _mean([draw[key] for draw in found]) for key in found[0]}
        for name, found in draws.items()
    }
    ratios = {key: means["fast"][key] / means["plain"][key] for key in NO_FARTHER}
    return {
        "questions": len(scoring.questions),
        "draws": draws,
        "means": means,
        "fast_over_plain": ratios,
        "bounds": NO_FARTHER,
        "equal": all(ratios[key] <= bound for key, bound in NO_FARTHER.items()),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
