"""A run whose steps are not made: what its loop logs, saves and says needs no model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from faults.emulated_ranks import EmulatedWorld
from vico.checkpoint.format import TrainState
from vico.checkpoint.write import RunIdentity
from vico.data.text_windows import NO_TEXTS
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.start import Run

PER_EPOCH = 4


def run_of(
    out: Path,
    *,
    rank: int = 0,
    device: str = "cpu",
    state: TrainState | None = None,
    evaluated: str | None = "val",
    **flags: Any,
) -> Run:
    """Epochs of four steps of 8 questions, of two tasks; by default at its first step."""
    state = state or TrainState(0, 8, 0, None, [0.0] * 2, [0] * 2)
    config = RunConfig(output_dir=out, lr=0.5, report_to="none", **flags)
    world = EmulatedWorld(rank, 1, torch.device(device), None)
    steps: Any = SimpleNamespace(steps_per_epoch=PER_EPOCH, questions_per_step=8)
    files = SimpleNamespace(check_unchanged=lambda: None)
    inputs: Any = SimpleNamespace(
        texts=NO_TEXTS, num_without_caption=3, stage="ZeRO-2", files=files
    )
    engine: Any = SimpleNamespace(trainables={}, attention="plain")
    parts = (config, world, OutputDir(out), inputs, engine, steps, state)
    run = Run(*parts, RunIdentity("r", {}, {}), True, evaluated)
    vars(run)["evaluation_batches"] = "batches"
    return run
