"""ViCo: a frozen LLaMA that sees video tokens through gates and adapter prompts (METHOD section 1).

One forward takes a packed micro-batch and returns one loss per target, or in generation the logits
of the next tokens. It knows neither tasks nor data sets.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.cache import KeyValueCache
from vico.model.attention.masks import Attend, attention_mask
from vico.model.batch import PackedBatch
from vico.model.config import FEATURE_WIDTH, LlamaConfig
from vico.model.interfaces import Context, MakeLinear
from vico.model.llama import FrozenLinear, Llama, rotary_angles


class ViCo(Llama):
    """The backbone with its trainables, under the published names.

    These are adapter_query, visual_proj, temporal_emb, gate1 and gate2. `attend` is set by
    block_runners.choose_block_runners, together with what computes the blocks.
    """

    def __init__(
        self,
        config: LlamaConfig,
        num_adapted: int,
        adapter_len: int,
        num_slots: int,
        tau: float,
        dtype: torch.dtype,
        linear: MakeLinear = FrozenLinear,
        feature_width: int = FEATURE_WIDTH,
    ) -> None:
        super().__init__(config, num_adapted, dtype, linear)
        self.adapter_len, self.tau = adapter_len, tau
        self.attend: Attend = attend_blocks
        self.adapter_query = nn.Embedding(
            num_adapted * adapter_len, config.dim, dtype=torch.float32
        )
        self.visual_proj = nn.Linear(feature_width, config.dim, bias=False, dtype=torch.float32)
        self.temporal_emb = nn.Embedding(num_slots, config.dim, dtype=torch.float32)

    def forward(
        self, batch: PackedBatch, cache: KeyValueCache | None = None, compare: bool = False
    ) -> Tensor:
        """fp32 losses [N + M]: token targets, then frame targets. Of `batch.texts` the loss is
        KL(frozen || adapted), from a pass of the frozen model over them alone.

        With a cache, which gets the keys and values of the batch's rows: the logits [R, W] of the
        wanted rows, in fp32. With `compare`: how the frozen and the adapted model predict the token
        targets, `compare_predictions` [6, N], by two passes over the stream.
        """
        prompts_GAD = self._prompts(batch.token_ids_T.device)
        projected_VFD = self.visual_proj(batch.features_VFC)
        kept_ND = self._kept(batch.texts, projected_VFD)
        h_RD = self._hidden(batch, prompts_GAD, projected_VFD, cache)
        if cache is not None:
            return self.output(h_RD)
        rows_N, ids_N = batch.token_rows_N, batch.token_target_ids_N
        if compare:
            frozen_RD = self._hidden(batch, None, projected_VFD)
            return self.output(h_RD, rows_N, ids_N, frozen_RD)
        token_losses_N = self.output(h_RD, rows_N, ids_N, kept_ND=kept_ND)
        frame_losses_M = self._frame_losses(h_RD, projected_VFD, batch)
        return torch.cat([token_losses_N, frame_losses_M])

    @torch.no_grad()
    def _kept(self, texts: PackedBatch | None, projected_VFD: Tensor) -> Tensor | None:
        """Hidden states [N, D] of the frozen model that predict the targets of the texts.

        Before the stream itself runs: nothing is held yet that backward needs.
        """
        if texts is None:
            return None
        return self._hidden(texts, None, projected_VFD)[texts.token_rows_N]

    def _hidden(
        self,
        batch: PackedBatch,
        prompts_GAD: Tensor | None,
        projected_VFD: Tensor,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Hidden states [R, D] of the wanted rows; without prompts those of the frozen model."""
        x_TD = self._embed(batch, projected_VFD)
        rope = (self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        rotary_T1h = rotary_angles(batch.positions_T, *rope)
        caches = () if cache is None else cache.layers
        mask = attention_mask(batch.segments)
        context = Context(rotary_T1h, mask, self.attend, caches=caches)
        return self.trunk(x_TD, prompts_GAD, context, batch.wanted_rows_R)

    def _prompts(self, device: torch.device) -> Tensor:
        """The adapter prompts [G, A, D].

        By a call of the module: under ZeRO-3 its weight is gathered when it is called.
        """
        indices = torch.arange(self.adapter_query.num_embeddings, device=device)
        prompts = self.adapter_query(indices).to(self.dtype)
        return prompts.unflatten(0, (-1, self.adapter_len))

    def _embed(self, batch: PackedBatch, projected_VFD: Tensor) -> Tensor:
        """The stream [T, D]: token embeddings, and in the video slots the projected frames.

        A frame in a slot also gets the slot's temporal embedding.
        """
        frame_indices_F = torch.arange(projected_VFD.shape[1], device=projected_VFD.device)
        frames_VFD = projected_VFD + self.temporal_emb(frame_indices_F)
        # embedding, not indexing: a clip in the slots of several sequences then has a deterministic
        # gradient.
        slots_SD = F.embedding(batch.slot_frames_S, frames_VFD.flatten(0, 1)).to(self.dtype)
        return self.tok_embeddings(batch.token_ids_T).index_copy(0, batch.slot_rows_S, slots_SD)

    def _frame_losses(self, h_RD: Tensor, projected_VFD: Tensor, batch: PackedBatch) -> Tensor:
        """Cross-entropy [M] over a video's F frames of h . visual_proj(feature) / tau.

        The features are without temporal embedding.
        """
        h_MD = h_RD.index_select(0, batch.frame_rows_M).float()
        # As in _embed: all targets of a video have its frames.
        frames_ME = F.embedding(batch.frame_videos_M, projected_VFD.flatten(1))
        frames_MFD = frames_ME.view(len(frames_ME), *projected_VFD.shape[1:])
        logits_MF = torch.einsum("md,mfd->mf", h_MD, frames_MFD) / self.tau
        return F.cross_entropy(logits_MF, batch.frame_target_ids_M, reduction="none")


def initial_trainables(
    shapes: dict[str, tuple[int, ...]], bias: float, seed: int
) -> dict[str, Tensor]:
    """The initial values of METHOD section 1.

    The same for the same seed, on any device and any number of ranks.
    """
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
