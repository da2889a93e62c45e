"""From sequences to one packed stream: a tree of what the sequences have in common, one segment of rows per branch.

Sharing is one mechanism with three uses: the instruction that all sequences of a task begin with, the prompt that all
options of a question follow, and the video that all its questions are asked about. Causal rows depend only on what
stands before them, so equal beginnings have equal rows, whatever follows.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vico.records import VIDEO_SLOT, PackedBatch, Segment, Sequence

MIN_SHARED = 4  # fewer common tokens than this are not worth a segment of their own


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence with what packing must know besides: the clip in its slots and the column its losses belong to."""

    sequence: Sequence
    clip: int  # row of the micro-batch's features
    task: int


@dataclass(slots=True)
class _Node:
    start: int  # depth of its first token in the sequences below it
    stop: int
    members: list[int]  # the sequences that run through it
    parent: int | None


def pack(examples: Items[Example], features_VFC: Tensor, share: bool = True) -> PackedBatch:
    """One micro-batch as a packed stream; with `share` off every sequence stands alone (the reference path)."""
    num_slots = features_VFC.shape[1]
    paths = [_path(example, num_slots) for example in examples]
    nodes = _tree(paths) if share else [_Node(0, len(path), [i], None) for i, path in enumerate(paths)]
    starts = np.cumsum([0, *(node.stop - node.start for node in nodes)])
    segments = tuple(Segment(int(starts[i]), int(starts[i + 1]), node.parent) for i, node in enumerate(nodes))

    rows_of = [np.empty(len(path), np.int64) for path in paths]  # stream row of each position of each sequence
    keys, positions, after = (np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64), np.zeros(starts[-1], bool))
    for node, segment in zip(nodes, segments, strict=True):
        rows = slice(segment.start, segment.stop)
        first = node.members[0]
        keys[rows] = paths[first][node.start : node.stop]
        positions[rows] = np.arange(node.start, node.stop)
        after[rows] = positions[rows] >= examples[first].sequence.video_start + num_slots
        for member in node.members:
            rows_of[member][node.start : node.stop] = np.arange(segment.start, segment.stop)

    slot_rows = np.flatnonzero(keys < 0)
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.maximum(keys, 0)),
        positions_T=torch.from_numpy(positions),
        after_video_T=torch.from_numpy(after),
        is_video_T=torch.from_numpy(keys < 0),
        slot_rows_S=torch.from_numpy(slot_rows),
        slot_frames_S=torch.from_numpy(-1 - keys[slot_rows]),
        features_VFC=features_VFC,
        segments=segments,
        num_sequences=len(examples),
        num_real_tokens=sum(len(example.sequence.tokens) for example in examples),
        **_targets(examples, rows_of),
    )


def _path(example: Example, num_slots: int) -> list[int]:
    """The sequence's inputs as keys that are equal where the stream may be shared: piece ids, and -1 - (clip * F + j)."""
    sequence = example.sequence
    keys = list(sequence.tokens[: sequence.num_inputs])
    for j in range(num_slots):
        position = sequence.video_start + j
        if position < len(keys):  # a frame that is only ever a target is never an input
            assert keys[position] == VIDEO_SLOT
            keys[position] = -1 - (example.clip * num_slots + j)
    return keys


def _tree(paths: list[list[int]]) -> list[_Node]:
    """The paths' radix tree: parents before their children, the children of one parent side by side."""
    nodes: list[_Node] = []
    work: list[tuple[list[int], int, int | None]] = [(list(range(len(paths))), 0, None)]
    while work:
        members, depth, parent = work.pop()
        by_key: dict[int, list[int]] = {}
        for member in members:
            if len(paths[member]) > depth:
                by_key.setdefault(paths[member][depth], []).append(member)
        branches = []
        for group in by_key.values():
            stop = _common_stop([paths[m] for m in group], depth)
            if len(group) == 1 or stop - depth >= MIN_SHARED or all(len(paths[m]) == stop for m in group):
                branches.append((group, stop))
            else:
                branches += [([member], len(paths[member])) for member in group]
        for group, stop in branches:
            nodes.append(_Node(depth, stop, group, parent))
            work.append((group, stop, len(nodes) - 1))
    return nodes


def _common_stop(group: list[list[int]], depth: int) -> int:
    """Depth behind the common beginning of `group`, whose members agree up to `depth`."""
    low, high = min(group), max(group)  # what the least and the greatest share, all share
    stop = depth
    while stop < len(low) and stop < len(high) and low[stop] == high[stop]:
        stop += 1
    return stop


def _targets(examples: Items[Example], rows_of: list[np.ndarray]) -> dict[str, Tensor]:
    """The target fields of a PackedBatch. Losses follow the order: all token targets, then all frame targets."""
    numbered = list(enumerate(examples))
    tokens = [(i, e) for i, e in numbered if e.sequence.task != "qav"]
    frames = [(i, e) for i, e in numbered if e.sequence.task == "qav"]

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def rows(of: list[tuple[int, Example]]) -> np.ndarray:
        return joined([rows_of[i][e.sequence.targets.start - 1 : e.sequence.targets.stop - 1] for i, e in of])

    def repeated(of: list[tuple[int, Example]], values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int64), [len(e.sequence.targets) for _, e in of])

    head_rows, heads = np.unique(rows(tokens), return_inverse=True)
    fields = {
        "head_rows_R": head_rows,
        "token_target_heads_N": heads,
        "token_target_ids_N": joined([np.array(e.sequence.tokens[e.sequence.targets.start : e.sequence.targets.stop]) for _, e in tokens]),
        "frame_rows_M": rows(frames),
        "frame_videos_M": repeated(frames, [e.clip for _, e in frames]),
        "frame_targets_M": joined([np.arange(len(e.sequence.targets)) for _, e in frames]),
        "target_tasks": np.concatenate([repeated(of, [e.task for _, e in of]) for of in (tokens, frames)]),
        "target_sequences": np.concatenate([repeated(of, [i for i, _ in of]) for of in (tokens, frames)]),
    }
    return {name: torch.from_numpy(value) for name, value in fields.items()}
