"""One rank of test_scale.py: loads a backbone under ZeRO-3, and prints its memory in MiB as JSON.

growth: of the anonymous memory, at its peak; share: what this rank keeps; largest: of one tensor.
"""

import json
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch

from vico.distributed import world as dist
from vico.model.vico import ViCo
from vico.model.weights.load import open_weights
from vico.train.ds_config import read_config
from vico.train.engine import load_parameter, zero_init

MIB = 2**20


def anonymous_memory() -> float:
    """In MiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kib = status.partition("RssAnon:")[2].split()[0]
    return int(kib) / 1024


def main(folder: Path, ds_config: str) -> None:
    world = dist.connect()
    weights = open_weights(folder, None)
    config = read_config(ds_config, "fp32", 1, 1, world.size)
    torch.ones(2**20).sum()  # starts torch's threads, which take memory
    samples, done = [anonymous_memory()], threading.Event()

    def watch() -> None:
        while not done.is_set():
            samples.append(anonymous_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    with zero_init(config, world.device):
        model = ViCo(weights.config, weights.config.n_layers, 10, 10, 100.0, torch.float32)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            load_parameter(parameter, partial(weights.read_slice, name))
    done.set()
    watcher.join()
    samples.append(anonymous_memory())  # on a busy machine the watcher may not have run at all
    share = sum(p.ds_tensor.numel() * 4 for p in model.parameters()) / MIB
    largest = max(p.ds_numel * 4 for p in model.parameters()) / MIB
    print(json.dumps({"growth": max(samples) - samples[0], "share": share, "largest": largest}))
    dist.disconnect(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
