"""How fast this machine multiplies matrices and copies memory, measured in the same run."""

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure.clocks import Clock, cpu_seconds
from benchmarks.measure.hardware import gpu_state
from benchmarks.measure.spreads import spread
from vico.model.ops import fp8
from vico.model.ops.autograd import linear

WARMUP_CALLS = 3
CALLS_IN_A_ROW = 20
SUSTAINED_SECONDS = 10.0


def cpu_ceilings(repeats: int = 5) -> dict[str, float]:
    """Ceilings of one thread, the best of `repeats` calls each.

    An fp32 product by torch's default library and by the library that ViCo chooses (GFLOP/s), and
    a copy (GB/s read and written).
    """
    size = 1536
    a, b = torch.randn(size, size), torch.randn(size, size)
    rates = []
    for product in (lambda: a @ b, lambda: linear(a, b)):
        seconds = min(cpu_seconds(product)[0] for _ in range(repeats))
        rates.append(2 * size**3 / seconds / 1e9)
    source = torch.randn(32 * 2**20)
    target = torch.empty_like(source).fill_(0)
    copy_seconds = min(cpu_seconds(lambda: target.copy_(source))[0] for _ in range(repeats))
    return {
        "matmul_gflops": max(rates),
        "default_matmul_gflops": rates[0],
        "vico_matmul_gflops": rates[1],
        "copy_gb_per_second": 2 * source.numel() * 4 / copy_seconds / 1e9,
    }


def device_ceilings(
    device: torch.device,
    dtype: torch.dtype,
    size: int,
    copy_mib: int,
    repeats: int = 20,
    sustained_seconds: float = 0.0,
) -> dict[str, Any]:
    """Median rates of a device.

    A square product of `size` in `dtype` (TFLOP/s), and a copy of `copy_mib` MiB within its memory
    (GB/s read and written). With `sustained_seconds`, also the product's rate in the second half of
    so long a loop, when clocks have settled, and the GPUs' clocks and power at its end.
    """
    clock = Clock(device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    source = torch.randn(copy_mib * 2**18, device=device)
    target = torch.empty_like(source)
    for run in (lambda: a @ b, lambda: target.copy_(source)):
        for _ in range(WARMUP_CALLS):
            run()
    sustained = sustained_rate(lambda: a @ b, device, sustained_seconds)
    product = spread([clock.time(lambda: a @ b) for _ in range(repeats)])
    copy = spread([clock.time(lambda: target.copy_(source)) for _ in range(repeats)])
    return {
        "product": f"{str(dtype).removeprefix('torch.')} {size} x {size} x {size}",
        "matmul_tflops": 2 * size**3 / product["median"] / 1e12,
        "matmul_seconds": product,
        **({"sustained_matmul_tflops": 2 * size**3 * sustained / 1e12} if sustained else {}),
        **(gpu_state() if sustained else {}),
        "copy_gb_per_second": 2 * source.numel() * 4 / copy["median"] / 1e9,
        "copy_seconds": copy,
    }


def fp8_product_tflops(
    device: torch.device, dtype: torch.dtype, size: int, repeats: int = 20
) -> float:
    """Median rate of a square product in fp8 with scales by row, of tensors quantized before."""
    clock = Clock(device)
    rows = fp8.quantize_rows(torch.randn(size, size, device=device).to(dtype))
    weight = fp8.quantize_weight(torch.randn(size, size, device=device).to(dtype))
    for _ in range(WARMUP_CALLS):
        fp8.scaled_product(rows, weight)
    times = [clock.time(lambda: fp8.scaled_product(rows, weight)) for _ in range(repeats)]
    return float(2 * size**3 / spread(times)["median"] / 1e12)


def sustained_rate(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Calls per second in the second half of a loop of `seconds`; 0 without a loop."""
    start = time.perf_counter()
    half = start + seconds / 2
    counted, since = 0, start
    while (now := time.perf_counter()) < start + seconds:
        if now < half:
            counted, since = 0, now
        for _ in range(CALLS_IN_A_ROW):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        counted += CALLS_IN_A_ROW
    return counted / (time.perf_counter() - since) if counted else 0.0
