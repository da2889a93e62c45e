"""Ranks emulated by threads, and a scorer in the engine's place, to evaluate without a model."""

import contextlib
import hashlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vico.distributed.world import World
from vico.errors import UserError
from vico.model.batch import PackedBatch


@dataclass
class Exchange:
    """Where the threads of emulated ranks exchange values."""

    size: int
    values: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=60)

    def all_gather(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        gathered = [self.values[r] for r in range(self.size)]
        self.barrier.wait()
        return gathered


@dataclass(frozen=True)
class EmulatedWorld(World):
    exchange: Exchange = field(default_factory=lambda: Exchange(1))

    def sum(self, values: Tensor) -> Tensor:
        gathered = self.exchange.all_gather(self.rank, values.clone())
        return values.copy_(torch.stack(gathered).sum(0))

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack(self.exchange.all_gather(self.rank, values.clone()))

    def max(self, value: int) -> int:
        return int(max(self.exchange.all_gather(self.rank, value)))

    def gather_objects(self, value: Any) -> list[Any]:
        return self.exchange.all_gather(self.rank, value)

    @contextlib.contextmanager
    def raise_together(self) -> Iterator[None]:
        error: UserError | None = None
        try:
            yield
        except UserError as problem:
            error = problem
        for any_error in self.exchange.all_gather(self.rank, error):
            if any_error is not None:
                raise any_error


ALONE = EmulatedWorld(0, 1, torch.device("cpu"), None)


class Scorer:
    """In the engine's place: a target's loss is a hash of its token and the tokens before it.

    A question whose tokens are mixed up with another's, by batch, order or rank, has other losses.
    """

    def train(self, mode: bool) -> None:
        pass

    def forward(self, batch: PackedBatch) -> Tensor:
        """[N]: the losses of the batch's targets."""
        ids = batch.token_ids_T.tolist()
        prefixes: list[Any] = []  # of each segment, the hash of all tokens before it
        for segment in batch.segments:
            if segment.parent is None:
                prefix = hashlib.sha256()
            else:
                parent = batch.segments[segment.parent]
                prefix = prefixes[segment.parent].copy()
                prefix.update(token_bytes(ids[parent.start : parent.stop]))
            prefixes.append(prefix)
        losses = []
        targets = (batch.token_rows_N.tolist(), batch.token_target_ids_N.tolist())
        for place, target_id in zip(*targets, strict=True):
            row = int(batch.wanted_rows_R[place])
            index = _segment_of(batch, row)
            state = prefixes[index].copy()
            tokens = ids[batch.segments[index].start : row + 1]
            state.update(token_bytes([*tokens, target_id]))
            losses.append(loss_of(state.digest()))
        return torch.tensor(losses)


def _segment_of(batch: PackedBatch, row: int) -> int:
    for index, segment in enumerate(batch.segments):
        if segment.start <= row < segment.stop:
            return index
    raise IndexError(row)


def token_bytes(ids: list[int]) -> bytes:
    return b"".join(i.to_bytes(4, "big") for i in ids)


def loss_of(digest: bytes) -> float:
    """A number that fp32 holds exactly, and whose sums are exact."""
    return int.from_bytes(digest[:3], "big") / 2**20
