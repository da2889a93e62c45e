"""Datasheets of the peak rates that MFU and HFU refer to. vico/planner/gpu_specs.py has the rates.

A device whose exact name is not there has no peak: its metrics are "n/a", never a guess.
"""

from dataclasses import dataclass

from vico.planner.gpu_specs import FP8_GPUS, GPUS

_HALF = "; half of the rate printed with sparsity"
# By the short name of vico/planner/gpu_specs.py.
SOURCES = {
    "B200": "NVIDIA HGX B200 datasheet" + _HALF,
    "H200": "NVIDIA H200 Tensor Core GPU datasheet (SXM)" + _HALF,
    "H100": "NVIDIA H100 Tensor Core GPU datasheet (SXM)" + _HALF,
    "H100-PCIe": "NVIDIA H100 Tensor Core GPU datasheet (PCIe)" + _HALF,
    "A100-80": "NVIDIA A100 Tensor Core GPU datasheet",
    "A100-40": "NVIDIA A100 Tensor Core GPU datasheet",
    "A100-80-PCIe": "NVIDIA A100 Tensor Core GPU datasheet",
    "A100-40-PCIe": "NVIDIA A100 Tensor Core GPU datasheet",
    "L40S": "NVIDIA L40S datasheet",
    "L4": "NVIDIA L4 datasheet" + _HALF,
    "A6000": "NVIDIA Ampere GA102 GPU architecture whitepaper, RTX A6000",
    "A40": "NVIDIA A40 datasheet",
    "A10": "NVIDIA A10 datasheet",
    "RTX5090": "NVIDIA RTX Blackwell GPU architecture whitepaper",
    "RTX4090": "NVIDIA Ada GPU architecture whitepaper, appendix A",
    "RTX3090": "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A",
    "V100-16": "NVIDIA V100 Tensor Core GPU datasheet (SXM2)",
    "V100-32": "NVIDIA V100 Tensor Core GPU datasheet (SXM2)",
    "T4": "NVIDIA T4 datasheet",
}


@dataclass(frozen=True)
class PeakRate:
    """Of one GPU: dense (no sparsity) half-precision tensor-core products, accumulated in fp32."""

    tflops: float
    dtype: str  # "bf16", or "fp16" where the GPU has no bf16 tensor cores
    source: str


def peak_rate(device_name: str, precision: str) -> PeakRate | None:
    """The peak for products in `precision`, or None if unknown.

    A MIG slice or a laptop's GPU has another name: it is another device.
    """
    for gpu in GPUS.values():
        if device_name not in gpu.torch_names:
            continue
        tflops = gpu.peak(precision)
        if tflops is not None:
            return PeakRate(tflops, gpu.peak_precision, SOURCES[gpu.name])
    return None


def fp8_peak_tflops(device_name: str) -> float | None:
    """Dense, accumulated in fp32: in the same datasheets twice the rate of half precision."""
    peak = peak_rate(device_name, "bf16")
    has_fp8 = any(device_name in GPUS[name].torch_names for name in FP8_GPUS)
    return 2 * peak.tflops if peak and has_fp8 else None
