"""How fast a run can be, modelled from datasheet rates and a stated share of them."""

import math
from dataclasses import dataclass

from vico.model.config import FP8
from vico.planner.memory import ITEMSIZE
from vico.planner.request import PlanRequest, Stage

# Of the time of products, what ZeRO-3's own work adds: the host's waits before each block, and
# gathered parts that are copied into whole weights on the units that compute. For a block of 65B
# 1.4 ms of copies beside 5.7 ms of products of 2,320 rows, partly hidden. Estimated at 8 to 15 %,
# not measured.
ZERO3_PENALTY = 0.12
LINK_SHARE = 0.8  # share of a link's datasheet rate that a gather reaches


@dataclass(frozen=True)
class Speed:
    """Modelled, not measured."""

    tokens_per_second: float  # real tokens, all GPUs
    epoch_seconds: float
    compute_seconds: float  # of a micro-batch
    gather_seconds: float


def estimate_speed(
    request: PlanRequest, stage: Stage, num_checkpointed: int, max_tokens: int
) -> tuple[Speed | None, str]:
    """(the speed, "") or (None, the rate that is unknown).

    Products and gathers overlap: the slower of them decides.
    """
    if unknown := _unknown_rate(request, stage):
        return None, unknown
    hardware, lengths = request.hardware, request.lengths
    num_micro_batches = math.ceil(request.step_tokens / max_tokens)
    tokens = request.step_tokens / num_micro_batches
    tflops = hardware.gpu.peak(request.precision)
    assert tflops is not None
    flops = _flops_per_token(request, num_checkpointed) * tokens
    compute_seconds = flops / (tflops * 1e12 * request.efficiency)
    if stage != "zero2":
        compute_seconds *= 1 + ZERO3_PENALTY
    gather_seconds = _gather_seconds(request, stage)
    rate = hardware.ranks * tokens / max(compute_seconds, gather_seconds)
    epoch_seconds = lengths.questions * lengths.both / rate
    return Speed(rate, epoch_seconds, compute_seconds, gather_seconds), ""


def _unknown_rate(request: PlanRequest, stage: Stage) -> str:
    """What must be known for a speed and is not; "" if nothing is."""
    hardware, gpu = request.hardware, request.hardware.gpu
    if request.quantize == FP8:
        return f"how fast {gpu.name} trains in fp8"
    if request.quantize is not None:
        return f"how fast {gpu.name} dequantizes weights"
    if gpu.peak(request.precision) is None:
        return f"the rate of {gpu.name} in {request.precision}"
    if stage == "zero2":
        return ""
    if hardware.gpus > 1 and gpu.link_gb is None:
        return "the link between the GPUs (--link)"
    if hardware.nodes > 1 and not request.node_shards and hardware.network_gbit is None:
        return "the network of a node (--network)"
    if stage == "zero3_offload" and gpu.host_gb is None:
        return f"the link of {gpu.name} to the host"
    return ""


def _flops_per_token(request: PlanRequest, num_checkpointed: int) -> float:
    """Two FLOPs per parameter in forward, two in backward (of inputs only), two in recomputation.

    The output head computes the rows with a target only.
    """
    config = request.config
    layers = config.n_layers * config.num_block_parameters
    head = config.num_embedding_parameters * request.lengths.target_share
    # The frozen model runs forward over the texts of --keep.
    frozen_layers = 2 * layers * request.lengths.text / request.lengths.both
    frozen_head = 2 * config.num_embedding_parameters * request.lengths.kept_share
    recomputed = 2 * layers * num_checkpointed / config.n_layers
    return 4 * (layers + head) + recomputed + frozen_layers + frozen_head


def _gather_seconds(request: PlanRequest, stage: Stage) -> float:
    """ZeRO-3 gathers all weights twice per micro-batch, over the slowest of the links. The frozen
    pass of --keep gathers them once more, without the output head.

    With shards in each node, no gather crosses the network.
    """
    if stage == "zero2":
        return 0.0
    hardware, config = request.hardware, request.config
    numbers = 2 * config.num_parameters
    if request.lengths.text:
        numbers += config.num_parameters - config.num_embedding_parameters
    num_bytes = numbers * ITEMSIZE[request.precision]
    rates = [math.inf]  # GB/s
    if hardware.gpus > 1 and hardware.gpu.link_gb:
        rates.append(hardware.gpu.link_gb)
    if hardware.nodes > 1 and hardware.network_gbit and not request.node_shards:
        rates.append(hardware.network_gbit / 8)
    received = num_bytes * (request.num_shards - 1) / request.num_shards
    seconds = received / (min(rates) * 1e9 * LINK_SHARE)
    if stage == "zero3_offload" and hardware.gpu.host_gb:
        from_host = num_bytes / hardware.ranks
        seconds = max(seconds, from_host / (hardware.gpu.host_gb * 1e9 * LINK_SHARE))
    return seconds
