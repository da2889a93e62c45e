"""Plain text as packed micro-batches: how well a language model predicts it, without a video.

A text is encoded whole and cut into windows that do not overlap. Each begins with BOS, so every
token of the text is predicted exactly once, from those of its window before it.
"""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from vico.data.evaluation_batches import EVALUATION_TOKENS, share_of
from vico.data.micro_batches import TEXT
from vico.data.packing import Example, pack
from vico.data.tokenizer import Tokenizer
from vico.data.types import TokenSequence
from vico.errors import UserError, fail
from vico.io.text import read_text
from vico.model.batch import PackedBatch
from vico.model.config import DEFAULT_WINDOW, KEPT_POSITIONS

KEPT_TOKENS = KEPT_POSITIONS - 1  # behind BOS


@dataclass(frozen=True, slots=True)
class Text:
    """A file of plain text, encoded."""

    path: Path
    token_ids: list[int]
    num_bytes: int  # of UTF-8


def open_text(path: Path, tokenizer: Tokenizer) -> Text:
    """Raises UserError for a file that is no UTF-8 text, or empty."""
    content = read_text(path, "plain text")
    token_ids = tokenizer.encode(content)
    if not token_ids:
        raise UserError(f"{path}: the tokenizer makes no token of it; name a text")
    return Text(path, token_ids, len(content.encode()))


@dataclass(frozen=True, slots=True)
class Texts:
    """The texts that are measured, and how they are cut."""

    files: tuple[Text, ...]
    bos: int
    window: int  # positions of a window, BOS included

    def windows(self) -> "list[Window]":
        return windows(self.files, self.bos, self.window)


NO_TEXTS = Texts((), bos=0, window=DEFAULT_WINDOW)


def open_texts(paths: Sequence[Path], tokenizer: Tokenizer, window: int) -> Texts:
    """Raises UserError as `open_text` does, and for a file that is named twice."""
    refuse_repeated(paths)
    files = tuple(open_text(path, tokenizer) for path in paths)
    return Texts(files, tokenizer.bos, window)


def refuse_repeated(paths: Sequence[Path]) -> None:
    """Raises UserError for two paths of one file, also by a link: it would count twice.

    A file that is not there is left to `open_text`.
    """
    first: dict[tuple[int, int], Path] = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            other = first.setdefault((found.st_dev, found.st_ino), path)
            if other is not path:
                fail(f"--text {path}: is the same file as {other}; name each file once")


def usual_window(longest: int | None, default: int = DEFAULT_WINDOW) -> int:
    """Positions of a window where none is asked for. `longest`: that the model sees."""
    return min(default, longest or default)


@dataclass(frozen=True, slots=True)
class Window:
    """Targets [start, stop) of all windows, counted through: of texts, their tokens."""

    start: int
    stop: int
    sequence: TokenSequence


def windows(texts: Sequence[Text], bos: int, length: int) -> list[Window]:
    """The windows of all texts, in order. `length`: positions of a window, BOS included."""
    made: list[Window] = []
    start = 0
    for text in texts:
        for first in range(0, len(text.token_ids), length - 1):
            tokens = (bos, *text.token_ids[first : first + length - 1])
            stop = start + len(tokens) - 1
            made.append(Window(start, stop, text_sequence(tokens)))
            start = stop
    return made


def text_sequence(tokens: tuple[int, ...], first_target: int = 1) -> TokenSequence:
    """A sequence without video slots, every token from `first_target` on a target."""
    targets = range(first_target, len(tokens))
    return TokenSequence(TEXT, tokens, targets, video_start=len(tokens))


class KeptTexts:
    """Windows of texts drawn at random, on which training keeps the adapted model (--keep)."""

    def __init__(self, texts: Texts) -> None:
        self._bos = texts.bos
        self._ids = [np.array(text.token_ids) for text in texts.files]
        # Where a window can begin: everywhere with enough tokens behind, in a short text at once.
        self._stops = np.cumsum([max(1, len(ids) - KEPT_TOKENS + 1) for ids in self._ids])

    def draw(self, rng: np.random.Generator) -> TokenSequence:
        """BOS and KEPT_TOKENS tokens of one text, or all of a shorter one."""
        place = int(rng.integers(self._stops[-1]))
        number = int(np.searchsorted(self._stops, place, side="right"))
        first = place - (int(self._stops[number - 1]) if number else 0)
        return text_sequence((self._bos, *self._ids[number][first : first + KEPT_TOKENS].tolist()))


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Some windows as one stream. Its targets are those of the windows, in their order."""

    windows: tuple[Window, ...]  # empty: a dummy, whose losses nobody reads
    batch: PackedBatch


class TextChunks(Dataset[TextChunk]):
    """Item i: the i-th chunk of this rank.

    The chunks are the same for any number of ranks, and so are the losses, bit for bit.
    """

    def __init__(
        self,
        made: Sequence[Window],
        features_0FC: torch.Tensor,
        rank: int,
        world_size: int,
        share: bool = False,
    ) -> None:
        """`features_0FC`: no clip, of the shape that the model takes."""
        self._features_0FC, self._dummy, self._share = features_0FC, made[:1], share
        self._chunks = share_of(_divide(made), rank, world_size)

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, item: int) -> TextChunk:
        chunk = self._chunks[item]
        examples = [Example(w.sequence, clip=0, task=0) for w in chunk or self._dummy]
        return TextChunk(tuple(chunk), pack(examples, self._features_0FC, self._share))


def _divide(made: Sequence[Window]) -> list[list[Window]]:
    """Windows together, cut at about EVALUATION_TOKENS."""
    chunks: list[list[Window]] = []
    size = EVALUATION_TOKENS
    for window in made:
        if size + len(window.sequence.tokens) > EVALUATION_TOKENS:
            chunks.append([])
            size = 0
        chunks[-1].append(window)
        size += len(window.sequence.tokens)
    return chunks
