"""Peak memory of one training step in a process of its own: `python -m benchmarks.suites.step_memory VARIANT CONFIG-JSON`.

The last line of stdout is a JSON object: the growth of VmHWM over the step, and what autograd holds after the forward.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline.variants import (
    Packed,
    Plain,
    Variant,
    fill,
    make_fast,
    make_plain,
    random_weights,
)
from benchmarks.measure.clocks import MALLOC_ENVIRONMENT, peak_growth
from benchmarks.measure.workload import SyntheticWorkload
from vico.model.config import LlamaConfig

ROOT = Path(__file__).resolve().parents[2]


def measured(variant: str, shape: LlamaConfig, num_questions: int) -> dict[str, Any]:
    """What a fresh process reports about `variant`, "plain" or "fast"."""
    config = json.dumps({"shape": asdict(shape), "num_questions": num_questions})
    environment = {**os.environ, **MALLOC_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.suites.step_memory", variant, config],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def held_by_backward(run: Callable[[], Any]) -> dict[str, Any]:
    """MiB of the distinct storages that autograd saves during `run`, parameters left out, and the largest kinds."""
    storages: dict[int, tuple[int, str]] = {}
    kept: list[Tensor] = []  # alive, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not (
            tensor.is_leaf and tensor._base is not None
        ):
            storage = tensor.untyped_storage()
            storages.setdefault(
                storage.data_ptr(),
                (storage.nbytes(), f"{'x'.join(map(str, tensor.shape))} {tensor.dtype}"),
            )
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    kinds: Counter[str] = Counter()
    for size, kind in storages.values():
        kinds[kind] += size
    largest = {kind: round(size / 2**20, 1) for kind, size in kinds.most_common(15)}
    return {"held_mib": sum(size for size, _ in storages.values()) / 2**20, "largest_mib": largest}


def _variant(name: str, shape: LlamaConfig) -> Variant:
    cpu = torch.device("cpu")
    variant: Variant = (
        Plain(make_plain(shape, torch.float32), cpu)
        if name == "plain"
        else Packed(make_fast(shape, torch.float32), cpu)
    )
    fill(variant.model, random_weights(variant.model))
    return variant


def main(name: str, config: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    shape = LlamaConfig(**config["shape"])
    variant, workload = _variant(name, shape), SyntheticWorkload(shape.vocab_size)
    work = workload.training(1, config["num_questions"])
    variant.train(workload.training(0, 1))  # what is loaded or made once, in small
    variant.model.zero_grad(set_to_none=True)
    growth = peak_growth(lambda: variant.train(work))
    variant.model.zero_grad(set_to_none=True)
    print(
        json.dumps(
            {"variant": variant.name, **growth, **held_by_backward(lambda: variant.train(work))}
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
