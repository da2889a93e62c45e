"""What a checkpoint folder holds, and how the folders of a run are named."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vico.errors import UserError
from vico.io.text import read_json_object

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"


LATEST = "latest.json"  # beside the checkpoints: which step was saved last, so that one that is gone is missed


FORMAT = 1


STEP_FOLDER = re.compile(r"checkpoint-(\d+)")


GATE = re.compile(r"layers\.(\d+)\.attention\.gate[12]")


MAX_EPOCHS, MAX_STEPS = 10**6, 10**12  # what a file may say; more is damage


REMEDY = "use another checkpoint; a run goes on from an older one of its own when this is removed"


@dataclass
class TrainState:
    """Where a run stands; all that resuming needs besides tensors and settings."""

    step: int = 0  # optimizer steps done
    questions_per_step: int = 0
    num_updates: int = 0  # updates Adam has seen; differs from `step` after a lineage checkpoint on another batch size
    best_accuracy: float | None = None
    epoch_loss_sums: list[float] = field(default_factory=list)  # of the epoch under way, per task
    epoch_target_counts: list[int] = field(default_factory=list)
    evaluation_due: bool = False  # an epoch has ended and its evaluation has not


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    weights: dict[str, Tensor]
    moments: (
        dict[str, Tensor] | None
    )  # "name.exp_avg", "name.exp_avg_sq"; None: weights alone, a new run starts from them
    progress: TrainState
    settings: dict[str, Any]  # of the run that wrote it, as far as it says
    fingerprints: dict[str, str] = field(
        default_factory=dict
    )  # of the backbone and the data that it was trained with
    lineage_epoch: int | None = None  # the last finished epoch of a lineage file with an optimizer
    lineage_optimizer: object = (
        None  # its state as it lies in the file, until `fitted` makes moments of it
    )
    notes: tuple[str, ...] = ()


def latest_step(output_dir: Path) -> int | None:
    """The step that was saved last. Only a hint: what is there counts, whatever this says or does not."""
    if not os.path.exists(output_dir / LATEST):
        return None
    try:
        step = read_json_object(output_dir / LATEST, LATEST).get("step")
    except UserError:
        return None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def step_of(folder: Path) -> int:
    return int(folder.name.partition("-")[2])


def with_checksum(state: Mapping[str, Any]) -> str:
    """The text of a state.json: it counts the steps, vouches for the other files and, by its last entry, for itself."""
    seal = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    return json.dumps({**state, "sha256": seal}, indent=1)


def step_folders(output_dir: Path) -> list[Path]:
    """The checkpoint-<step> folders, newest first."""
    if not os.path.isdir(output_dir):
        return []
    return sorted(
        (
            p
            for p in output_dir.glob("checkpoint-*")
            if STEP_FOLDER.fullmatch(p.name) and p.is_dir()
        ),
        key=step_of,
        reverse=True,
    )
