"""Peak memory of one training step, in a process of its own.

`python -m benchmarks.suites.step_memory VARIANT CONFIG-JSON` prints a JSON object as its last line:
the growth of VmHWM over the step, and what autograd saves for the backward pass.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from benchmarks.baseline.models import make_fast, make_plain, random_weights, set_weights
from benchmarks.baseline.variants import Packed, Plain, Variant
from benchmarks.measure.memory import MALLOC_ENVIRONMENT, peak_growth
from benchmarks.measure.workload import SyntheticWorkload
from benchmarks.paths import ROOT
from vico.model.config import LlamaConfig

NUM_LARGEST = 15


def step_memory(variant: str, config: LlamaConfig, num_questions: int) -> dict[str, Any]:
    """What a fresh process reports about `variant`, "plain" or "fast"."""
    arguments = json.dumps({"config": asdict(config), "num_questions": num_questions})
    completed = subprocess.run(
        [sys.executable, "-m", "benchmarks.suites.step_memory", variant, arguments],
        env={**os.environ, **MALLOC_ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    report: dict[str, Any] = json.loads(completed.stdout.splitlines()[-1])
    return report


def saved_for_backward(run: Callable[[], Any]) -> dict[str, Any]:
    """MiB of the distinct storages that autograd saves during `run`, and its largest kinds.

    Parameters and views of them are left out.
    """
    storages: dict[int, tuple[int, str]] = {}
    alive: list[Tensor] = []  # no address is used twice while its tensor is alive

    def note(tensor: Tensor) -> Tensor:
        is_view_of_leaf = tensor.is_leaf and tensor._base is not None
        if not isinstance(tensor, torch.nn.Parameter) and not is_view_of_leaf:
            storage = tensor.untyped_storage()
            kind = f"{'x'.join(map(str, tensor.shape))} {tensor.dtype}"
            storages.setdefault(storage.data_ptr(), (storage.nbytes(), kind))
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        run()
    bytes_by_kind: Counter[str] = Counter()
    for num_bytes, kind in storages.values():
        bytes_by_kind[kind] += num_bytes
    largest = bytes_by_kind.most_common(NUM_LARGEST)
    return {
        "held_mib": bytes_by_kind.total() / 2**20,
        "largest_mib": {kind: round(num_bytes / 2**20, 1) for kind, num_bytes in largest},
    }


def _make_variant(name: str, config: LlamaConfig) -> Variant:
    variant: Variant
    if name == "plain":
        variant = Plain(make_plain(config, torch.float32), torch.device("cpu"))
    else:
        variant = Packed(make_fast(config, torch.float32), torch.device("cpu"))
    set_weights(variant.model, random_weights(variant.model))
    return variant


def main(name: str, config: LlamaConfig, num_questions: int) -> None:
    torch.set_num_threads(1)
    variant, workload = _make_variant(name, config), SyntheticWorkload(config.vocab_size)
    work = workload.training(1, num_questions)
    # Loads what is loaded once, with a small batch.
    variant.train(workload.training(0, 1))
    variant.model.zero_grad(set_to_none=True)
    growth = peak_growth(lambda: variant.train(work))
    variant.model.zero_grad(set_to_none=True)
    saved = saved_for_backward(lambda: variant.train(work))
    print(json.dumps({"variant": variant.name, **growth, **saved}))


if __name__ == "__main__":
    arguments = json.loads(sys.argv[2])
    main(sys.argv[1], LlamaConfig(**arguments["config"]), arguments["num_questions"])
