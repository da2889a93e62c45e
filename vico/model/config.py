"""A model's dimensions as plain numbers; constants that model, planner and benchmarks share.

No torch: the planner and the command line answer without it.
"""

import math
import re
from dataclasses import dataclass
from typing import Final

Shapes = dict[str, tuple[int, ...]]  # parameter name -> shape

FEATURE_WIDTH = 768  # of CLIP ViT-L/14; other features have their own
EMBEDDINGS = "tok_embeddings.weight"
VOCABULARY = (EMBEDDINGS, "output.weight")  # tensors with a row per token
LLAMA_VOCAB_SIZE = 32000  # of the tokenizer of LLaMA-1 and 2
# fp32 logits that the output head holds at a time.
HEAD_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# The divergence of --keep holds this many tensors of its chunk's size: three of log-probabilities
# and probabilities, one in half precision; or logits of both models and a part of the weight.
DIVERGENCE_COPIES = 4
# Longer micro-batches are not replayed by CUDA graphs: the host launches faster than they compute.
MAX_GRAPH_ROWS = 4096

FP8: Final = "fp8"  # --quantize: computed in 8 bits too, by torch
# Weights that share a scale under the other kinds of --quantize, by bitsandbytes.
QUANTIZATION_BLOCK_SIZES = {"8bit": 256, "nf4": 64}
# Of a window of plain text, BOS included: of one that each question brings with --keep...
KEPT_POSITIONS = 64
# ...with the weight of --keep without a number (vico/README.md says what it does)...
KEPT_WEIGHT = 1.0
# ...and of one that is measured, where nothing else is asked for.
DEFAULT_WINDOW = 1024
# Bytes per weight, with its share of the scales. 8bit: an fp32 scale per block of 256.
# nf4: an 8-bit scale per block of 64, and an fp32 scale for every 256 of those.
QUANTIZED_BYTES = {"8bit": 1 + 4 / 256, "nf4": 0.5 + 1 / 64 + 4 / (64 * 256)}
QUANTIZATIONS = (*QUANTIZED_BYTES, FP8)


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3.1's scaled rotary embedding.

    Frequencies that turn fewer than old_context / low_factor times are divided by `factor`.
    """

    factor: float = 8.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    old_context: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a backbone, as its params.json states them."""

    dim: int
    n_layers: int
    n_heads: int
    vocab_size: int
    multiple_of: int = 256
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    # None: as many as n_heads. Fewer: each one serves a group of neighbouring query heads.
    n_kv_heads: int | None = None
    ffn_dim_multiplier: float | None = None
    rope_scaling: RopeScaling | None = None
    # None: dim / n_heads.
    own_head_dim: int | None = None
    # Mistral's: a token sees as many tokens, itself included, so sequences may have as many at
    # most. None: all before it.
    sliding_window: int | None = None

    @property
    def head_dim(self) -> int:
        return self.own_head_dim or self.dim // self.n_heads

    @property
    def heads_dim(self) -> int:
        """Width of the queries of all heads together."""
        return self.n_heads * self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        return mlp_width(self.dim, self.multiple_of, self.ffn_dim_multiplier)

    @property
    def num_block_parameters(self) -> int:
        """Of the linear layers of one decoder block."""
        return sum(math.prod(shape) for shape in block_shapes(self).values() if len(shape) == 2)

    @property
    def num_embedding_parameters(self) -> int:
        """Of the embeddings; the output head has as many."""
        return self.vocab_size * self.dim

    @property
    def num_norm_parameters(self) -> int:
        """Of two norms per decoder block, and the last one."""
        return (2 * self.n_layers + 1) * self.dim

    @property
    def num_parameters(self) -> int:
        """Of the whole backbone, which is frozen."""
        linear = self.n_layers * self.num_block_parameters
        return linear + 2 * self.num_embedding_parameters + self.num_norm_parameters


@dataclass(frozen=True)
class ViCoConfig(LlamaConfig):
    """A backbone and the adapter's dimensions, with all decoder blocks adapted."""

    adapter_len: int = 10  # rows of the prompt per layer
    num_slots: int = 10  # video frames
    feature_width: int = FEATURE_WIDTH

    @classmethod
    def from_llama(
        cls,
        config: LlamaConfig,
        adapter_len: int = 10,
        num_slots: int = 10,
        feature_width: int = FEATURE_WIDTH,
    ) -> "ViCoConfig":
        """A vocabulary of -1, which params.json leaves to the tokenizer, becomes LLaMA-1's."""
        dimensions = vars(config)
        if config.vocab_size == -1:
            dimensions = {**dimensions, "vocab_size": LLAMA_VOCAB_SIZE}
        return cls(
            **dimensions,
            adapter_len=adapter_len,
            num_slots=num_slots,
            feature_width=feature_width,
        )

    @property
    def trainable_shapes(self) -> Shapes:
        sizes = (self.adapter_len, self.num_slots, self.feature_width)
        return trainable_shapes(self, self.n_layers, *sizes)

    @property
    def num_prompt_parameters(self) -> int:
        return math.prod(self.trainable_shapes["adapter_query.weight"])

    @property
    def num_trainables(self) -> int:
        """Trainable parameters, which are fp32 always."""
        return num_elements(self.trainable_shapes)


