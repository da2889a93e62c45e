"""The memory of a model on the meta device: the storages that are alive at once."""

import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vico.model.attention.backends import KERNELS
from vico.model.attention.blockwise import attend_blocks
from vico.model.attention.segment_layout import segment_layout
from vico.model.attention.varlen import PackedAttention
from vico.model.batch import PackedBatch
from vico.model.block_runners import choose_block_runners
from vico.model.config import LlamaConfig
from vico.model.vico import ViCo
from vico.planner.memory import BatchShape


def on_meta(batch: PackedBatch) -> PackedBatch:
    tensors = batch._tensors().items()
    moved: dict[str, Any] = {
        name: tensor.to("meta") for name, tensor in tensors if name != "wanted_rows_R"
    }
    return replace(batch, **moved, texts=batch.texts and on_meta(batch.texts))


def batch_shape(batch: PackedBatch) -> BatchShape:
    """As the planner counts it."""
    return BatchShape(
        num_rows=batch.num_rows,
        num_wanted_rows=len(batch.wanted_rows_R),
        num_targets=len(batch.token_rows_N),
        num_clips=len(batch.features_VFC),
        num_keys=segment_layout(batch.segments).sizes.num_keys,
        num_kept=len(batch.texts.token_rows_N) if batch.texts else 0,
    )


def meta_model(config: LlamaConfig, kernel: str, dtype: torch.dtype) -> ViCo:
    with torch.device("meta"):
        model = ViCo(config, config.n_layers, 10, 10, 100.0, dtype)
    attend = PackedAttention(KERNELS["varlen"]) if kernel == "varlen" else attend_blocks
    choose_block_runners(model, attend)
    return model


def storages_of(model: nn.Module) -> set[int]:
    return {parameter.untyped_storage()._cdata for parameter in model.parameters()}


class LiveBytes(TorchDispatchMode):
    """The sum of all live storages except those `known`, and its largest value."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = known

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += num_bytes
            weakref.finalize(storage, self._remove, key, num_bytes)

    def _remove(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


def peak_bytes(model: ViCo, batch: PackedBatch) -> int:
    """The largest sum of live tensors over forward and backward, without the parameters."""
    live, moved = LiveBytes(storages_of(model)), on_meta(batch)
    with live:
        model(moved).sum().backward()
    return live.peak
