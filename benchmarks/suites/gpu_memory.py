"""The `gpu` suite's single steps: peak memory, token budgets, smaller cards, time split."""

import gc
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch

from benchmarks.measure.clocks import Clock
from benchmarks.measure.memory import device_peak
from benchmarks.measure.metrics import rates
from benchmarks.measure.time_split import time_split
from benchmarks.suites.gpu_bench import VARIANTS, Bench
from vico.io import log
from vico.planner.gpu_specs import GIB

# Cards that a 7B must fit on: nominal size, GiB that a process's tensors can have there, and
# whether all layers are recomputed.
SMALL_CARDS = (("24 GB", 22.5, False), ("16 GB", 14.9, True))


def step_peaks(bench: Bench) -> dict[str, Any]:
    """Peak memory of a training step with both tasks and of a scoring step, by variant.

    "timed" is that of all steps as they were timed, with their CUDA graphs, whose memory counts as
    reserved and not as allocated, and the captures before them; "replayed" is without the captures.
    The variants share one copy of the weights.
    """
    peaks: dict[str, Any] = {"train": {}, "score": {}}
    for name in VARIANTS:
        bench.discard_graphs()
        item = bench.dataset("both", bench.args.questions, name)[0]
        peaks["train"][name] = device_peak(partial(bench.run, name, item), bench.device)
        bench.discard_graphs()
        run = partial(_timed_steps, bench, "both", bench.args.questions, name)
        peaks["train"][name]["timed"] = device_peak(run, bench.device)
        peaks["train"][name]["replayed"] = device_peak(run, bench.device)
    for name in VARIANTS:
        bench.discard_graphs()
        item = bench.dataset("score", bench.args.videos, name)[0]
        peaks["score"][name] = device_peak(partial(bench.run, name, item), bench.device)
    return peaks


def _timed_steps(bench: Bench, kind: str, num: int, variant: str) -> None:
    """The steps of a comparison by one variant, graphs captured as there."""
    count = bench.args.warmup + bench.args.steps
    if variant == "fast":
        bench.capture_graphs(kind, num, count)
    for item in bench.items(kind, num, variant, count):
        bench.run(variant, item)


def token_budgets(bench: Bench) -> dict[str, Any]:
    """The fast variant alone on larger steps, by tokens of a step."""
    sample = 64
    mean = bench.workload.training(0, sample).num_real_tokens / sample
    by_budget = {}
    for budget in bench.args.budgets:
        num_questions = max(1, round(budget / mean))
        by_budget[str(budget)] = or_out_of_memory(partial(_time_fast, bench, num_questions))
    return by_budget


def or_out_of_memory(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    with suppress(torch.cuda.OutOfMemoryError):
        return run()
    # Only here are the error and the tensors of its frames gone.
    gc.collect()
    torch.cuda.empty_cache()
    return {"out_of_memory": True}


def _time_fast(bench: Bench, num_questions: int) -> dict[str, Any]:
    args, clock = bench.args, Clock(bench.device)
    count = args.warmup + args.steps
    marks, counts = [], []

    def run_steps() -> None:
        bench.capture_graphs("both", num_questions, count)
        stream = bench.items("both", num_questions, "fast", count)
        for _ in range(count):
            start = clock.now()
            item = next(stream)
            bench.run("fast", item)
            marks.append((start, clock.now()))
            counts.append(bench.count("fast", item))

    bench.discard_graphs()
    timed_peak = device_peak(run_steps, bench.device)
    seconds = [clock.between(*pair) for pair in marks[args.warmup :]]
    # The allocator does not count the graphs' memory as allocated.
    bench.discard_graphs()
    item = bench.dataset("both", num_questions, "fast")[count - 1]
    peak = device_peak(lambda: bench.run("fast", item), bench.device)
    peak["timed"] = timed_peak
    metrics = rates(seconds, counts[args.warmup :], bench.peak_tflops, bench.ceiling_tflops)
    log.info(
        f"{num_questions} questions a step: "
        f"{metrics['real_tokens_per_second']['median']:.0f} real tokens/s, "
        f"peak {peak['allocated_gib']:.1f} GiB"
    )
    return {"questions": num_questions, "seconds": seconds, "figures": metrics, "memory": peak}


def small_cards(bench: Bench) -> dict[str, Any]:
    """A training step with the allocator limited to the memory of smaller cards.

    `vico plan` says that the published batch fits there.
    """
    if bench.device.type != "cuda":
        return {}
    by_card: dict[str, Any] = {}
    item = bench.dataset("both", bench.args.questions, "fast")[0]
    run = partial(device_peak, partial(bench.run, "fast", item), bench.device)
    total = torch.cuda.get_device_properties(bench.device).total_memory
    for card, allowed_gib, recomputes in SMALL_CARDS:
        if allowed_gib * GIB >= total:
            continue
        num_recomputed = bench.config.n_layers if recomputes else 0
        bench.fast.model.num_checkpointed = num_recomputed
        bench.discard_graphs()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(allowed_gib * GIB / total)
        facts = {"allowed_gib": allowed_gib, "recomputed_layers": num_recomputed}
        by_card[card] = facts | or_out_of_memory(run)
        log.info(f"a card of {card}: {by_card[card]}")
    bench.fast.model.num_checkpointed = 0
    torch.cuda.set_per_process_memory_fraction(1.0)
    return by_card


def time_splits(bench: Bench) -> dict[str, Any]:
    """Where the time of training steps and of a scoring step goes, by variant."""
    steps = []
    for task in bench.args.tasks:
        key = "train" if task == "both" else f"train_{task}"
        steps.append((key, task, bench.args.questions))
    steps.append(("score", "score", bench.args.videos))
    by_variant: dict[str, Any] = {}
    for name in VARIANTS:
        split: dict[str, Any] = {}
        for key, kind, num in steps:
            item = bench.dataset(kind, num, name)[0]
            bench.discard_graphs()
            split[key], split[f"{key}_rows"] = time_split(
                partial(bench.run, name, item), bench.config, bench.device
            )
        by_variant[name] = split
    return by_variant
