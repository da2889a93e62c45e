"""The checkpoint store alone, with small tensors that hold their step: for faults of disks."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from support.toy_run import stray_files
from vico.checkpoint.format import MOMENTS, TrainState
from vico.checkpoint.write import RunIdentity, save, save_step
from vico.errors import UserError
from vico.io.atomic import repair_folder
from vico.io.output_dir import OutputDir
from vico.train.config import RunConfig
from vico.train.saved_run import newest_usable

RUN = "selftest"
SHAPES = {"adapter_query.weight": (30, 64), "visual_proj.weight": (64, 768)}


def save_both(out: Path, step: int, keep: int | None = None) -> None:
    """What training saves at the end of an epoch."""
    weights = {name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}
    moments = {}
    for name, shape in SHAPES.items():
        for moment in MOMENTS:
            moments[f"{name}.{moment}"] = torch.full(shape, step + 0.5)
    state = TrainState(step=step, questions_per_step=8, num_updates=step)
    output_dir, run = OutputDir(out), RunIdentity(RUN, RunConfig().to_json(), {})
    save(output_dir.best_checkpoint, weights, moments, state, run)
    save_step(output_dir, weights, moments, state, run, keep)


def fault_after(out: Path, step: int) -> str:
    """What is wrong with `out`, where `step` had been saved, at the next start; empty: nothing."""
    repair_folder(out)
    if strays := stray_files(out):
        return f"left behind: {strays}"
    folders = OutputDir(out).step_checkpoints()
    if not folders:
        return f"step {step} is gone" if step else ""
    try:
        start = newest_usable(folders, OutputDir(out), RUN)
    except UserError as error:
        return str(error)
    assert start.checkpoint is not None
    if start.notes:
        return f"passed over: {start.notes}"
    newest = start.checkpoint.state.step
    if newest < step:
        return f"step {step} was saved, and step {newest} is the newest"
    whole = all((value == newest).all() for value in start.checkpoint.weights.values())
    return "" if whole else f"the tensors of step {newest} are another's"


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Fork a process that calls `work` with a pipe to write to; returns its id and our end."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work(write_end)
        finally:
            os._exit(0)
    os.close(write_end)
    return pid, read_end
