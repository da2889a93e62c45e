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

    Of NCCL, what is not hidden behind products cannot be told from this number alone.
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
    for event in profiler.key_averages():
        if on_gpu and event.device_type.name != "CPU" and "nccl" in event.key.lower():
            seconds += event.self_device_time_total / 1e6
        elif not on_gpu and event.key.startswith("gloo:"):
            seconds += event.cpu_time_total / 1e6
    found = seconds if seconds or world.size == 1 else UNKNOWN
    return {"seconds": found, "profiled_step_seconds": step_seconds}
