"""Which code runs the blocks of a model; chosen once, when the model is built.

- The modules (llama.run_modules): any block, and always the last one, where only the rows that
  predict a target are queries.
- One autograd Function (fused_block.run_fused): adapted blocks under attention over the whole
  stream; with grouped heads only under --attention segment, which takes them.
- CUDA graphs (cuda_graphs.GraphedBlocks): all blocks but the last, of short training
  micro-batches, over the two above.

`GraphedBlocks.accepts` decides what is only known per call: whether autograd is on and the stream
is short.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vico.model.attention.masks import Attend
from vico.model.attention.stream import StreamAttention
from vico.model.config import MAX_GRAPH_ROWS
from vico.model.cuda_graphs import GraphedBlocks
from vico.model.fused_block import run_fused
from vico.model.llama import run_modules
from vico.model.vico import ViCo

GRAPHS_ENABLED = os.environ.get("VICO_GRAPHS", "on") != "off"  # the one switch, for comparisons


def choose_block_runners(
    model: ViCo, attend: Attend, num_checkpointed: int = 0, no_graphs: str | None = None
) -> str:
    """Make `model` attend by `attend`, and compute its blocks in the fastest way that this allows.

    `num_checkpointed`: of the lowest layers, how many run again in backward. `no_graphs`: the
    caller's reason against CUDA graphs. Returns what was decided about them, and why, for the start
    line.
    """
    model.attend, model.num_checkpointed = attend, num_checkpointed
    blocks = model.blocks
    is_grouped = model.config.kv_heads != model.config.n_heads
    takes_heads = isinstance(attend, StreamAttention) and (
        attend.takes_grouped_heads or not is_grouped
    )
    for block in blocks:
        can_fuse = takes_heads and block.adapted and block is not blocks[-1]
        block.run = run_fused if can_fuse else run_modules
    no_graphs = _why_no_graphs(model, no_graphs)
    model.graphed = GraphedBlocks(model) if no_graphs is None else None
    if no_graphs is not None:
        return f"no CUDA graphs ({no_graphs})"
    return f"training on up to {MAX_GRAPH_ROWS:,} rows by CUDA graphs"


@contextmanager
def attending_by(model: ViCo, attend: Attend) -> Iterator[None]:
    """`model` attends by the function `attend`, all layers by their modules; then as before."""
    chosen = model.attend, model.num_checkpointed, model.graphed
    runs = [block.run for block in model.blocks]
    choose_block_runners(model, attend)
    try:
        yield
    finally:
        model.attend, model.num_checkpointed, model.graphed = chosen
        for block, run in zip(model.blocks, runs, strict=True):
            block.run = run


def _why_no_graphs(model: ViCo, reason: str | None) -> str | None:
    """The first reason against CUDA graphs; None: there is none. `reason`: the caller's."""
    if (of_device := why_no_graphs_on(model.tok_embeddings.weight.device)) is not None:
        return of_device
    if reason is not None:
        return reason
    if not (isinstance(model.attend, StreamAttention) and model.attend.can_be_captured):
        return "only with --attention varlen or segment"
    if model.num_checkpointed > 0:
        return "layers are recomputed"
    if model.num_adapted < 2:
        return "one adapted layer"
    return None


def why_no_graphs_on(device: torch.device) -> str | None:
    """Why no run on `device` uses CUDA graphs, whatever its settings; None: some do."""
    if not _is_gpu(device):
        return "a CPU"
    return None if GRAPHS_ENABLED else "VICO_GRAPHS=off"


def _is_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
