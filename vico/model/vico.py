"""ViCo: a frozen LLaMA that sees video tokens through gates and adapter prompts (METHOD section 1).

One forward takes a packed micro-batch and returns one loss per target. It knows neither tasks nor data sets.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.masks import Attend, attention_mask
from vico.model.batch import PackedBatch
from vico.model.config import FEATURE_WIDTH, LlamaConfig
from vico.model.llama import Context, FrozenLinear, Linear, Llama, rotary_angles


class ViCo(Llama):
    """The backbone with its trainables, under the lineage's names: adapter_query, visual_proj, temporal_emb, gate1, gate2."""

    def __init__(
        self,
        shape: LlamaConfig,
        num_adapted: int,
        adapter_len: int,
        num_slots: int,
        tau: float,
        dtype: torch.dtype,
        linear: Linear = FrozenLinear,
    ) -> None:
        super().__init__(shape, num_adapted, dtype, linear)
        self.adapter_len, self.tau = adapter_len, tau
        self.attend: Attend = attend_blocks
        self.adapter_query = nn.Embedding(num_adapted * adapter_len, shape.dim, dtype=torch.float32)
        self.visual_proj = nn.Linear(FEATURE_WIDTH, shape.dim, bias=False, dtype=torch.float32)
        self.temporal_emb = nn.Embedding(num_slots, shape.dim, dtype=torch.float32)

    def forward(self, batch: PackedBatch) -> Tensor:
        """fp32 losses [N + M]: token targets, then frame targets."""
        everyone = torch.arange(self.adapter_query.num_embeddings, device=batch.token_ids_T.device)
        prompts_GAD = (
            self.adapter_query(everyone).to(self.dtype).unflatten(0, (-1, self.adapter_len))
        )
        projected_VFD = self.visual_proj(batch.features_VFC)
        frames_VFD = projected_VFD + self.temporal_emb(
            torch.arange(projected_VFD.shape[1], device=projected_VFD.device)
        )
        # embedding, not indexing: a clip that fills the slots of several sequences then has a deterministic gradient.
        slots_SD = F.embedding(batch.slot_frames_S, frames_VFD.flatten(0, 1)).to(self.dtype)
        x_TD = self.tok_embeddings(batch.token_ids_T).index_copy(0, batch.slot_rows_S, slots_SD)
        rotary_T = rotary_angles(
            batch.positions_T,
            self.config.head_dim,
            self.config.rope_theta,
            self.config.rope_scaling,
        )
        h_RD = self.trunk(
            x_TD,
            prompts_GAD,
            Context(rotary_T, attention_mask(batch.segments), self.attend),
            batch.wanted_rows_R,
        )
        token_losses_N = self.output(h_RD, batch.token_targets_N, batch.token_target_ids_N)
        return torch.cat([token_losses_N, self._frame_losses(h_RD, projected_VFD, batch)])

    def _frame_losses(self, h_RD: Tensor, projected_VFD: Tensor, batch: PackedBatch) -> Tensor:
        """Cross-entropy [M] over a video's F frames of h . visual_proj(feature) / tau, features without temporal embedding."""
        h_MD = h_RD.index_select(0, batch.frame_targets_M).float()
        frames_MFD = projected_VFD.index_select(0, batch.frame_videos_M)
        logits_MF = torch.einsum("md,mfd->mf", h_MD, frames_MFD) / self.tau
        return F.cross_entropy(logits_MF, batch.frame_target_ids_M, reduction="none")


def initial_trainables(
    shapes: dict[str, tuple[int, ...]], bias: float, seed: int
) -> dict[str, Tensor]:
    """METHOD section 1's initial values; the same for the same seed, whatever the device or the ranks."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, shape in shapes.items():
        if name.endswith("gate1"):
            values[name] = torch.zeros(shape)
        elif name.endswith("gate2"):
            values[name] = torch.full(shape, -bias)
        elif name == "visual_proj.weight":  # nn.Linear's default
            bound = 1 / math.sqrt(shape[1])
            values[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        else:  # nn.Embedding's default
            values[name] = torch.randn(shape, generator=generator)
    return values
