"""`vico env`: what this machine has and would use, as text and, in the last line, as JSON."""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vico.cli.parser import OneLineParser
from vico.cli.version import ROOT, version
from vico.distributed import launcher_env
from vico.errors import UserError
from vico.io import log
from vico.io.host_memory import limit_kept_products

DESCRIPTION = (
    "Show versions, devices, and which attention, kernels and quantization would run here, and "
    "why. The last line is one JSON object. Nothing is loaded or written."
)
LIBRARIES = """
    torch deepspeed numpy safetensors sentencepiece tensorboard pyyaml psutil tqdm triton
""".split()
# Extra: its packages (setup.py).
EXTRAS = {
    "llama3": ("tiktoken", "tokenizers"),
    "quantized": ("bitsandbytes",),
    "flash": ("flash-attn",),
    "data": ("h5py", "pandas", "pyarrow"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "video": ("av", "transformers"),
    "captions": ("pycocoevalcap", "pycocotools"),
    "report": ("plotly",),
}
PREFIXES = ("VICO_", "NCCL_", "GLOO_", "OMP_", "CUDA_VISIBLE", "DS_ACCELERATOR", "SLURM_JOB_ID")


def main(argv: Sequence[str]) -> int:
    parser = OneLineParser(prog="vico env", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.parse_args(argv)
    limit_kept_products()
    facts: dict[str, Any] = {
        "vico": version(),
        "checkout": str(ROOT),
        "python": f"{platform.python_version()} at {sys.executable}",
        "system": f"{platform.platform()}, {len(os.sched_getaffinity(0))} cores",
        "libraries": {name: installed(name) for name in LIBRARIES},
        "extras": {extra: _packages(names) for extra, names in EXTRAS.items()},
        "devices": _tried(_devices),
        "computed by": _tried(_computed_by),
        "quantization": _tried(_quantization),
        "deepspeed ops": _tried(_deepspeed_ops),
        "ranks": _ranks(),
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES)},
    }
    log.fields({name: _text(value) for name, value in facts.items()})
    log.info(json.dumps(facts))
    return 0


def installed(package: str) -> str | None:
    """The version of an installed package; None: it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tried(find: Callable[[], Any]) -> Any:
    """What `find` returns; where a library is missing or broken, that."""
    try:
        return find()
    except (ImportError, OSError) as problem:
        return f"unknown: {problem}"


def _packages(names: Sequence[str]) -> dict[str, str | None]:
    return {name: installed(name) for name in names}


def _text(value: Any) -> str:
    """A fact as the user reads it: entries of a mapping or list stand on lines of their own."""
    if isinstance(value, dict):
        lines = [f"  {name:<13} {_entry(entry)}" for name, entry in value.items()]
    elif isinstance(value, list):
        lines = [f"  {entry}" for entry in value]
    else:
        return str(value)
    return "\n" + "\n".join(lines) if lines else "none"


def _entry(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_entry(entry)}" for name, entry in value.items())
    return "not installed" if value is None else str(value)


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        return [f"cpu (no GPU that torch {torch.__version__} can use)"]
    devices = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.1f} GiB, compute capability {gpu.major}.{gpu.minor}"
        devices.append(f"cuda:{index} {gpu.name}, {size}, CUDA {torch.version.cuda}")
    return devices


def _computed_by() -> dict[str, str]:
    """By precision: the attention and the kernels of a run with --attention auto, and why."""
    import torch

    from vico.model.attention.backends import choose_attention
    from vico.model.block_runners import why_no_graphs_on
    from vico.model.ops import triton_ops
    from vico.train.backbone import DTYPES

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    chosen = {}
    for precision, dtype in DTYPES.items():
        _, attention = choose_attention("auto", device, dtype)
        chosen[precision] = f"{attention}, {triton_ops.describe(device)}"
    reason = why_no_graphs_on(device)
    chosen["CUDA graphs"] = (
        f"no ({reason})" if reason else "yes, with --attention varlen or segment"
    )
    return chosen


def _quantization() -> str:
    import torch

    from vico.model.config import QUANTIZATIONS
    from vico.model.quantized_linear import require_available

    available, reasons = [], []
    for kind in QUANTIZATIONS:
        try:
            require_available(kind, torch.bfloat16)
            available.append(kind)
        except UserError as error:
            reasons.append(f"no {kind}: {error}")
    return "; ".join([", ".join(available) or "none", *reasons])


def _deepspeed_ops() -> str:
    with contextlib.redirect_stdout(io.StringIO()):  # it says which accelerator it found
        from deepspeed.git_version_info import installed_ops
    built = [name for name, is_built in installed_ops.items() if is_built]
    return f"{', '.join(built) or 'none'} built in advance; ViCo's configs need none"


def _ranks() -> dict[str, Any]:
    """What the launcher's variables say about this process."""
    return {
        "launcher": launcher_env.launcher_name(),
        **{
            name: os.environ.get(name) for name in launcher_env.RANK_VARIABLES if name in os.environ
        },
    }


if __name__ == "__main__":  # `python -m vico.cli.env`, or this file
    from vico.cli.main import console

    console(command="env")