LLAMA_CONFIGS = {
    "7B": LlamaConfig(4096, 32, 32, LLAMA_VOCAB_SIZE),
    "13B": LlamaConfig(5120, 40, 40, LLAMA_VOCAB_SIZE),
    "33B": LlamaConfig(6656, 60, 52, LLAMA_VOCAB_SIZE),
    "65B": LlamaConfig(8192, 80, 64, LLAMA_VOCAB_SIZE),
    "8B": LlamaConfig(4096, 32, 32, 128256, 1024, n_kv_heads=8, ffn_dim_multiplier=1.3),
    "70B": LlamaConfig(8192, 80, 64, LLAMA_VOCAB_SIZE, 4096, n_kv_heads=8, ffn_dim_multiplier=1.3),
}

# The generations of LLaMA that have these dimensions, by size.
_GENERATIONS = {
    **dict.fromkeys(("7B", "13B"), ("", "1", "2")),
    **dict.fromkeys(("33B", "65B"), ("", "1")),
    "8B": ("", "3", "3.1"),
    "70B": ("2",),
}
_MODEL_NAME = re.compile(r"(?:(?:meta-?)?llama-?([0-9.]*)-)?([0-9]+b)(?:-(?:chat|instruct|hf))*")


def named_model(name: str) -> str | None:
    """The key of LLAMA_CONFIGS of a name such as 7b, llama-2-7b or meta-llama/Llama-2-7b-chat-hf.

    None: another name, or a LLaMA of other dimensions.
    """
    match = _MODEL_NAME.fullmatch(name.lower().rpartition("/")[2])
    if match is None:
        return None
    generation, size = match[1], match[2].upper()
    size = "33B" if size == "30B" else size  # the published name of 32.5 G parameters
    if size not in LLAMA_CONFIGS:
        return None
    return size if generation is None or generation in _GENERATIONS[size] else None


def trainable_shapes(
    config: LlamaConfig,
    num_adapted: int,
    adapter_len: int,
    num_slots: int,
    feature_width: int = FEATURE_WIDTH,
) -> Shapes:
    """Name and shape of every trainable, in the order of published checkpoints."""
    shapes: Shapes = {
        "adapter_query.weight": (num_adapted * adapter_len, config.dim),
        "visual_proj.weight": (config.dim, feature_width),
        "temporal_emb.weight": (num_slots, config.dim),
    }
    for i in range(config.n_layers - num_adapted, config.n_layers):
        for gate in ("gate1", "gate2"):
            shapes[f"layers.{i}.attention.{gate}"] = (1, config.n_heads, 1, 1)
    return shapes


def block_shapes(config: LlamaConfig) -> Shapes:
    """Name and shape of every frozen tensor of one decoder block, in Meta's layout."""
    dim, kv_dim, hidden_dim = config.dim, config.kv_heads * config.head_dim, config.hidden_dim
    return {
        "attention.wq.weight": (config.heads_dim, dim),
        "attention.wk.weight": (kv_dim, dim),
        "attention.wv.weight": (kv_dim, dim),
        "attention.wo.weight": (dim, config.heads_dim),
        "feed_forward.w1.weight": (hidden_dim, dim),
        "feed_forward.w2.weight": (dim, hidden_dim),
        "feed_forward.w3.weight": (hidden_dim, dim),
        "attention_norm.weight": (dim,),
        "ffn_norm.weight": (dim,),
    }


def backbone_shapes(config: LlamaConfig) -> Shapes:
    """Name and shape of every frozen tensor, in Meta's layout."""
    shapes: Shapes = {
        EMBEDDINGS: (config.vocab_size, config.dim),
        "norm.weight": (config.dim,),
        "output.weight": (config.vocab_size, config.dim),
    }
    block = block_shapes(config)
    for i in range(config.n_layers):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in block.items()})
    return shapes


def num_elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def mlp_width(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """SwiGLU's width: two thirds of 4 * dim, times the multiplier, rounded up."""
    width = int(2 * (4 * dim) / 3)
    return round_up(width if multiplier is None else int(multiplier * width), multiple_of)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def round_up_coarsely(number: int, multiple: int) -> int:
    """To a multiple of `multiple`, or of an eighth to a quarter of `number` where that is more.

    So few different results are possible.
    """
    return round_up(number, max(multiple, 1 << max(0, number.bit_length() - 3)))


def widened_head_dim(head_dim: int) -> int:
    """Head width with the two dimensions that carry gate2; CUDA's kernels take multiples of 8."""
    return round_up(head_dim + 2, 8)


def padded_rows(num_rows: int) -> int:
    """Rows of a micro-batch as CUDA graphs replay it: one more at least, in whole tiles of 128."""
    return round_up(num_rows + 1, 128)


def padded_keys(num_rows: int, num_keys: int) -> int:
    """Keys gathered for a micro-batch of `num_rows` rows as CUDA graphs replay it."""
    return padded_rows(num_rows) + round_up_coarsely(num_keys - num_rows, 256)
