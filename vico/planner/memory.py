"""Bytes that the activations of a micro-batch take, counted from the model's dimensions.

The step keeps for backward only what vico/model/ops/autograd.py names, so the count can be exact.
Tests compare it on the meta device with the tensors that autograd saves, and with the largest sum
of live tensors over forward and backward. They fail if a layer ever keeps something else.
"""

from dataclasses import dataclass, replace
from typing import Literal

from vico.model.config import (
    DIVERGENCE_COPIES,
    HEAD_CHUNK_BYTES,
    MAX_GRAPH_ROWS,
    LlamaConfig,
    ViCoConfig,
    padded_keys,
    padded_rows,
    round_up,
    widened_head_dim,
)

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}  # bytes per number
FP32 = ITEMSIZE["fp32"]

# The attention: model/attention/varlen.py (GPUs) or model/attention/blockwise.py (CPUs).
Kernel = Literal["varlen", "blockwise"]


@dataclass(frozen=True)
class BatchShape:
    """The size of one micro-batch."""

    num_rows: int  # of the packed stream
    num_wanted_rows: int  # rows that predict a target
    num_targets: int
    num_clips: int
    num_keys: int  # rows that the varlen kernels gather: each segment's ancestors and its own
    num_kept: int = 0  # of the targets, those of --keep's texts


@dataclass(frozen=True)
class RunShape:
    """How the model runs."""

    itemsize: int  # bytes per number
    kernel: Kernel = "varlen"
    num_checkpointed: int = 0  # the first layers, which backward recomputes
    head_chunk_bytes: int = HEAD_CHUNK_BYTES["cuda"]
    cuda_graphs: bool = False  # replay micro-batches below MAX_GRAPH_ROWS


@dataclass(frozen=True)
class LayerActivations:
    """Bytes that one layer keeps for backward, by the part whose backward frees them."""

    attention: int  # the norm's input, q, k, v, and the output of varlen kernels
    feed_forward: int  # the norm's input, w1 x, w3 x

    @property
    def saved(self) -> int:
        return self.attention + self.feed_forward


@dataclass(frozen=True)
class Activations:
    """Bytes at the worst moments of a micro-batch."""

    saved: int  # kept at the end of forward
    head: int  # needed by the output head at the end of forward, above `saved`
    backward: int  # needed at the worst moment of backward, above `saved`

    @property
    def peak(self) -> int:
        """The head and backward have their worst moments at different times."""
        return self.saved + max(self.head, self.backward)


def layer_activations(
    config: ViCoConfig, batch: BatchShape, run: RunShape, last: bool
) -> LayerActivations:
    """What one layer keeps. In the last one only the wanted rows are query rows."""
    dim, heads_dim, itemsize = config.dim, config.heads_dim, run.itemsize
    heads, rows = config.n_heads, batch.num_rows
    query_rows = batch.num_wanted_rows if last else rows
    if run.kernel == "varlen":
        # q, k and v. The last layer's q is spread over all rows, and kept twice.
        qkv = (3 * rows + (query_rows if last else 0)) * heads_dim * itemsize
        # The kernel's output, and the log-sum-exp of each row and head.
        output = rows * heads * (widened_head_dim(config.head_dim) * itemsize + FP32)
    else:
        qkv = (2 * rows + query_rows) * heads_dim * itemsize
        output = query_rows * (heads_dim * itemsize + heads * FP32)
    prompt_kv = 2 * config.adapter_len * heads_dim * itemsize
    # The last layer has its own copy of the query rows' rotary angles.
    rotary = query_rows * config.head_dim * FP32 if last else 0
    # A norm keeps its input, and one factor per row.
    norm = dim * itemsize + FP32
    return LayerActivations(
        attention=rows * norm + qkv + output + prompt_kv + rotary,
        feed_forward=query_rows * (norm + 2 * config.hidden_dim * itemsize),
    )


