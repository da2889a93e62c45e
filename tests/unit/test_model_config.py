"""The dimensions that model, planner and benchmarks share."""

import itertools

import pytest

from vico.model.config import (
    LLAMA_CONFIGS,
    LlamaConfig,
    ViCoConfig,
    block_shapes,
    mlp_width,
    named_model,
    padded_keys,
    padded_rows,
    round_up,
    round_up_coarsely,
    trainable_shapes,
    widened_head_dim,
)

# The generations of LLaMA in which Meta published a model of a size with these dimensions.
PUBLISHED = {"7B": "12", "13B": "12", "33B": "1", "65B": "1", "8B": ("3", "3.1"), "70B": "2"}


def test_names_of_published_models() -> None:
    generations = ("1", "2", "3", "3.1", "3.2")
    for (size, known), generation in itertools.product(PUBLISHED.items(), generations):
        expected = size if generation in known else None
        for name in (
            f"llama-{generation}-{size}",
            f"meta-llama/Llama-{generation}-{size}-Instruct",
        ):
            assert named_model(name) == expected, name
    for size in PUBLISHED:
        assert named_model(size) == size == named_model(f"{size.lower()}-hf")
        # Without a generation, the first one is meant, and the 8B of LLaMA-3, which has no other.
        assert named_model(f"llama-{size}") == (None if size == "70B" else size)


@pytest.mark.parametrize(
    ("dim", "multiple_of", "multiplier", "width"),
    [(4096, 256, None, 11008), (96, 256, None, 256), (96, 255, None, 510), (96, 1, 1.5, 384)],
)
def test_width_of_the_mlp(dim: int, multiple_of: int, multiplier: float | None, width: int) -> None:
    assert mlp_width(dim, multiple_of, multiplier) == width


def test_parameters_of_a_block() -> None:
    """Counted by hand for grouped heads that are wider than dim / n_heads."""
    config = LlamaConfig(64, 3, 4, 10, 32, n_kv_heads=2, own_head_dim=24)
    queries, keys, mlp = 64 * 96, 64 * 48, 64 * 192
    assert config.num_block_parameters == 2 * queries + 2 * keys + 3 * mlp
    assert (config.num_embedding_parameters, config.num_norm_parameters) == (640, 7 * 64)
    total = 3 * config.num_block_parameters + 2 * 640 + 7 * 64
    assert config.num_parameters == total
    assert block_shapes(config)["attention.wo.weight"] == (64, 96)
    assert block_shapes(config)["feed_forward.w2.weight"] == (64, 192)


def test_trainables() -> None:
    """4.5 million of a 7B: the prompts, the projection, a row per frame, two gates per head."""
    config = ViCoConfig.from_llama(LLAMA_CONFIGS["7B"])
    assert config == ViCoConfig.from_llama(LLAMA_CONFIGS["7B"], 10, 10, 768)
    assert config == ViCoConfig(**vars(LLAMA_CONFIGS["7B"]))
    prompts, gates = 32 * 10 * 4096, 2 * 32 * 32
    assert config.num_prompt_parameters == prompts
    assert config.num_trainables == prompts + 4096 * 768 + 10 * 4096 + gates == 4499456
    two = trainable_shapes(LlamaConfig(64, 3, 4, 10), 2, adapter_len=5, num_slots=7)
    assert two == {
        "adapter_query.weight": (10, 64),
        "visual_proj.weight": (64, 768),
        "temporal_emb.weight": (7, 64),
        "layers.1.attention.gate1": (1, 4, 1, 1),
        "layers.1.attention.gate2": (1, 4, 1, 1),
        "layers.2.attention.gate1": (1, 4, 1, 1),
        "layers.2.attention.gate2": (1, 4, 1, 1),
    }
    of_tokenizer = ViCoConfig.from_llama(LlamaConfig(64, 3, 4, -1), 5, 7, 512)
    assert (of_tokenizer.vocab_size, of_tokenizer.feature_width) == (32000, 512)


def test_rounding() -> None:
    assert [round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    # To 8; from 64 on to an eighth of the power of two.
    coarse = {1: 8, 8: 8, 9: 16, 63: 64, 65: 80, 127: 128, 129: 160, 1000: 1024, 1025: 1280}
    assert {number: round_up_coarsely(number, 8) for number in coarse} == coarse


def test_sizes_of_kernels() -> None:
    """A head with gate2's two dimensions, in multiples of 8; rows with one to spare, in 128."""
    assert [widened_head_dim(n) for n in (14, 64, 126, 128)] == [16, 72, 128, 136]
    assert [padded_rows(n) for n in (1, 127, 128, 255)] == [128, 128, 256, 256]
    assert [padded_keys(100, n) for n in (101, 356, 357)] == [384, 384, 640]
