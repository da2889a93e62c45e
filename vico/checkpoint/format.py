"""What a checkpoint holds: the files of its folder, the state of its run, and its checksums.

A folder holds whole tensors under the published names. It fits any number of ranks and any ZeRO
stage.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vico.io.digest import digest_json

WEIGHTS, OPTIMIZER, STATE = "adapter_model.safetensors", "optimizer.safetensors", "state.json"
# Of an export, which has no optimizer and no STATE. Hubs and PEFT know these names.
CONFIG, CARD = "adapter_config.json", "README.md"
FORMAT = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state, besides the number of updates
REMEDY = "use another checkpoint; without this one, its run resumes from its next older one"


@dataclass
class TrainState:
    """The position of a run: all that resuming needs besides tensors and settings."""

    step: int = 0  # optimizer steps done
    questions_per_step: int = 0
    # Updates that Adam has seen. Differs from `step` after a published checkpoint was resumed
    # with another batch size.
    num_updates: int = 0
    best_accuracy: float | None = None
    epoch_loss_sums: list[float] = field(default_factory=list)  # of the current epoch, per task
    epoch_target_counts: list[int] = field(default_factory=list)
    evaluation_due: bool = False  # an epoch has ended and is not evaluated yet

    def assign(self, other: "TrainState") -> None:
        """Take all values of `other`. A run keeps one TrainState, which its loop changes."""
        vars(self).update(vars(other))


@dataclass(frozen=True)
class PublishedOptimizer:
    """What a published .pth file holds besides weights."""

    epoch: int  # the last finished one
    state: object  # as the file holds it, unchecked


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    weights: dict[str, Tensor]
    # "NAME.exp_avg" and "NAME.exp_avg_sq". None: weights alone, from which a new run starts.
    moments: dict[str, Tensor] | None = None
    state: TrainState = field(default_factory=TrainState)
    settings: dict[str, Any] = field(default_factory=dict)  # of the run that wrote it
    fingerprints: dict[str, str] = field(default_factory=dict)  # of its backbone and data
    digest: str = ""  # of the whole file, or of the whole folder by its state.json
    published: bool = False  # a .pth file of the published code
    published_optimizer: PublishedOptimizer | None = None
    notes: tuple[str, ...] = ()


def with_checksum(state: Mapping[str, Any]) -> str:
    """The text of a state.json. Its last entry is the sha256 of the others."""
    checksum = digest_json(state)
    return json.dumps({**state, "sha256": checksum}, indent=1)
