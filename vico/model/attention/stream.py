"""What attention over a whole packed stream by kernels has in common.

varlen.py calls kernels for packed sequences, segment.py kernels of our own.
"""

from abc import ABC, abstractmethod
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vico.model.attention.masks import AttentionMask
from vico.model.batch import Segment
from vico.model.ops.prompt_heads import Gradients, PromptHeads


class HostLayout(Protocol):
    """A stream as its attention sends it to the device: as one array of whole numbers."""

    @property
    def padded_sizes(self) -> Any:
        """Sizes that many streams have in common, with at least one row of padding.

        All that the launches for a stream depend on, as a tuple with `num_rows` and
        `array_lengths`.
        """
        ...

    def joined(self, sizes: Any) -> np.ndarray:
        """int64, for the stream's own sizes or its padded ones."""
        ...


class StreamAttention(ABC):
    """`attend`; keeps the layout of the current micro-batch, which all layers share.

    A call is for autograd; `forward_with_prompt` and `backward_with_prompt` are for fused_block.py,
    which writes the gradient out. Layouts are those of the class.
    """

    takes_grouped_heads = False  # k and v may have fewer heads than q
    can_be_captured = False  # by CUDA graphs

    def __init__(self, layout: Any = None) -> None:
        """`layout`: use this one, whatever the mask (cuda_graphs.py)."""
        self._fixed_layout = layout
        self._layout: Any = None
        self._layout_segments: tuple[Segment, ...] | None = None

    def __call__(
        self,
        q_QHd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor | None,
        mask: AttentionMask,
    ) -> Tensor:
        if mask.query_rows is not None:
            return self._attend_query_rows(q_QHd, k_TJd, v_TJd, gate2_H, mask, mask.query_rows)
        return self.attend(q_QHd, k_TJd, v_TJd, gate2_H, self.layout(mask, q_QHd))

    def _attend_query_rows(
        self,
        q_QHd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor | None,
        mask: AttentionMask,
        query_rows: Tensor,
    ) -> Tensor:
        """Attention of all rows, then the query rows of it.

        Only the last layer needs this, and another layout for it would cost more.
        """
        rows_Q = query_rows.to(q_QHd.device, non_blocking=True)
        shape = (len(k_TJd), *q_QHd.shape[1:])
        q_THd = k_TJd.new_zeros(shape).index_copy(0, rows_Q, q_QHd)
        out_THd = self(q_THd, k_TJd, v_TJd, gate2_H, AttentionMask(mask.segments, ()))
        return out_THd.index_select(0, rows_Q)

    def layout(self, mask: AttentionMask, like: Tensor) -> Any:
        """On the device and for the type of `like`; ready for backward where autograd is on."""
        if self._fixed_layout is not None:
            return self._fixed_layout
        is_current = self._layout_segments is mask.segments
        for_backward = torch.is_grad_enabled()
        if not is_current or (for_backward and not self._layout.for_backward):
            self._layout = self.make_layout(mask.segments, like, for_backward)
            self._layout_segments = mask.segments
        return self._layout

    @abstractmethod
    def make_layout(self, segments: tuple[Segment, ...], like: Tensor, for_backward: bool) -> Any:
        """Of a stream without padding."""

    @abstractmethod
    def host_layout(self, segments: tuple[Segment, ...], dtype: torch.dtype) -> HostLayout: ...

    @abstractmethod
    def layout_from_numbers(self, numbers: Tensor, sizes: Any, dtype: torch.dtype) -> Any:
        """The layout whose `HostLayout.joined` is `numbers`, ready for backward.

        Without a wait for the device.
        """

    @abstractmethod
    def with_layout(self, layout: Any) -> "StreamAttention":
        """The same attention, always with this layout."""

    @abstractmethod
    def attend(
        self, q_THd: Tensor, k_TJd: Tensor, v_TJd: Tensor, gate2_H: Tensor | None, layout: Any
    ) -> Tensor:
        """Attention [T, H, d] of all rows, for autograd."""

    @abstractmethod
    def forward_with_prompt(
        self,
        q_THd: Tensor,
        k_TJd: Tensor,
        v_TJd: Tensor,
        gate2_H: Tensor,
        prompt: PromptHeads,
        rotary_T1h: Tensor,
        layout: Any,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(out [T, H, d], all that backward wants saved).

        The rotary embedding of q and k is made here: they come without it.
        """

    @abstractmethod
    def backward_with_prompt(
        self,
        g_THd: Tensor,
        saved: tuple[Tensor, ...],
        rotary_T1h: Tensor,
        layout: Any,
    ) -> Gradients:
        """Those of q and k are of them without their rotary embedding."""
