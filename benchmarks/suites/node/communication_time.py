"""What ranks differ in, and what of a step is communication."""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure.clocks import Clock
from benchmarks.measure.memory import resident_peak_gib
from benchmarks.measure.spreads import UNKNOWN, spread
from vico.distributed.world import World
from vico.planner.gpu_specs import GIB

Span = tuple[float, float]  # start and end, microseconds


def over_ranks(
    world: World, seconds: list[float], waits: list[float], tokens: list[int]
) -> dict[str, Any]:
    """By what was measured: each rank's value, in rank order. A collective.

    "seconds" and "data_wait_seconds" are medians of a rank's steps, "real_tokens" their sum.
    """
    device = world.device
    mine: dict[str, float] = {
        "seconds": spread(seconds)["median"],
        "data_wait_seconds": spread(waits)["median"],
        "real_tokens": float(sum(tokens)),
    }
    if device.type == "cuda":
        mine["allocated_gib"] = torch.cuda.max_memory_allocated(device) / GIB
        mine["reserved_gib"] = torch.cuda.max_memory_reserved(device) / GIB
    else:
        mine["allocated_gib"] = resident_peak_gib()
    table = world.gather(torch.tensor(list(mine.values()), dtype=torch.float64))
    by_rank: dict[str, Any] = dict(zip(mine, table.T.tolist(), strict=True))
    total = by_rank["real_tokens"]
    # The rank with most tokens over the mean: the others wait for it.
    by_rank["imbalance"] = max(total) * len(total) / sum(total)
    return by_rank


def communication_time(run: Callable[[], object], world: World) -> dict[str, Any]:
    """One step under the profiler on rank 0: NCCL's kernels, or gloo's calls on a CPU.

    "exposed_seconds": of a GPU, the time in which NCCL's kernels run and no other kernel does.
    """
    if not world.is_main:
        run()
        return {}
    on_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU]
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    clock = Clock(world.device, wall=True)
    with profile(activities=activities) as profiler:
        step_seconds = clock.time(run)
    seconds = 0.0
    transfers: list[Span] = []
    kernels: list[Span] = []
    for event in profiler.events() or ():
        if on_gpu and event.device_type.name != "CPU" and not event.is_user_annotation:
            span = (event.time_range.start, event.time_range.end)
            (transfers if "nccl" in event.key.lower() else kernels).append(span)
        elif not on_gpu and event.key.startswith("gloo:"):
            seconds += event.cpu_time_total / 1e6
    if on_gpu:
        seconds = sum(stop - start for start, stop in transfers) / 1e6
    is_known = bool(seconds) or world.size == 1
    return {
        "seconds": seconds if is_known else UNKNOWN,
        "exposed_seconds": exposed(transfers, kernels) / 1e6 if on_gpu and is_known else UNKNOWN,
        "profiled_step_seconds": step_seconds,
    }


def overlap(weak: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """What gathers cost: a step with them, and one of ranks that each have all frozen weights.

    The second neither gathers nor copies what was gathered; ZeRO-3 does all else. Beside it, the
    communication of a profiled step: what of it costs nothing is hidden behind products.
    """
    if not weak:
        return {}
    seconds, without = (spread(case["seconds"])["median"] for case in (weak, kept))
    return {
        "seconds": seconds,
        "kept_seconds": without,
        "gathers_cost_seconds": seconds - without,
        "communication_seconds": weak["communication_time"].get("seconds", UNKNOWN),
    }


def exposed(transfers: list[Span], kernels: list[Span]) -> float:
    """How long a transfer runs while no kernel does."""
    both = _length(transfers + kernels)
    return both - _length(kernels)


def _length(spans: list[Span]) -> float:
    """Of the union of spans."""
    total, reached = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total
