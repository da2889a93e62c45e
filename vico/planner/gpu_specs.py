"""What is known of GPUs: memory that a program sees, peak rates, links. What is not listed is None and prints "n/a", never a guess."""

from dataclasses import dataclass, replace

from vico.errors import UserError, nearest

GIB = 2**30
VISIBLE_SHARE = (
    0.98  # of the nominal size, when only the size is given: cards show programs 0.8 to 2 % less
)


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU. Rates are those of the datasheets: dense half-precision products, one direction of a link."""

    name: str
    memory_gib: float  # as torch.cuda.get_device_properties shows it
    tflops: float | None = None  # of products in `peak_precision`, accumulated in fp32
    peak_precision: str = "bf16"
    link_gb: float | None = (
        None  # GB/s between the GPUs of a node: NVLink through a switch; None where it depends on the machine
    )
    host_gb: float | None = None  # GB/s from the host's memory: PCI Express, 16 lanes
    torch_names: tuple[str, ...] = ()

    def peak(self, precision: str) -> float | None:
        half = precision in ("bf16", "fp16")
        return (
            self.tflops if half and (self.peak_precision == "bf16" or precision == "fp16") else None
        )


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H200", 139.8, 989.0, "bf16", 450.0, 64.0, ("NVIDIA H200",)),
        Gpu("H100", 79.1, 989.0, "bf16", 450.0, 64.0, ("NVIDIA H100 80GB HBM3",)),
        Gpu("H100-PCIe", 79.1, 756.0, "bf16", None, 64.0, ("NVIDIA H100 PCIe",)),
        Gpu("A100-80", 79.1, 312.0, "bf16", 300.0, 32.0, ("NVIDIA A100-SXM4-80GB",)),
        Gpu("A100-40", 39.4, 312.0, "bf16", 300.0, 32.0, ("NVIDIA A100-SXM4-40GB",)),
        Gpu("A100-80-PCIe", 79.1, 312.0, "bf16", None, 32.0, ("NVIDIA A100 80GB PCIe",)),
        Gpu("A100-40-PCIe", 39.4, 312.0, "bf16", None, 32.0, ("NVIDIA A100-PCIE-40GB",)),
        Gpu("L40S", 44.3, 362.0, "bf16", None, 32.0, ("NVIDIA L40S",)),
        Gpu("A40", 44.3, 149.7, "bf16", None, 32.0, ("NVIDIA A40",)),
        Gpu("A10", 22.0, 125.0, "bf16", None, 32.0, ("NVIDIA A10",)),
        Gpu("RTX4090", 23.5, 165.2, "bf16", None, 32.0, ("NVIDIA GeForce RTX 4090",)),
        Gpu("RTX3090", 23.5, 71.0, "bf16", None, 32.0, ("NVIDIA GeForce RTX 3090",)),
        Gpu("V100-16", 15.7, 125.0, "fp16", 150.0, 16.0, ("Tesla V100-SXM2-16GB",)),
        Gpu("V100-32", 31.7, 125.0, "fp16", 150.0, 16.0, ("Tesla V100-SXM2-32GB",)),
    )
}


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
    """The GPU of this short or full name. Raises UserError for one that is not known."""
    wanted = name.lower().replace(" ", "")
    for gpu in GPUS.values():
        if wanted in (
            gpu.name.lower(),
            *(full.lower().replace(" ", "") for full in gpu.torch_names),
        ):
            return gpu
    raise UserError(
        f"--gpu {name}: not in the table ({', '.join(GPUS)}){nearest(name, GPUS)}; give --gpu_memory GIB instead"
    )


def detected_gpu(full_name: str, memory_bytes: int) -> Gpu:
    """The GPU that torch found, with the memory that it shows; its rates, where the name is known."""
    known = next(
        (gpu for gpu in GPUS.values() if full_name in gpu.torch_names), Gpu(full_name, 0.0)
    )
    return replace(known, memory_gib=memory_bytes / GIB)


def gpu_of_size(gib: float) -> Gpu:
    """A GPU of which only the nominal memory is known."""
    return Gpu(f"{gib:g} GB", gib * VISIBLE_SHARE)
