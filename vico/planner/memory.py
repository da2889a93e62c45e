"""How many bytes a micro-batch and a model take, counted from their dimensions; nothing is loaded, no torch.

The step keeps for backward only what vico/model/ops/autograd.py says, so the count is short enough to be exact. The tests
hold it against the tensors that autograd saves, and against the largest sum of live tensors over forward and backward, on
the meta device. If a layer keeps something else one day, they fail.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

FEATURE_WIDTH = 768  # CLIP ViT-L/14
LLAMA_VOCAB_SIZE = 32000  # of the tokenizer of LLaMA-1 and 2
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
HEAD_CHUNK_BYTES = {
    "cpu": 2**25,
    "cuda": 2**28,
}  # of fp32 logits at a time, as in model/functions.py
REPLAYED_ROWS = (
    4096  # shorter micro-batches are filled up, and replayed by CUDA graphs; as in model/graphs.py
)

# Per number of a packed weight, its share of the scales included: one of 4 bytes for each 256; one of a byte for each 64, and of 4
# bytes for each 256 of those. Whole blocks; model/quantized.py.
QUANTIZED_BYTES = {"8bit": 1 + 4 / 256, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}

Kernel = Literal["packed", "blocks"]  # attention_packed.py (GPUs), attention.py (CPUs)


@dataclass(frozen=True)
class ModelSize:
    """A backbone's dimensions as plain numbers."""

    name: str
    dim: int
    n_layers: int
    n_heads: int
    hidden_dim: int
    vocab_size: int = LLAMA_VOCAB_SIZE
    kv_heads: int = 0  # 0: as many as n_heads
    adapter_len: int = 10
    num_slots: int = 10

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def block(self) -> int:
        """Parameters of a decoder block's products."""
        kv_dim = (self.kv_heads or self.n_heads) * self.head_dim
        return 2 * self.dim * (self.dim + kv_dim) + 3 * self.dim * self.hidden_dim

    @property
    def head(self) -> int:
        """Parameters of the output head, and of the embeddings."""
        return self.vocab_size * self.dim

    @property
    def frozen(self) -> int:
        return self.n_layers * self.block + 2 * self.head + self.norms

    def frozen_bytes(self, width: int, quantize: str | None = None) -> int:
        """Of the backbone; --quantize packs the blocks' products."""
        if quantize is None:
            return self.frozen * width
        return (
            math.ceil(self.n_layers * self.block * QUANTIZED_BYTES[quantize])
            + (2 * self.head + self.norms) * width
        )

    @property
    def norms(self) -> int:
        return (2 * self.n_layers + 1) * self.dim

    @property
    def prompts(self) -> int:
        return self.n_layers * self.adapter_len * self.dim

    @property
    def trainables(self) -> int:
        """adapter_query, visual_proj, temporal_emb and two gates per layer; fp32 always."""
        return (
            self.prompts
            + (FEATURE_WIDTH + self.num_slots) * self.dim
            + 2 * self.n_layers * self.n_heads
        )


