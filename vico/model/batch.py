"""A micro-batch as one packed stream of rows: what the data room makes and the model reads.

Names of tensors end in the letters of their dimensions, here and in all other files:

T  rows of the packed stream        D  model width
Q  query rows                       H  heads
K  gathered keys                    d  head width (h: half of it, the pairs of a rotary embedding)
R  rows that predict a target       E  dimensions by which the kernels' heads are wider
P  rows in K more than once         G  adapted layers
N  token targets                    A  length of an adapter prompt
M  frame targets                    W  vocabulary
V  videos of a micro-batch          C  feature width (768 of CLIP ViT-L/14)
F  video slots of a sequence        S  filled video slots of the stream
B  sequences that are generated     L  positions of a sequence in the cache
J  heads of keys and values: H, or fewer

1 and 2 are dimensions of that size; n and r are the parts of a mask block and the rows of a part.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive rows of a packed stream.

    A row sees every row of its segment's ancestors, and its own segment causally. A sequence on its
    own is one segment without a parent; sequences with a common beginning are leaves of a tree.
    """

    start: int
    stop: int
    # Index of the parent in the list of segments; parents come before their children.
    parent: int | None
    # All rows are video slots; otherwise none is.
    is_video: bool
    # All rows come after their sequence's video slots; otherwise none does.
    after_video: bool

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """A micro-batch as one stream of T rows, all tasks together, without padding. Made on the host.

    Targets come in two kinds, in this order everywhere: N token targets (an entry of the
    vocabulary), then M frame targets (one of the F frames of a video).
    """

    token_ids_T: Tensor  # int64; 0 in video slots
    positions_T: Tensor  # int64, counted from the start of each sequence
    slot_rows_S: Tensor  # int64: the rows that are video slots
    slot_frames_S: Tensor  # int64: v * F + j of the frame that fills the slot
    features_VFC: Tensor  # float32 frame features of the distinct clips
    segments: tuple[Segment, ...]
    wanted_rows_R: Tensor  # int64, ascending, stays on the host: the rows that predict a target
    token_rows_N: Tensor  # int64: which of the R rows predicts the target
    token_target_ids_N: Tensor  # int64
    frame_rows_M: Tensor  # int64: which of the R rows predicts the target
    frame_videos_M: Tensor  # int64: v, whose frames are the candidates
    frame_target_ids_M: Tensor  # int64: j
    target_tasks: Tensor  # int64 [N + M]: index of the task in the run's list of tasks
    target_sequences: Tensor  # int64 [N + M]: index of the sequence in the micro-batch
    num_real_tokens: int  # of all sequences, each counted in full, although parts are shared
    # The plain texts of the stream as a stream of their own, for the frozen model. Their targets
    # are the last token targets here, in the same order. Their losses are divergences.
    texts: "PackedBatch | None" = None

    @property
    def num_rows(self) -> int:
        return len(self.token_ids_T)

    def to(self, device: torch.device) -> "PackedBatch":
        if device.type == "cpu":
            return self
        moved = {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in self._tensors().items()
            if name != "wanted_rows_R"
        }
        texts = self.texts and self.texts.to(device)
        return replace(self, **cast(dict[str, Any], moved), texts=texts)

    def pin_memory(self) -> "PackedBatch":
        """Called by the data loader where there is a GPU: `to` then overlaps with computation."""
        pinned = {name: tensor.pin_memory() for name, tensor in self._tensors().items()}
        texts = self.texts and self.texts.pin_memory()
        return replace(self, **cast(dict[str, Any], pinned), texts=texts)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}
