"""What a rank keeps of the shapes that it has seen, and of the batches that it has scored."""

import ctypes
import gc
import sys
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor

from faults.emulated_ranks import EmulatedWorld, Scorer
from support.processes import base_environment, run_command
from support.toy_dataset import ToyData
from vico.cli.flags import parse
from vico.data import evaluation_batches
from vico.io.host_memory import NUM_KEPT_PRODUCTS, return_free_memory
from vico.model.batch import PackedBatch
from vico.train.build import read_inputs
from vico.train.evaluate import evaluate

# As a rank begins, then products of 100 shapes, three of which come again.
PRODUCTS = """
from vico.cli.with_world import _prepare_process
from vico.train.config import RunConfig
_prepare_process(RunConfig(), False)
import torch
from vico.model.ops.autograd import linear
w = torch.zeros(32, 32)
for rows in [*range(1, 101), 100, 80, 1]:
    linear(torch.zeros(rows, 32), w)
"""
NUM_PIECES, PIECE_BYTES = 2000, 100_000  # pieces of the heap, not mappings of their own


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs torch with oneDNN")
def test_few_compiled_products_are_kept() -> None:
    """Those of a micro-batch, not those of a thousand shapes before it."""
    environment = base_environment(ONEDNN_VERBOSE="2")
    run = run_command([sys.executable, "-c", PRODUCTS], environment=environment)
    made = [line for line in run.stdouts[0].splitlines() if ",inner_product," in line]
    made = [line.split(",inner_product,")[0] for line in made if ",create:" in line]
    hits = [line.endswith("create:cache_hit,cpu") for line in made]
    assert hits == [False] * 100 + [True, True, False], run.output
    assert NUM_KEPT_PRODUCTS < 100


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_memory_is_returned() -> None:
    """Also that between pieces that are in use."""
    process = psutil.Process()
    pieces = [torch.ones(PIECE_BYTES, dtype=torch.uint8) for _ in range(NUM_PIECES)]
    full_bytes = process.memory_info().rss
    pieces = pieces[::20]
    return_free_memory()
    assert process.memory_info().rss < full_bytes - 0.8 * NUM_PIECES * PIECE_BYTES
    assert all(int(piece[-1]) == 1 for piece in pieces)


class CountingScorer(Scorer):
    """Counts the batches that are in memory at each forward."""

    def __init__(self) -> None:
        self.num_batches: list[int] = []

    def forward(self, batch: PackedBatch) -> Tensor:
        alive = [item for item in gc.get_objects() if isinstance(item, PackedBatch)]
        self.num_batches.append(len(alive))
        return super().forward(batch)


def test_an_evaluation_keeps_no_batches(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation_batches, "EVALUATION_TOKENS", 1)  # a batch per question
    config = parse([*toy.flags, "--output_dir", str(tmp_path / "out")], "vico train", "").resolve()
    world = EmulatedWorld(0, 1, torch.device("cpu"), None)
    scorer = CountingScorer()
    inputs = read_inputs(config, ("val",), world)
    evaluate(scorer, inputs, "val", config, world)  # type: ignore[arg-type]
    assert len(scorer.num_batches) == toy.num_val
    assert scorer.num_batches[-1] <= scorer.num_batches[1] + 1
