"""From sequences to one packed stream: a radix tree of what they share, one segment per node.

Sequences share the instruction that all sequences of a task begin with, the prompt that all
options of a question follow, and the video that several questions are about. A causal row depends
only on what precedes it, so equal beginnings have equal rows, whatever follows.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vico.data.types import VIDEO_SLOT, TokenSequence
from vico.model.batch import PackedBatch, Segment

# A shared row costs each layer one attention block against all rows below it: as measured, 1/20 of
# computing each of those rows.
COST_OF_SHARING = 20

# A path is a sequence's inputs as keys, equal where rows may be shared: token ids, and -1 - (v * F
# + j) in the slot of frame j of clip v.
Path = list[int]


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence, and what packing must know besides."""

    sequence: TokenSequence
    clip: int  # row of features_VFC: the clip in its slots
    task: int  # column of its losses


@dataclass(frozen=True, slots=True)
class _Node:
    """Positions [start, stop) of the sequences that run through it."""

    start: int
    stop: int
    members: list[int]
    parent: int | None


def pack(
    examples: Sequence[Example],
    features_VFC: Tensor,
    share: bool = True,
    texts: PackedBatch | None = None,
) -> PackedBatch:
    """One micro-batch as a packed stream. `share=False`: sequences share nothing (reference).

    `texts`: the last examples alone, for the frozen model.
    """
    num_slots = features_VFC.shape[1]
    paths = [_path(example, num_slots) for example in examples]
    nodes = _tree(paths, share)
    starts = np.cumsum([0, *(node.stop - node.start for node in nodes)])

    # rows_of[i][t]: stream row of position t of sequence i
    rows_of = [np.empty(len(path), np.int64) for path in paths]
    keys = np.empty(starts[-1], np.int64)
    positions = np.empty(starts[-1], np.int64)
    segments = []
    for node, start, stop in zip(nodes, starts[:-1], starts[1:], strict=True):
        first = node.members[0]
        keys[start:stop] = paths[first][node.start : node.stop]
        positions[start:stop] = np.arange(node.start, node.stop)
        is_video = bool(keys[start] < 0)
        after_video = node.start >= examples[first].sequence.video_start + num_slots
        segments.append(Segment(int(start), int(stop), node.parent, is_video, after_video))
        for member in node.members:
            rows_of[member][node.start : node.stop] = np.arange(start, stop)

    slot_rows = np.flatnonzero(keys < 0)
    return PackedBatch(
        token_ids_T=torch.from_numpy(np.maximum(keys, 0)),
        positions_T=torch.from_numpy(positions),
        slot_rows_S=torch.from_numpy(slot_rows),
        slot_frames_S=torch.from_numpy(-1 - keys[slot_rows]),
        features_VFC=features_VFC,
        segments=tuple(segments),
        num_real_tokens=sum(len(example.sequence.tokens) for example in examples),
        texts=texts,
        **_targets(examples, rows_of),
    )


def _path(example: Example, num_slots: int) -> Path:
    sequence = example.sequence
    path = list(sequence.tokens[: sequence.num_inputs])
    for j in range(num_slots):
        position = sequence.video_start + j
        if position < len(path):  # a frame that is only ever a target is never an input
            assert path[position] == VIDEO_SLOT
            path[position] = -1 - (example.clip * num_slots + j)
    return path


def _tree(paths: list[Path], share: bool) -> list[_Node]:
    """The radix tree of the paths, level by level.

    This order makes the rows below a node neighbours on each level. A node holds video slots or
    text, never both: gate2 is then one number for all rows of one node against those of another.
    """
    nodes: list[_Node] = []
    all_members = list(range(len(paths)))
    roots = [all_members] if share else [[i] for i in all_members]
    queue: deque[tuple[list[int], int, int | None]] = deque((root, 0, None) for root in roots)
    while queue:
        members, depth, parent = queue.popleft()
        for branch in _branches(paths, members, depth):
            shared_stop = _common_stop([paths[m] for m in branch], depth)
            stop = _kind_stop(paths[branch[0]], depth, shared_stop)
            nodes.append(_Node(depth, stop, branch, parent))
            queue.append((branch, stop, len(nodes) - 1))
    return nodes


