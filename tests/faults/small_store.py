"""The checkpoint store alone, with small tensors that say which step they are of: for what breaks files and disks, not runs."""

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
from vico.train.resume import newest_usable

RUN = "selftest"
SHAPES = {"adapter_query.weight": (30, 64), "visual_proj.weight": (64, 768)}


def save_both(out: Path, step: int, keep: int | None = None) -> None:
    """What training saves at the end of an epoch."""
    weights = {name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}
    moments = {
        f"{name}.{moment}": torch.full(shape, step + 0.5)
        for name, shape in SHAPES.items()
        for moment in MOMENTS
    }
    state = TrainState(step=step, questions_per_step=8, num_updates=step)
    output_dir, run = OutputDir(out), RunIdentity(RUN, RunConfig().to_json(), {})
    save(output_dir.best_checkpoint, weights, moments, state, run)
    save_step(output_dir, weights, moments, state, run, keep)


def fault_after(out: Path, step: int) -> str:
    """What is wrong with `out` as the next start finds it, where `step` had been saved for certain; empty: nothing."""
    repair_folder(out)
    if stray_files(out):
        return f"left behind: {stray_files(out)}"
    folders = OutputDir(out).step_checkpoints()
    if not folders:
        return f"step {step} is gone" if step else ""
    try:
        found = newest_usable(folders, OutputDir(out), RUN)
    except UserError as error:
        return str(error)
    assert found.checkpoint is not None
    if found.notes:
        return f"passed over: {found.notes}"
    at = found.checkpoint.state.step
    if at < step:
        return f"step {step} was saved, and step {at} is the newest"
    whole = all((value == at).all() for value in found.checkpoint.weights.values())
    return "" if whole else f"the tensors of step {at} are another's"


def in_child(work: Callable[[int], None]) -> tuple[int, int]:
    """Fork a process that does `work`, which may write to the descriptor; returns its id and the other end."""
    theirs, ours = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        try:
            work(ours)
        finally:
            os._exit(0)
    os.close(ours)
    return pid, theirs
