"""From sequences to one packed stream: a tree of what the sequences have in common, one segment of rows per branch.

Sharing is one mechanism with three uses: the instruction that all sequences of a task begin with, the prompt that all
options of a question follow, and the video that all its questions are asked about. Causal rows depend only on what
stands before them, so equal beginnings have equal rows, whatever follows.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.batch import PackedBatch, Segment

COST_OF_SHARING = 20  # a shared row costs each layer an attention block against all rows below it: 1/20 of a row each, measured


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence with what packing must know besides: the clip in its slots and the column its losses belong to."""

    sequence: TokenSequence
    clip: int  # row of the micro-batch's features
    task: int


@dataclass(frozen=True, slots=True)
class _Node:
    start: int  # depth of its first token in the sequences below it
    stop: int
    members: list[int]  # the sequences that run through it
    parent: int | None


def pack(examples: Sequence[Example], features_VFC: Tensor, share: bool = True) -> PackedBatch:
    """One micro-batch as a packed stream; with `share` off every sequence stands alone (the reference path)."""
    num_slots = features_VFC.shape[1]
    paths = [_path(example, num_slots) for example in examples]
    nodes = _tree(paths, share)
    starts = np.cumsum([0, *(node.stop - node.start for node in nodes)])

    rows_of = [
        np.empty(len(path), np.int64) for path in paths
    ]  # stream row of each position of each sequence
    keys, positions = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.int64)
    segments = []
    for i, node in enumerate(nodes):
        first = node.members[0]
        rows = slice(starts[i], starts[i + 1])
        keys[rows] = paths[first][node.start : node.stop]
        positions[rows] = np.arange(node.start, node.stop)
        behind = node.start >= examples[first].sequence.video_start + num_slots
        segments.append(
            Segment(
                int(starts[i]), int(starts[i + 1]), node.parent, bool(keys[starts[i]] < 0), behind
            )
        )
        for member in node.members:
            rows_of[member][node.start : node.stop] = np.arange(starts[i], starts[i + 1])

    slot_rows = np.flatnonzero(keys < 0)
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.maximum(keys, 0)),
        positions_T=torch.from_numpy(positions),
        slot_rows_S=torch.from_numpy(slot_rows),
        slot_frames_S=torch.from_numpy(-1 - keys[slot_rows]),
        features_VFC=features_VFC,
        segments=tuple(segments),
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


def _tree(paths: list[list[int]], share: bool) -> list[_Node]:
    """The paths' radix tree, level by level, so that the rows below a node are neighbours on each level.

    A node holds video slots or text, never both: gate2 is then one number for all rows of one node against another's.
    """
    nodes: list[_Node] = []
    groups = [list(range(len(paths)))] if share else [[i] for i in range(len(paths))]
    work: deque[tuple[list[int], int, int | None]] = deque((group, 0, None) for group in groups)
    while work:
        members, depth, parent = work.popleft()
        for group in _branches(paths, members, depth):
            stop = _kind_stop(
                paths[group[0]], depth, _common_stop([paths[m] for m in group], depth)
            )
            nodes.append(_Node(depth, stop, group, parent))
            work.append((group, stop, len(nodes) - 1))
    return nodes


def _branches(paths: list[list[int]], members: list[int], depth: int) -> list[list[int]]:
    """`members` by how they go on at `depth`; groups that would share too little there are divided where they part."""
    by_key: dict[int, list[int]] = {}
    for member in members:
        if len(paths[member]) > depth:
            by_key.setdefault(paths[member][depth], []).append(member)
    branches: list[list[int]] = []
    for group in by_key.values():
        stop = _common_stop([paths[m] for m in group], depth)
        if _is_worth_sharing(paths, group, depth, stop):
            branches.append(group)
        else:
            branches += [[m] for m in group if len(paths[m]) == stop] + _branches(
                paths, group, stop
            )
    return branches


def _is_worth_sharing(paths: list[list[int]], group: list[int], depth: int, stop: int) -> bool:
    """Whether the rows that sharing [depth, stop) saves are more than it costs the rows below."""
    below = {
        paths[m][stop]: len(paths[m]) - stop for m in group if len(paths[m]) > stop
    }  # one path for each way to go on
    ended = sum(len(paths[m]) == stop for m in group)
    saved = (stop - depth) * (len(below) + ended - 1)
    return saved * COST_OF_SHARING >= sum(below.values())


def _kind_stop(path: list[int], depth: int, stop: int) -> int:
    """Where, in [depth, stop), the path turns from text to video slots or back."""
    is_video = path[depth] < 0
    return next((i for i in range(depth, stop) if (path[i] < 0) != is_video), stop)


def _common_stop(group: list[list[int]], depth: int) -> int:
    """Depth behind the common beginning of `group`, whose members agree up to `depth`."""
    low, high = min(group), max(group)  # what the least and the greatest share, all share
    stop = depth
    while stop < len(low) and stop < len(high) and low[stop] == high[stop]:
        stop += 1
    return stop


def _targets(examples: Sequence[Example], rows_of: list[np.ndarray]) -> dict[str, Tensor]:
    """The target fields of a PackedBatch. Losses follow the order: all token targets, then all frame targets."""
    numbered = list(enumerate(examples))
    tokens = [(i, e) for i, e in numbered if e.sequence.task != "qav"]
    frames = [(i, e) for i, e in numbered if e.sequence.task == "qav"]

    def joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def rows(of: list[tuple[int, Example]]) -> np.ndarray:
        return joined(
            [rows_of[i][e.sequence.targets.start - 1 : e.sequence.targets.stop - 1] for i, e in of]
        )

    def repeated(of: list[tuple[int, Example]], values: list[int]) -> np.ndarray:
        return np.repeat(np.array(values, np.int64), [len(e.sequence.targets) for _, e in of])

    token_rows, frame_rows = rows(tokens), rows(frames)
    wanted, places = np.unique(np.concatenate([token_rows, frame_rows]), return_inverse=True)
    fields = {
        "wanted_rows_R": wanted,
        "token_targets_N": places[: len(token_rows)],
        "token_target_ids_N": joined(
            [
                np.array(e.sequence.tokens[e.sequence.targets.start : e.sequence.targets.stop])
                for _, e in tokens
            ]
        ),
        "frame_targets_M": places[len(token_rows) :],
        "frame_videos_M": repeated(frames, [e.clip for _, e in frames]),
        "frame_target_ids_M": joined([np.arange(len(e.sequence.targets)) for _, e in frames]),
        "target_tasks": np.concatenate(
            [repeated(of, [e.task for _, e in of]) for of in (tokens, frames)]
        ),
        "target_sequences": np.concatenate(
            [repeated(of, [i for i, _ in of]) for of in (tokens, frames)]
        ),
    }
    return {name: torch.from_numpy(value) for name, value in fields.items()}
