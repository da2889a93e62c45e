"""The dimensions of a model, as plain numbers. No torch: the planner and the command line read it too."""

from dataclasses import dataclass

FEATURE_WIDTH = 768  # of CLIP ViT-L/14
EMBEDDINGS = "tok_embeddings.weight"
# fp32 logits that the output head holds at a time.
HEAD_CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**28}
# Longer micro-batches are not replayed by CUDA graphs: a GPU then takes longer than any host.
MAX_GRAPH_ROWS = 4096


@dataclass(frozen=True)
class RopeScaling:
    """LLaMA-3.1's stretched rotary embedding: frequencies slower than old_context / low_factor turns are divided by `factor`."""

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
    n_kv_heads: int | None = (
        None  # None: as many as n_heads; fewer: each serves a group of neighbouring query heads
    )
    ffn_dim_multiplier: float | None = None
    rope_scaling: RopeScaling | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def hidden_dim(self) -> int:
        """SwiGLU's width: two thirds of 4 * dim, times the multiplier, rounded up to a multiple."""
        width = int(2 * (4 * self.dim) / 3)
        if self.ffn_dim_multiplier is not None:
            width = int(self.ffn_dim_multiplier * width)
        return -(-width // self.multiple_of) * self.multiple_of


def trainable_shapes(
    shape: LlamaConfig, num_adapted: int, adapter_len: int, num_slots: int
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every trainable, in the order of the lineage's checkpoints."""
    gates = [
        f"layers.{i}.attention.gate{g}"
        for i in range(shape.n_layers - num_adapted, shape.n_layers)
        for g in (1, 2)
    ]
    return {
        "adapter_query.weight": (num_adapted * adapter_len, shape.dim),
        "visual_proj.weight": (shape.dim, FEATURE_WIDTH),
        "temporal_emb.weight": (num_slots, shape.dim),
        **{name: (1, shape.n_heads, 1, 1) for name in gates},
    }


def backbone_shapes(shape: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every frozen tensor in Meta's layout."""
    square, grouped = (shape.dim, shape.dim), (shape.kv_heads * shape.head_dim, shape.dim)
    up, down = (shape.hidden_dim, shape.dim), (shape.dim, shape.hidden_dim)
    layer = {
        **{
            "attention.wq.weight": square,
            "attention.wk.weight": grouped,
            "attention.wv.weight": grouped,
            "attention.wo.weight": square,
        },
        **{
            "feed_forward.w1.weight": up,
            "feed_forward.w2.weight": down,
            "feed_forward.w3.weight": up,
        },
        **{"attention_norm.weight": (shape.dim,), "ffn_norm.weight": (shape.dim,)},
    }
    ends = {
        EMBEDDINGS: (shape.vocab_size, shape.dim),
        "norm.weight": (shape.dim,),
        "output.weight": (shape.vocab_size, shape.dim),
    }
    return {
        **ends,
        **{
            f"layers.{i}.{name}": dims
            for i in range(shape.n_layers)
            for name, dims in layer.items()
        },
    }


# Numbers of a quantized weight that share one scale.
QUANTIZATION_BLOCK_SIZES = {"8bit": 256, "nf4": 64}


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def round_up_coarsely(number: int, multiple: int) -> int:
    """To a multiple of `multiple`, or of an eighth to a quarter of `number` where that is more: few results in all."""
    return round_up(number, max(multiple, 1 << max(0, number.bit_length() - 3)))


def widened_head_dim(head_dim: int) -> int:
    """Head width with the two dimensions that carry gate2, as the CUDA kernels want it: a multiple of 8."""
    return round_up(head_dim + 2, 8)


def padded_rows(num_rows: int) -> int:
    """Rows of a micro-batch as CUDA graphs replay it: one more at least, in whole tiles of a matrix product."""
    return round_up(num_rows + 1, 128)


def padded_keys(num_rows: int, num_keys: int) -> int:
    """Gathered keys of a micro-batch as CUDA graphs replay it, of `num_rows` rows with `num_keys` keys."""
    return padded_rows(num_rows) + round_up_coarsely(num_keys - num_rows, 256)
