"""The `gpu` suite's comparison: plain and fast on the same samples, step by step."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.clocks import Clock
from benchmarks.measure.hardware import watched_gpus
from benchmarks.measure.metrics import WorkCounts, rates
from benchmarks.measure.spreads import ratio_spread, spread
from benchmarks.report.markdown import percent
from benchmarks.suites.gpu_bench import VARIANTS, Bench, Result
from vico.io import log

# Between the two models in half precision on the same samples. Losses are means over hundreds of
# targets. Scores are means over four, and the baseline's logits in bf16 are multiples of 0.06. The
# bounds find another computation, not another rounding.
BOUNDS = {"loss_relative": 1e-2, "score_mean_absolute": 0.1}


def compare(bench: Bench, kind: str, num: int) -> dict[str, Any]:
    """Plain and fast in turn, a step each; every other step in reverse order."""
    args, clock = bench.args, Clock(bench.device)
    count = args.warmup + args.steps
    bench.capture_graphs(kind, num, count)
    streams = {name: bench.items(kind, num, name, count) for name in VARIANTS}
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in VARIANTS}
    waits: dict[str, list[float]] = {name: [] for name in VARIANTS}
    counts: dict[str, list[WorkCounts]] = {name: [] for name in VARIANTS}
    out: dict[str, Any] = {"rounds": [], "equal": True, "bounds": BOUNDS}
    with watched_gpus() as watched:
        for index in range(count):
            results: dict[str, Result] = {}
            for name in VARIANTS if index % 2 == 0 else VARIANTS[::-1]:
                start, wait_start = clock.now(), time.perf_counter()
                # Waiting for data is part of the step.
                item = next(streams[name])
                waited = time.perf_counter() - wait_start
                results[name] = bench.run(name, item)
                stop = clock.now()
                if index >= args.warmup:
                    marks[name].append((start, stop))
                    waits[name].append(waited)
                    counts[name].append(bench.count(name, item))
            entry = agreement(results)
            out["rounds"].append(entry)
            print_step(kind, index - args.warmup, entry)
            if not entry["equal"]:
                return out | {"equal": False}
    seconds: dict[str, list[float]] = {}
    metrics = {}
    for name in VARIANTS:
        seconds[name] = [clock.between(*pair) for pair in marks[name]]
        speed = rates(seconds[name], counts[name], bench.peak_tflops, bench.ceiling_tflops)
        metrics[name] = speed | {"data_wait_seconds": spread(waits[name])}
    return out | {
        "seconds": seconds,
        "data_wait_seconds": waits,
        "figures": metrics,
        **watched,
        "ratio": ratio_spread(seconds["plain"], seconds["fast"]),
    }


def agreement(results: dict[str, Result]) -> dict[str, Any]:
    """Both variants' losses or predictions; "equal" tells whether they are within BOUNDS."""
    plain, fast = results["plain"], results["fast"]
    if isinstance(plain, Tensor) and isinstance(fast, Tensor):
        return _score_agreement(plain, fast)
    pairs = [(float(a), float(b)) for a, b in zip(plain, fast, strict=True)]
    bound = BOUNDS["loss_relative"]
    return {
        "losses": {"plain": [a for a, _ in pairs], "fast": [b for _, b in pairs]},
        # The loss of a task without samples is 0 in both.
        "loss_relative": max(abs(a - b) / abs(a) if a != b else 0.0 for a, b in pairs),
        # Written so that NaN is not equal.
        "equal": all(abs(a - b) <= bound * abs(a) for a, b in pairs),
    }


def _score_agreement(plain: torch.Tensor, fast: torch.Tensor) -> dict[str, Any]:
    distance = float((plain.double() - fast.double()).abs().mean())
    predictions = {"plain": plain.argmin(1).tolist(), "fast": fast.argmin(1).tolist()}
    differing = sum(a != b for a, b in zip(*predictions.values(), strict=True))
    return {
        "predictions": predictions,
        "score_mean_absolute": distance,
        "predictions_differ": differing,
        "equal": distance <= BOUNDS["score_mean_absolute"],
    }


def print_step(kind: str, number: int, entry: dict[str, Any]) -> None:
    """`number` counts timed steps from 0; it is negative while warming up."""
    label = "warm-up" if number < 0 else f"step {number + 1}"
    for variant in VARIANTS:
        if "losses" in entry:
            losses = "  ".join(f"{loss:.5f}" for loss in entry["losses"][variant])
            values = f"vqa, cap {losses}"
        else:
            values = "".join("ABCDE"[p] for p in entry["predictions"][variant])
        log.info(f"{kind:6s} {label:8s} {variant:6s} {values}")


def print_comparison(key: str, by_variant: dict[str, Any], ratio: dict[str, float]) -> None:
    for name, metrics in by_variant.items():
        mfu, hfu = percent(metrics["mfu"]), percent(metrics["hfu"])
        log.info(
            f"{key} {name}: {metrics['seconds']['median']:.4f} s, "
            f"{metrics['real_tokens_per_second']['median']:.0f} real tokens/s, "
            f"{metrics['questions_per_second']['median']:.1f} questions/s, MFU {mfu}, HFU {hfu}"
        )
    low, median, high = ratio["p10"], ratio["median"], ratio["p90"]
    log.info(f"{key}: plain over fast {median:.2f} ({low:.2f} to {high:.2f})")
