"""--quantize fp8 in the `gpu` suite: the same model with its frozen products in fp8, and as it is.

A step of each in turn. Every share is of the fp8 peak and of the fp8 product measured here, though
the head, attention and the prompts' rows are in half precision: so none is flattered.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.baseline.models import with_fp8_products
from benchmarks.baseline.variants import Packed
from benchmarks.measure.ceilings import fp8_product_tflops
from benchmarks.measure.clocks import Clock
from benchmarks.measure.metrics import WorkCounts, rates
from benchmarks.measure.peak_rates import fp8_peak_tflops
from benchmarks.measure.spreads import UNKNOWN, ratio_spread
from benchmarks.suites.gpu_bench import Bench
from benchmarks.suites.gpu_compare import agreement
from benchmarks.suites.gpu_memory import or_out_of_memory
from vico.io import log
from vico.model.block_runners import choose_block_runners
from vico.model.ops import fp8
from vico.train.backbone import DTYPES


def in_fp8(bench: Bench) -> dict[str, Any]:
    """Times, shares and the distance of losses by step; or {"not_run": why}."""
    if why := fp8.why_not(bench.device, DTYPES[bench.args.precision]):
        return {"not_run": why}
    measured = or_out_of_memory(partial(_measured, bench))
    return {"not_run": "out of memory"} if "out_of_memory" in measured else measured


def _measured(bench: Bench) -> dict[str, Any]:
    args, device, model = bench.args, bench.device, with_fp8_products(bench.fast.model)
    choose_block_runners(model, bench.fast.model.attend)
    on_gpu = device.type == "cuda"
    size = 256 if args.tiny else 8192
    own = replace(
        bench,
        fast=Packed(model, device, score_tokens=args.score_tokens),
        peak_tflops=fp8_peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None,
        ceiling_tflops=fp8_product_tflops(device, DTYPES[args.precision], size),
    )
    out: dict[str, Any] = {
        "peak_tflops": own.peak_tflops or UNKNOWN,
        "matmul_tflops": own.ceiling_tflops,
        "steps": {},
    }
    for kind, num in (("both", args.questions), ("score", args.videos)):
        if kind == "score" or kind in args.tasks:
            key = kind if kind == "score" else f"train_{kind}"
            out["steps"][key] = result = _in_turn(bench, own, kind, num)
            log.info(f"{key}: without fp8 over with it {result['ratio']['median']:.2f}")
    return out


def _in_turn(plain: Bench, own: Bench, kind: str, num: int) -> dict[str, Any]:
    """A step of both in turn, every other one in reverse order."""
    args, clock = own.args, Clock(own.device)
    count = args.warmup + args.steps
    benches = {"plain": plain, "fast": own}
    for bench in benches.values():
        bench.capture_graphs(kind, num, count)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in benches}
    counts: list[WorkCounts] = []
    distances: list[float] = []
    for index, item in enumerate(own.items(kind, num, "fast", count)):
        results = {}
        for name in list(benches)[:: 1 if index % 2 == 0 else -1]:
            start = clock.now()
            results[name] = benches[name].run("fast", item)
            if index >= args.warmup:
                marks[name].append((start, clock.now()))
        if index >= args.warmup:
            counts.append(own.count("fast", item))
            compared = agreement(results)
            is_score = isinstance(results["fast"], torch.Tensor)
            distances.append(compared["score_mean_absolute" if is_score else "loss_relative"])
    seconds = {}
    for name, pairs in marks.items():
        seconds[name] = [clock.between(*pair) for pair in pairs]
    return {
        "seconds": {"without": seconds["plain"], "fp8": seconds["fast"]},
        "figures": rates(seconds["fast"], counts, own.peak_tflops, own.ceiling_tflops),
        "ratio": ratio_spread(seconds["plain"], seconds["fast"]),
        "worst_distance": max(distances),
    }
