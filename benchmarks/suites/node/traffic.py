"""What ranks exchange: the measured speed of their links, and the computed bytes of a step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as torch_dist

from benchmarks.measure.clocks import Clock
from benchmarks.measure.metrics import layer_parameters
from benchmarks.measure.spreads import UNKNOWN, spread
from vico.distributed.world import World
from vico.model.config import LlamaConfig
from vico.train.engine import Engine

WARMUP_CALLS = 2
FP32_BYTES = 4


def collectives(world: World, mib: int, repeats: int) -> dict[str, Any]:
    """Bus bandwidth of an all-gather and an all-reduce of `mib` MiB, GB/s of the slowest rank.

    The bus bandwidth is comparable across numbers of ranks: it is that of the slowest link. See
    https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md.
    """
    if world.size == 1:
        return {"all_gather_gb_per_second": UNKNOWN, "all_reduce_gb_per_second": UNKNOWN}
    num_elements = mib * 2**18 // world.size * world.size
    whole = torch.ones(num_elements, device=world.device)
    part = whole[: num_elements // world.size].clone()
    seconds = {
        "all_gather": _collective_seconds(
            world, repeats, lambda: torch_dist.all_gather_into_tensor(whole, part)
        ),
        "all_reduce": _collective_seconds(
            world, repeats, lambda: torch_dist.all_reduce(whole, op=torch_dist.ReduceOp.MAX)
        ),
    }
    bytes_on_bus = (world.size - 1) / world.size * num_elements * FP32_BYTES
    passes = {"all_gather": 1, "all_reduce": 2}
    result: dict[str, Any] = {
        "mib": mib,
        "formula": "bus bandwidth: (n-1)/n of the bytes per second for all-gather, "
        "2 (n-1)/n for all-reduce",
    }
    for name, values in seconds.items():
        speed = passes[name] * bytes_on_bus / values["median"] / 1e9
        result |= {f"{name}_seconds": values, f"{name}_gb_per_second": speed}
    return result


def _collective_seconds(world: World, repeats: int, run: Callable[[], object]) -> dict[str, float]:
    """The slowest rank's times."""
    clock = Clock(world.device, wall=True)
    times = []
    for i in range(WARMUP_CALLS + repeats):
        world.barrier()
        seconds = clock.time(run)
        if i >= WARMUP_CALLS:
            times.append(seconds)
    slowest = world.gather(torch.tensor(times, dtype=torch.float64)).amax(dim=0)
    return spread(slowest.tolist())


def communication(
    config: LlamaConfig, engine: Engine, num_ranks: int, num_micro_batches: int
) -> dict[str, Any]:
    """Bytes that each rank receives per step. They are computed, not measured."""
    frozen: Any = next(p for p in engine.module.parameters() if not p.requires_grad)
    weight_bytes = frozen.element_size()
    trainables = sum(getattr(p, "ds_numel", p.numel()) for p in engine.trainables.values())
    of_others = (num_ranks - 1) / num_ranks
    gradients = of_others * FP32_BYTES * trainables * num_micro_batches
    num_shards = 1
    if engine.stage < 3:
        parameters = of_others * FP32_BYTES * trainables
        rule = (
            "each micro-batch's gradients reduced to their owners, "
            "then the updated trainables gathered once"
        )
    else:
        num_shards = frozen.ds_zero_partition_world_size
        embeddings = head = config.num_embedding_parameters
        weights = weight_bytes * (2 * (layer_parameters(config) + head) + embeddings)
        of_other_shards = (num_shards - 1) / num_shards
        per_micro_batch = of_other_shards * weights + of_others * 2 * FP32_BYTES * trainables
        parameters = num_micro_batches * per_micro_batch
        rule = (
            "per micro-batch: layers, head and trainables gathered in forward and backward, "
            "embeddings in forward, gradients reduced to owners; of frozen weights n is the "
            "number of ranks that divide them"
        )
    return {
        "bytes_per_step": gradients + parameters,
        "gradients": gradients,
        "parameters": parameters,
        "frozen_shards": num_shards,
        "computed_as": f"(n-1)/n of: {rule}",
    }
