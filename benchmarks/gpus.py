"""Peak rates of known GPUs, the denominators of MFU and HFU. A device that is not listed exactly has none: "n/a", never a guess."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """Of one GPU: dense (no sparsity) half-precision tensor-core products with fp32 accumulation."""

    tflops: float
    dtype: str  # "bf16", or "fp16" where the GPU has no bf16 tensor cores
    source: str


_H100 = "NVIDIA H100 Tensor Core GPU datasheet"
_A100 = "NVIDIA A100 Tensor Core GPU datasheet"
_V100 = "NVIDIA V100 Tensor Core GPU datasheet"
_ADA = "NVIDIA Ada GPU architecture whitepaper, appendix A"
_GA102 = "NVIDIA Ampere GA102 GPU architecture whitepaper, appendix A"
_HALF = "; half of the rate printed with sparsity"

# By the name that torch.cuda.get_device_name gives, whole: a MIG slice, a laptop's or an export version is another GPU.
PEAKS: dict[str, Peak] = {
    "NVIDIA H200": Peak(989.0, "bf16", "NVIDIA H200 Tensor Core GPU datasheet (SXM)" + _HALF),
    "NVIDIA H100 80GB HBM3": Peak(989.0, "bf16", _H100 + " (SXM)" + _HALF),
    "NVIDIA H100 PCIe": Peak(756.0, "bf16", _H100 + " (PCIe)" + _HALF),
    "NVIDIA H100 NVL": Peak(835.0, "bf16", _H100 + " (NVL)" + _HALF),
    "NVIDIA A100-SXM4-80GB": Peak(312.0, "bf16", _A100),
    "NVIDIA A100-SXM4-40GB": Peak(312.0, "bf16", _A100),
    "NVIDIA A100 80GB PCIe": Peak(312.0, "bf16", _A100),
    "NVIDIA A100-PCIE-40GB": Peak(312.0, "bf16", _A100),
    "NVIDIA L40S": Peak(362.0, "bf16", "NVIDIA L40S datasheet"),
    "NVIDIA A40": Peak(149.7, "bf16", "NVIDIA A40 datasheet"),
    "NVIDIA A10": Peak(125.0, "bf16", "NVIDIA A10 datasheet"),
    "NVIDIA GeForce RTX 4090": Peak(165.2, "bf16", _ADA),
    "NVIDIA GeForce RTX 3090": Peak(71.0, "bf16", _GA102),
    "Tesla V100-SXM2-16GB": Peak(125.0, "fp16", _V100),
    "Tesla V100-SXM2-32GB": Peak(125.0, "fp16", _V100),
    "Tesla V100-PCIE-16GB": Peak(112.0, "fp16", _V100),
    "Tesla V100-PCIE-32GB": Peak(112.0, "fp16", _V100),
}


def peak_of(device_name: str, precision: str) -> Peak | None:
    """The peak for products in `precision`, or None where it is not known."""
    found = PEAKS.get(device_name)
    if found is None or precision == "fp32" or (found.dtype == "fp16" and precision == "bf16"):
        return None
    return found