class Shape(Protocol):
    """model/llama.py's LlamaConfig, as far as it matters here."""

    @property
    def dim(self) -> int: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def hidden_dim(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...


def size_of(name: str, shape: Shape, adapter_len: int = 10, num_slots: int = 10) -> ModelSize:
    """Of a model whose params.json leaves the vocabulary to the tokenizer (-1): LLaMA-1's and 2's."""
    vocabulary = LLAMA_VOCAB_SIZE if shape.vocab_size == -1 else shape.vocab_size
    numbers = (
        shape.dim,
        shape.n_layers,
        shape.n_heads,
        shape.hidden_dim,
        vocabulary,
        shape.kv_heads,
    )
    return ModelSize(name, *numbers, adapter_len, num_slots)


@dataclass(frozen=True)
class BatchShape:
    """The size of one micro-batch."""

    rows: int  # of the packed stream
    wanted: int  # rows that predict a target
    targets: int
    clips: int
    keys: int  # rows that the packed kernels gather: each segment's ancestors and its own


@dataclass(frozen=True)
class RunShape:
    """How the model runs: bytes per number, which attention, how many of the first layers are recomputed in backward."""

    width: int
    kernel: Kernel = "packed"
    num_checkpointed: int = 0
    head_chunk_bytes: int = HEAD_CHUNK_BYTES["cuda"]
    replayed: bool = False  # what is short enough, by model/graphs.py


@dataclass(frozen=True)
class Layer:
    """What one layer keeps for backward, by the part whose backward frees it."""

    attention: int  # its norm's input, q, k, v, and of packed kernels the output
    feed_forward: int  # its norm's input, w1 x, w3 x

    @property
    def kept(self) -> int:
        return self.attention + self.feed_forward


@dataclass(frozen=True)
class Activations:
    """Bytes at the worst moments of a micro-batch."""

    saved: int  # kept at the end of forward
    head: int  # the output head's own need at the end of forward, above `saved`
    backward: int  # above `saved` at the worst moment of backward; 0 where backward only falls

    @property
    def peak(self) -> int:
        """The head and backward have their worst moments at different times."""
        return self.saved + max(self.head, self.backward)


def layer(size: ModelSize, work: BatchShape, setting: RunShape, last: bool) -> Layer:
    """Bytes that one layer keeps; in the last one only the wanted rows ask."""
    width, rows = setting.width, work.rows
    asking = work.wanted if last else rows
    prompt = 2 * size.adapter_len * size.dim * width  # its keys and values
    if setting.kernel == "packed":  # where few ask, q is spread over all rows, and kept twice
        heads = (3 * rows + (asking if last else 0)) * size.dim * width + rows * size.n_heads * (
            _widened(size) * width + 4
        )
    else:
        heads = (2 * rows + 2 * asking) * size.dim * width + asking * size.n_heads * 4
    rotary = asking * size.head_dim * 4 if last else 0  # of the rows that ask, its own copy
    attention = rows * (size.dim * width + 4) + heads + prompt + rotary
    return Layer(attention, asking * ((size.dim + 2 * size.hidden_dim) * width + 4))


def padded(work: BatchShape) -> BatchShape:
    """A micro-batch as it is replayed (model/layout.py)."""
    rows, more = -(-(work.rows + 1) // 128) * 128, work.keys - work.rows
    multiple = max(256, 1 << max(0, more.bit_length() - 3))
    return replace(work, rows=rows, keys=rows + -(-more // multiple) * multiple)


def activations(size: ModelSize, work: BatchShape, setting: RunShape) -> Activations:
    own = 0
    if setting.replayed:
        work = padded(work) if work.rows < REPLAYED_ROWS else work
        # The stream and its gradient, rotary angles and prompts, at places that stay.
        own = (
            REPLAYED_ROWS * (2 * size.dim * setting.width + size.head_dim * 4)
            + size.prompts * setting.width
        )
    full, last = layer(size, work, setting, last=False), layer(size, work, setting, last=True)
    layers = [full] * (size.n_layers - 1) + [last]
    stream = work.rows * size.dim * setting.width
    kept = [stream if i < setting.num_checkpointed else each.kept for i, each in enumerate(layers)]
    inputs = (
        own + work.rows * size.head_dim * 4 + work.clips * size.num_slots * FEATURE_WIDTH * 4
    )  # rotary angles, features
    if setting.num_checkpointed:
        inputs += size.prompts * setting.width
    final_norm = work.wanted * (size.dim * setting.width + 4)
    differences = (
        work.targets * size.dim * setting.width
    )  # of the output head, the gradient but for a factor
    saved = sum(kept) + inputs + final_norm + differences
    worst = max(inputs + below + top for below, top in _backward(size, work, setting, layers, kept))
    return Activations(saved, _head(size, work, setting) - differences, max(0, worst - saved))


def _head(size: ModelSize, work: BatchShape, setting: RunShape) -> int:
    """Live at the worst moment of the output head's forward, besides what the layers keep."""
    width, row = setting.width, size.dim * setting.width
    row_logits = 4 * size.vocab_size
    chunk = min(work.wanted, max(1, setting.head_chunk_bytes // row_logits))
    following = min(chunk, work.wanted - chunk)  # rows of the second chunk, 0: there is none
    half = (
        row_logits * width // 4 if width < 4 else 0
    )  # of a row, where the product is narrower than fp32
    # The logits of one chunk are still held while those of the next are made.
    in_loop = max(
        chunk * (row_logits + half + row), chunk * row_logits + following * (row_logits + half)
    )
    behind = (work.wanted % chunk or chunk) * row_logits + work.targets * (row + 12 * size.dim)
    prompts = size.prompts * width
    frames = work.clips * size.num_slots * size.dim * 8
    return (
        2 * work.wanted * row + prompts + frames + max(in_loop, behind)
    )  # 2: h, and what the softmax expects of the weights


def _backward(
    size: ModelSize, work: BatchShape, setting: RunShape, layers: list[Layer], kept: list[int]
) -> Iterator[tuple[int, int]]:
    """(what the layers below keep, what this layer needs) for each layer's feed-forward and attention."""
    width, below = setting.width, 0
    small = (
        2 * size.prompts * width + work.clips * size.num_slots * size.dim * 4
    )  # gradients of the prompts and of the frames
    for i, each in enumerate(layers):
        asking = work.wanted if i + 1 == size.n_layers else work.rows
        stream = asking * size.dim * width
        again = (
            work.rows * size.dim * width if i < setting.num_checkpointed else 0
        )  # a recomputed layer's input, besides
        # SwiGLU: the gradient that comes in, sigmoid, silu and two of its slope; the residual's gradient waits.
        yield below, again + each.kept + stream + 5 * asking * size.hidden_dim * width + small
        # Attention: where a block is one Function (packed kernels), what its feed-forward kept is still there.
        kept_here = (
            each.kept if setting.kernel == "packed" and i + 1 < size.n_layers else each.attention
        )
        yield (
            below,
            again
            + kept_here
            + 2 * stream
            + _attention_backward(size, work, setting, asking)
            + small,
        )
        below += kept[i]


def _attention_backward(size: ModelSize, work: BatchShape, setting: RunShape, asking: int) -> int:
    if (
        setting.kernel == "blocks"
    ):  # fp32 throughout: gradients, and copies where the stream is narrower
        copies = 0 if setting.width == 4 else 2 * work.rows + 3 * asking
        return (2 * work.rows + asking + copies) * size.dim * 4
    made_again = (
        (3 * work.rows + 4 * work.keys) * size.n_heads * _widened(size) * setting.width
    )  # q, k, v, all gradients
    accumulator = (
        work.rows * size.n_heads * (-(-_widened(size) // 32) * 32) * 4
    )  # FlashAttention's fp32 sum of q's gradient
    return made_again + accumulator


def _widened(size: ModelSize) -> int:
    """Head width with the dimensions that hold gate2."""
    return size.head_dim + 2 + -(size.head_dim + 2) % 8