def padded(batch: BatchShape) -> BatchShape:
    """The micro-batch as CUDA graphs replay it."""
    keys = padded_keys(batch.num_rows, batch.num_keys)
    return replace(batch, num_rows=padded_rows(batch.num_rows), num_keys=keys)


def activations(config: ViCoConfig, batch: BatchShape, run: RunShape) -> Activations:
    """Bytes at the worst moments of one micro-batch."""
    inputs = 0
    if run.cuda_graphs:
        inputs += _graph_buffers(config, run)
        if batch.num_rows < MAX_GRAPH_ROWS:
            batch = padded(batch)
    inputs += batch.num_rows * config.head_dim * FP32  # rotary angles
    inputs += batch.num_clips * config.num_slots * config.feature_width * FP32
    if run.num_checkpointed:
        inputs += config.num_prompt_parameters * run.itemsize

    row_bytes = config.dim * run.itemsize
    inner = layer_activations(config, batch, run, last=False)
    layers = [inner] * (config.n_layers - 1)
    layers.append(layer_activations(config, batch, run, last=True))
    # A recomputed layer keeps its input alone.
    stream = batch.num_rows * row_bytes
    saved_by_layer = [
        stream if i < run.num_checkpointed else layer.saved for i, layer in enumerate(layers)
    ]
    final_norm = batch.num_wanted_rows * (row_bytes + FP32)
    # The output head keeps its input's gradient, up to a factor.
    head_gradients = batch.num_targets * row_bytes
    saved = sum(saved_by_layer) + inputs + final_norm + head_gradients
    worst_backward = inputs + _backward_peak(config, batch, run, layers, saved_by_layer)
    return Activations(
        saved=saved,
        head=_head_peak(config, batch, run) - head_gradients,
        backward=max(0, worst_backward - saved),
    )


def _graph_buffers(config: ViCoConfig, run: RunShape) -> int:
    """CUDA graphs' fixed buffers: the stream, its gradient, rotary angles and prompts."""
    stream = 2 * config.dim * run.itemsize + config.head_dim * FP32
    return MAX_GRAPH_ROWS * stream + config.num_prompt_parameters * run.itemsize


def _head_peak(config: ViCoConfig, batch: BatchShape, run: RunShape) -> int:
    """Live at the worst moment of the output head's forward, besides what the layers keep."""
    row_bytes = config.dim * run.itemsize
    wanted, targets = batch.num_wanted_rows, batch.num_targets - batch.num_kept
    prompts = config.num_prompt_parameters * run.itemsize
    frames = 2 * batch.num_clips * config.num_slots * config.dim * FP32
    # The head's input, and of --keep's texts the frozen model's states.
    held = prompts + frames + (wanted + batch.num_kept) * row_bytes
    # A gradient for each target; of those of texts, the adapted model's states beside it.
    divergence = (targets + 2 * batch.num_kept) * row_bytes + _divergence_chunk(config, batch, run)
    losses = _losses_peak(config, batch, run)
    return held + (max(losses, divergence) if batch.num_kept else losses)


