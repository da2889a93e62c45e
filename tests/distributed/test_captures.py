"""CUDA graphs are captured by all ranks in one step, or by none: real models, emulated ranks."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import torch
from torch import Tensor

from benchmarks.baseline.models import random_weights, set_weights
from benchmarks.baseline.variants import training_batch
from benchmarks.measure.workload import SyntheticWorkload
from faults.emulated_ranks import EmulatedWorld, Exchange
from vico.data.batching import Step
from vico.model.attention.backends import KERNELS
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.vico import ViCo
from vico.train.engine import Engine
from vico.train.step import train_step

CONFIG = LlamaConfig(64, 3, 4, 300, multiple_of=16)
WORK = SyntheticWorkload(300)
BATCHES = [training_batch(WORK.training(place, 1)) for place in (0, 3, 7)]
# What each rank runs in a step: the second has one micro-batch, and a dummy in the other's place.
SHARES = [(BATCHES[0], BATCHES[1]), (BATCHES[2],)]
DUMMY = BATCHES[0]


class Graphs(GraphedBlocks):
    """As on a GPU, but for the memory that it reads and the capture itself, which CPUs have not."""

    memory_suffices = True
    num_captures = 0

    def has_room(self, *kept_bytes: int) -> bool:
        return self.memory_suffices

    def capture(self, *functions: Callable[[], None]) -> list[Callable[[], None]]:
        self.num_captures += 1
        return [*functions]


class OneProcessEngine:
    """A model without DeepSpeed; whether it captures is decided by the engine's own methods."""

    can_capture, allow_captures = Engine.can_capture, Engine.allow_captures

    def __init__(self) -> None:
        self.module = ViCo(CONFIG, 3, 10, 10, 100.0, torch.float32)
        set_weights(self.module, random_weights(self.module))
        choose_block_runners(self.module, PackedAttention(KERNELS["sdpa"]))
        self.module.graphed = self._graphed = self.graphs = Graphs(self.module)

    def train(self, mode: bool) -> None:
        self.module.train(mode)

    def forward(self, batch: PackedBatch) -> Tensor:
        losses: Tensor = self.module(batch)
        return losses

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def step(self, lr: float) -> tuple[float, bool]:
        for entry in self.graphs.entries.values():
            entry.kept_bytes = 1  # as a GPU's allocator says after a forward
        return 0.0, True


def test_all_ranks_capture_in_one_step_or_none_does() -> None:
    """A rank that runs a dummy takes part, and one without memory keeps the other from it."""
    exchange, engines = Exchange(2), [OneProcessEngine(), OneProcessEngine()]

    def run(rank: int) -> list[float]:
        counts = torch.ones(2, dtype=torch.int64)
        share = Step(SHARES[rank], DUMMY, counts, 1)
        world = EmulatedWorld(rank, 2, torch.device("cpu"), None, exchange=exchange)
        engine = cast(Engine, engines[rank])
        return train_step(engine, share, 1, (1.0, 0.5), 0.0, world).loss_sums

    def captures_after_a_step() -> list[int]:
        with ThreadPoolExecutor(2) as pool:
            losses.extend(pool.map(run, range(2)))
        return [engine.graphs.num_captures for engine in engines]

    losses: list[list[float]] = []
    assert captures_after_a_step() == [0, 0], "each size has run once"
    engines[1].graphs.memory_suffices = False
    assert captures_after_a_step() == [0, 0]
    engines[1].graphs.memory_suffices = True
    num_sizes = [len(engine.graphs.entries) for engine in engines]
    assert captures_after_a_step() == num_sizes and all(num_sizes)
    engines[0].graphs.memory_suffices = False
    assert captures_after_a_step() == num_sizes, "nothing is due: all are replayed"
    for sums in losses:
        torch.testing.assert_close(torch.tensor(sums), torch.tensor(losses[0]))
