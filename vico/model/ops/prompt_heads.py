"""An adapter prompt's keys and values, and the gradients of attention that has one."""

from typing import NamedTuple

from torch import Tensor


class PromptHeads(NamedTuple):
    """The adapter prompt of a layer, as its attention takes it; or the gradients of that."""

    k_AJd: Tensor
    v_AJd: Tensor
    gate1_H: Tensor


class Gradients(NamedTuple):
    """Of the inputs of one layer's attention."""

    q_THd: Tensor
    k_TJd: Tensor
    v_TJd: Tensor
    gate2_H: Tensor | None
    prompt: PromptHeads | None