def _losses_peak(config: ViCoConfig, batch: BatchShape, run: RunShape) -> int:
    """Of the cross-entropies, besides the head's input."""
    row_bytes = config.dim * run.itemsize
    wanted, targets = batch.num_wanted_rows, batch.num_targets - batch.num_kept
    logits = config.vocab_size * FP32  # of one row
    max_rows = max(1, run.head_chunk_bytes // logits)
    # Rows of the model's width that are multiplied in fp32, and their product.
    products = 3 * config.dim * FP32
    if run.itemsize < FP32:
        # A product in half precision is copied to fp32; so are the softmax's weights copied back.
        half_logits = config.vocab_size * run.itemsize
        of_row = logits + max(half_logits + 3 * row_bytes, 2 * row_bytes + products)
        return targets * row_bytes + min(targets, max_rows) * of_row
    # The weights' expectation under the softmax.
    rows = wanted * row_bytes
    chunk_rows = min(wanted, max_rows)
    next_chunk_rows = min(chunk_rows, wanted - chunk_rows)
    last_chunk_rows = wanted % chunk_rows or chunk_rows
    within_chunk = chunk_rows * (logits + row_bytes)
    # The logits of one chunk are still held while those of the next are computed.
    between_chunks = (chunk_rows + next_chunk_rows) * logits
    after_chunks = last_chunk_rows * logits + targets * (row_bytes + products)
    return rows + max(within_chunk, between_chunks, after_chunks)


def _divergence_chunk(config: ViCoConfig, batch: BatchShape, run: RunShape) -> int:
    """Of --keep's divergence: all that is made of the logits of some rows."""
    share = run.head_chunk_bytes // DIVERGENCE_COPIES
    logits = config.vocab_size * FP32  # of one row
    rows = min(batch.num_kept, max(1, share // logits))
    # Log-probabilities of both models, and probabilities.
    chunk = 3 * rows * logits
    if run.itemsize == FP32:
        return chunk
    columns = min(config.vocab_size, max(1, share // (config.dim * FP32)))
    # Or states and logits of both models, a converted part of the weight and its product.
    converted = 2 * rows * (config.dim * FP32 + logits) + columns * (config.dim + rows) * FP32
    half = rows * config.vocab_size * run.itemsize
    return max(chunk + half, converted)


def _backward_peak(
    config: ViCoConfig,
    batch: BatchShape,
    run: RunShape,
    layers: list[LayerActivations],
    saved_by_layer: list[int],
) -> int:
    """The most bytes of the layers at any moment of backward, without the inputs."""
    row_bytes = config.dim * run.itemsize
    prompt_gradients = 2 * config.num_prompt_parameters * run.itemsize
    frame_gradients = batch.num_clips * config.num_slots * config.dim * FP32
    peak = 0
    saved_below = 0
    for i, layer in enumerate(layers):
        is_last = i + 1 == config.n_layers
        query_rows = batch.num_wanted_rows if is_last else batch.num_rows
        gradient = query_rows * row_bytes
        held = saved_below + prompt_gradients + frame_gradients
        if i < run.num_checkpointed:  # the layer's input, besides what it recomputes
            held += batch.num_rows * row_bytes
        # SwiGLU: the incoming gradient, sigmoid, silu and two tensors of its slope, while the
        # gradient of the residual waits.
        swiglu = gradient + 5 * query_rows * config.hidden_dim * run.itemsize
        # With varlen kernels a block is one autograd Function: what its feed-forward kept is
        # freed with the rest.
        one_function = run.kernel == "varlen" and not is_last
        saved_here = layer.saved if one_function else layer.attention
        # The gradients of the block's output and of the attention's.
        gradients = gradient + query_rows * config.heads_dim * run.itemsize
        attention = gradients + _attention_backward(config, batch, run, query_rows)
        peak = max(peak, held + layer.saved + swiglu, held + saved_here + attention)
        saved_below += saved_by_layer[i]
    return peak


def _attention_backward(
    config: LlamaConfig, batch: BatchShape, run: RunShape, query_rows: int
) -> int:
    """What the attention of one layer allocates in backward."""
    if run.kernel == "blockwise":
        # fp32 throughout: the gradients, and copies where the stream is narrower.
        copies = 0 if run.itemsize == FP32 else 2 * batch.num_rows + 3 * query_rows
        return (2 * batch.num_rows + query_rows + copies) * config.heads_dim * FP32
    head_dim = widened_head_dim(config.head_dim)
    # q, k, v and all gradients are made again.
    recomputed = (3 * batch.num_rows + 4 * batch.num_keys) * config.n_heads * head_dim
    # FlashAttention sums the gradient of q in fp32.
    accumulator = batch.num_rows * config.n_heads * round_up(head_dim, 32)
    return recomputed * run.itemsize + accumulator * FP32
