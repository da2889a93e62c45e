"""What flows through the program, from an annotation row to the tensors of one micro-batch.

Shape letters used in names everywhere:
T rows of a packed stream, D model width, H heads, d head width, A adapter prompt length, F video slots,
V videos of a micro-batch, C feature width (768), N token targets, M frame targets, S filled video slots,
R rows that predict a target.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a packed stream. A row sees every row of its segment's ancestors, and its own segment causally.

    A sequence on its own is one segment without a parent; sequences with a common beginning are leaves of a tree.
    """

    start: int
    stop: int
    parent: (
        int | None
    )  # place of the parent in the list of segments; parents stand before their children
    is_video: bool  # all rows are video slots; else none is
    after_video: bool  # all rows stand behind their sequence's video block; else none does


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch as one stream of T rows, all tasks together, without padding. Made on the host, read by the model.

    Targets come in two kinds, in this order everywhere: N token targets (an entry of the vocabulary), then M frame
    targets (one of the F frames of a video).
    """

    token_ids_T: Tensor  # int64; 0 in video slots
    positions_T: Tensor  # int64, counted from the start of each sequence
    slot_rows_S: Tensor  # int64: the rows that are video slots
    slot_frames_S: Tensor  # int64: v * F + j of the frame that fills the slot
    features_VFC: Tensor  # float32 frame features of the distinct clips
    segments: tuple[Segment, ...]
    wanted_rows_R: Tensor  # int64, ascending, stays on the host: the rows that predict a target
    token_targets_N: Tensor  # int64: which of the R rows predicts the target
    token_target_ids_N: Tensor  # int64
    frame_targets_M: Tensor  # int64: which of the R rows predicts the target
    frame_videos_M: Tensor  # int64: v, whose frames are the candidates
    frame_target_ids_M: Tensor  # int64: j
    target_tasks: Tensor  # int64 [N + M]: place of the task in the run's list of tasks
    target_sequences: Tensor  # int64 [N + M]: place of the sequence in the micro-batch
    num_real_tokens: (
        int  # tokens of the sequences, each counted whole, however much of it is shared
    )

    @property
    def num_rows(self) -> int:
        return len(self.token_ids_T)

    def to(self, device: torch.device) -> "PackedBatch":
        if device.type == "cpu":
            return self
        moved = {
            name: v.to(device, non_blocking=True)
            for name, v in self._tensors().items()
            if name != "wanted_rows_R"
        }
        return replace(self, **cast(dict[str, Any], moved))

    def pin_memory(self) -> "PackedBatch":
        """Called by the data loader where a GPU is, so that the copies of `to` run beside the computation."""
        pinned = {name: v.pin_memory() for name, v in self._tensors().items()}
        return replace(self, **cast(dict[str, Any], pinned))

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
