"""What is known about GPUs: the memory that a program sees, peak rates, links.

An unknown number is None and prints "n/a"; none is guessed.
"""

import re
from dataclasses import dataclass, replace

from vico.errors import UserError, nearest, show

GIB = 2**30
# Of the nominal size, if only that is known: cards show programs 0.8 to 2 % less.
VISIBLE_SHARE = 0.98


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Rates are those of the datasheets: dense half-precision products, one direction of a link.
    """

    name: str
    memory_gib: float  # as torch.cuda.get_device_properties shows it
    tflops: float | None = None  # of products in `peak_precision`, accumulated in fp32
    peak_precision: str = "bf16"
    # GB/s between the GPUs of a node: NVLink through a switch. None: depends on the machine.
    link_gb: float | None = None
    host_gb: float | None = None  # GB/s from the host's memory: PCI Express, 16 lanes
    torch_names: tuple[str, ...] = ()

    def peak(self, precision: str) -> float | None:
        """TFLOP/s in this precision; None if unknown."""
        if precision == "fp16" or precision == self.peak_precision == "bf16":
            return self.tflops
        return None


# Sources: NVIDIA's datasheets of H200, H100, A100, L40S, L4, A40, A10, V100 and T4 ("with sparsity"
# halved), that of HGX B200 (2024: 2.25 PFLOP/s dense and 1.8 TB/s of NVLink, both ways, per GPU),
# the GA102 whitepaper (A6000 and RTX 3090, accumulated in fp32), the Ada whitepaper (RTX 4090), and
# the RTX Blackwell whitepaper (RTX 5090: 209.5 TFLOP/s accumulated in fp32).
_KNOWN_GPUS = (
    Gpu("B200", 178.3, 2250.0, "bf16", 900.0, 64.0, ("NVIDIA B200",)),
    Gpu("H200", 139.8, 989.0, "bf16", 450.0, 64.0, ("NVIDIA H200",)),
    Gpu("H100", 79.1, 989.0, "bf16", 450.0, 64.0, ("NVIDIA H100 80GB HBM3",)),
    Gpu("H100-PCIe", 79.1, 756.0, "bf16", None, 64.0, ("NVIDIA H100 PCIe",)),
    Gpu("A100-80", 79.1, 312.0, "bf16", 300.0, 32.0, ("NVIDIA A100-SXM4-80GB",)),
    Gpu("A100-40", 39.4, 312.0, "bf16", 300.0, 32.0, ("NVIDIA A100-SXM4-40GB",)),
    Gpu("A100-80-PCIe", 79.1, 312.0, "bf16", None, 32.0, ("NVIDIA A100 80GB PCIe",)),
    Gpu("A100-40-PCIe", 39.4, 312.0, "bf16", None, 32.0, ("NVIDIA A100-PCIE-40GB",)),
    Gpu("L40S", 44.3, 362.0, "bf16", None, 32.0, ("NVIDIA L40S",)),
    Gpu("L4", 22.0, 121.0, "bf16", None, 32.0, ("NVIDIA L4",)),
    Gpu("A6000", 47.4, 154.8, "bf16", None, 32.0, ("NVIDIA RTX A6000", "RTX A6000")),
    Gpu("A40", 44.3, 149.7, "bf16", None, 32.0, ("NVIDIA A40",)),
    Gpu("A10", 22.0, 125.0, "bf16", None, 32.0, ("NVIDIA A10",)),
    Gpu("RTX5090", 31.3, 209.5, "bf16", None, 64.0, ("NVIDIA GeForce RTX 5090",)),
    Gpu("RTX4090", 23.5, 165.2, "bf16", None, 32.0, ("NVIDIA GeForce RTX 4090",)),
    Gpu("RTX3090", 23.5, 71.0, "bf16", None, 32.0, ("NVIDIA GeForce RTX 3090",)),
    Gpu("V100-16", 15.7, 125.0, "fp16", 150.0, 16.0, ("Tesla V100-SXM2-16GB",)),
    Gpu("V100-32", 31.7, 125.0, "fp16", 150.0, 16.0, ("Tesla V100-SXM2-32GB",)),
    Gpu("T4", 14.5, 65.0, "fp16", None, 16.0, ("Tesla T4",)),
)
GPUS = {gpu.name: gpu for gpu in _KNOWN_GPUS}
# Of these, the GPUs with matrix units for fp8: compute capability 8.9 or newer.
FP8_GPUS = ("B200", "H200", "H100", "H100-PCIe", "L40S", "L4", "RTX5090", "RTX4090")


@dataclass(frozen=True)
class Hardware:
    """Equal GPUs on equal nodes."""

    gpu: Gpu
    gpus: int = 1  # per node
    nodes: int = 1
    network_gbit: float | None = None  # per node; None: not known
    host_gib: float | None = None  # per node; None: not known

    @property
    def ranks(self) -> int:
        return self.gpus * self.nodes

    def __str__(self) -> str:
        count = f"{self.nodes} x {self.gpus}" if self.nodes > 1 else str(self.gpus)
        return f"{count} x {self.gpu.name}"


def gpu_by_name(name: str) -> Gpu:
    """The GPU of this short or full name, or of this size ("24GB").

    A name of several (V100, A100) is the one with the least memory. Raises UserError for an unknown
    one.
    """
    key = _key(name)
    for gpu in GPUS.values():
        if key in map(_key, (gpu.name, *gpu.torch_names)):
            return gpu
    if (gib := gib_of(name)) is not None:
        return gpu_of_size(gib)
    kinds = [gpu for gpu in GPUS.values() if _key(gpu.name).startswith(f"{key}-")]
    if kinds:
        return min(kinds, key=lambda gpu: gpu.memory_gib)
    raise UserError(
        f"--gpu {show(name)[1:-1]}: not in the table ({', '.join(GPUS)}){nearest(name, GPUS)}; "
        "give --gpu_memory GIB instead"
    )


def _key(name: str) -> str:
    """Without the maker's words and spaces: "NVIDIA GeForce RTX 4090" and "4090" are rtx4090."""
    key = re.sub(r"nvidia|geforce|tesla|[ _]", "", name.lower())
    key = re.sub(r"^rtx-?a", "a", key)
    return re.sub(r"^(rtx-?)?(?=[3-5]0[0-9]{2}$)", "rtx", key)


def gib_of(text: str) -> float | None:
    """The GiB of "24GB", "24 GiB" or "24G"; None for another text. GB and GiB are the same here.

    The makers' GB of a GPU are GiB.
    """
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?(?:g|gb|gib)", text.strip().lower())
    return float(match[1]) if match else None


def detected_gpu(full_name: str, memory_bytes: int) -> Gpu:
    """The GPU that torch found, with the memory that it shows, and its rates if it is known."""
    known = Gpu(full_name, 0.0)
    for gpu in GPUS.values():
        if full_name in gpu.torch_names:
            known = gpu
    return replace(known, memory_gib=memory_bytes / GIB)


def gpu_of_size(gib: float) -> Gpu:
    """A GPU of which only the nominal memory is known."""
    return Gpu(f"{gib:g} GB", gib * VISIBLE_SHARE)