def _branches(paths: list[Path], members: list[int], depth: int) -> list[list[int]]:
    """`members` by their key at `depth`. A group that would share too little is divided later."""
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
            branches += [[m] for m in group if len(paths[m]) == stop]
            branches += _branches(paths, group, stop)
    return branches


def _is_worth_sharing(paths: list[Path], group: list[int], depth: int, stop: int) -> bool:
    """Whether sharing [depth, stop) saves more rows than it costs the rows below."""
    # One continuation per different key at `stop`: members with the same key go on sharing.
    rows_below = {paths[m][stop]: len(paths[m]) - stop for m in group if len(paths[m]) > stop}
    num_ended = sum(len(paths[m]) == stop for m in group)
    saved_rows = (stop - depth) * (len(rows_below) + num_ended - 1)
    return saved_rows * COST_OF_SHARING >= sum(rows_below.values())


def _kind_stop(path: Path, depth: int, stop: int) -> int:
    """Where in [depth, stop) the path turns from text to video slots or back; `stop` if nowhere."""
    is_video = path[depth] < 0
    for i in range(depth, stop):
        if (path[i] < 0) != is_video:
            return i
    return stop


def _common_stop(group: list[Path], depth: int) -> int:
    """Depth at which the common beginning of `group` ends. Its members agree up to `depth`."""
    # What the smallest and the largest share, all share.
    low, high = min(group), max(group)
    stop = depth
    while stop < len(low) and stop < len(high) and low[stop] == high[stop]:
        stop += 1
    return stop


def _targets(examples: Sequence[Example], rows_of: list[np.ndarray]) -> dict[str, Tensor]:
    """The target fields of a PackedBatch. Losses are ordered: token targets, then frame targets."""
    token_sequences = [i for i, e in enumerate(examples) if not e.sequence.predicts_frames]
    frame_sequences = [i for i, e in enumerate(examples) if e.sequence.predicts_frames]

    def predicting_rows(i: int) -> np.ndarray:
        targets = examples[i].sequence.targets
        return rows_of[i][targets.start - 1 : targets.stop - 1]

    def token_ids(i: int) -> np.ndarray:
        sequence = examples[i].sequence
        return np.array(sequence.tokens[sequence.targets.start : sequence.targets.stop])

    def frame_ids(i: int) -> np.ndarray:
        return np.arange(len(examples[i].sequence.targets))

    def per_target(i: int, value: int) -> np.ndarray:
        return np.full(len(examples[i].sequence.targets), value)

    in_order = [*token_sequences, *frame_sequences]
    token_rows = _concatenate([predicting_rows(i) for i in token_sequences])
    frame_rows = _concatenate([predicting_rows(i) for i in frame_sequences])
    # The head runs once per row, so rows that predict several targets are listed once.
    wanted, places = np.unique(np.concatenate([token_rows, frame_rows]), return_inverse=True)
    fields = {
        "wanted_rows_R": wanted,
        "token_rows_N": places[: len(token_rows)],
        "token_target_ids_N": _concatenate([token_ids(i) for i in token_sequences]),
        "frame_rows_M": places[len(token_rows) :],
        "frame_videos_M": _concatenate([per_target(i, examples[i].clip) for i in frame_sequences]),
        "frame_target_ids_M": _concatenate([frame_ids(i) for i in frame_sequences]),
        "target_tasks": _concatenate([per_target(i, examples[i].task) for i in in_order]),
        "target_sequences": _concatenate([per_target(i, i) for i in in_order]),
    }
    return {name: torch.from_numpy(value) for name, value in fields.items()}


def _concatenate(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)
