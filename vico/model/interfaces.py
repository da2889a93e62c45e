"""What the decoder blocks, and those who compute them, know of each other.

llama.py builds the blocks, fused_block.py computes a block as one autograd Function, and
cuda_graphs.py replays all blocks but the last. block_runners.py chooses between them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from vico.model.attention.cache import LayerCache
from vico.model.attention.masks import Attend, AttentionMask, restrict_queries
from vico.model.batch import Segment
from vico.model.ops.fp8 import Weight8


@dataclass(frozen=True, slots=True)
class Context:
    """What every layer sees besides the stream."""

    rotary_T1h: Tensor  # complex64: the angles of each row
    mask: AttentionMask
    attend: Attend
    query_rows_Q: Tensor | None = None  # mask.query_rows on the device
    # In generation only: those of all layers, and of the layer that runs.
    caches: tuple[LayerCache, ...] = ()
    cache: LayerCache | None = None

    def at_layer(self, index: int) -> "Context":
        return replace(self, cache=self.caches[index]) if self.caches else self

    def restrict_queries(self, rows: Tensor) -> "Context":
        """The same with `rows` as the only queries.

        `rows`: host int64, ascending; in pinned memory where there is a GPU, so that the host does
        not wait for the copy.
        """
        mask = restrict_queries(self.mask, rows)
        query_rows_Q = rows.to(self.rotary_T1h.device, non_blocking=True)
        return replace(self, mask=mask, query_rows_Q=query_rows_Q)


class LinearLayer(Protocol):
    """x W^T: llama.FrozenLinear, or one of quantized_linear.py.

    `exact`: x is not quantized, whatever the weight is.
    """

    @property
    def weight(self) -> Tensor | Weight8: ...

    def __call__(self, x: Tensor, exact: bool = False) -> Any: ...


# From the number of inputs, the number of outputs and the type.
MakeLinear = Callable[[int, int, torch.dtype], LinearLayer]


class NormLayer(Protocol):
    @property
    def weight(self) -> Tensor: ...
    @property
    def eps(self) -> float: ...


class AttentionLayer(Protocol):
    """The gates are there in adapted blocks only."""

    @property
    def wq(self) -> LinearLayer: ...
    @property
    def wk(self) -> LinearLayer: ...
    @property
    def wv(self) -> LinearLayer: ...
    @property
    def wo(self) -> LinearLayer: ...
    @property
    def gate1(self) -> Tensor: ...
    @property
    def gate2(self) -> Tensor: ...

    def heads(self, x: Tensor) -> Tensor: ...


class FeedForwardLayer(Protocol):
    @property
    def w1(self) -> LinearLayer: ...
    @property
    def w2(self) -> LinearLayer: ...
    @property
    def w3(self) -> LinearLayer: ...


class DecoderBlock(Protocol):
    """llama.Block, as fused_block.py reads it."""

    @property
    def attention(self) -> AttentionLayer: ...
    @property
    def feed_forward(self) -> FeedForwardLayer: ...
    @property
    def attention_norm(self) -> NormLayer: ...
    @property
    def ffn_norm(self) -> NormLayer: ...


class LowerLayers(Protocol):
    """All layers but the last in one call: cuda_graphs.GraphedBlocks, as llama.py reads it."""

    def accepts(self, x_TD: Tensor) -> bool: ...

    def is_captured(self, segments: tuple[Segment, ...]) -> bool: ...

    def can_capture(self, micro_batches: Iterable[tuple[Segment, ...]]) -> bool: ...

    def allow_captures(self, allowed: bool) -> None: ...

    def __call__(
        self, x_TD: Tensor, prompts: Sequence[Tensor | None], context: Context
    ) -> Tensor: ...
