"""The config.json of Hugging Face's layout: the dimensions of a LLaMA, or why it is none."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vico.errors import UserError, show
from vico.model.config import LlamaConfig, RopeScaling, mlp_width
from vico.model.weights.validate import require_heads, require_positive, whole_number

CONFIG = "config.json"
# What transformers takes for a key that a config.json of this model_type lacks. A Mistral is a
# LLaMA whose tokens may see a window of tokens alone.
MODEL_TYPES: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
}
# Settings that would make it another model, and the values that do not.
UNSUPPORTED = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
}
# (multiple_of, ffn_dim_multiplier) of published models.
PUBLISHED_MLP_RULES = ((256, None), (1024, 1.3), (256, 1.5))


def read_llama_config(content: Mapping[str, Any], path: Path) -> LlamaConfig:
    """Of the `content` of a config.json at `path`."""
    _require_llama(content, path)
    model_type = content["model_type"]
    content = {**MODEL_TYPES[model_type], **content}
    dim = whole_number(content, "hidden_size", path)
    n_layers = whole_number(content, "num_hidden_layers", path)
    n_heads = whole_number(content, "num_attention_heads", path)
    hidden_dim = whole_number(content, "intermediate_size", path)
    vocab_size = whole_number(content, "vocab_size", path)
    kv_heads, head_dim, window = n_heads, None, None
    if content.get("num_key_value_heads") is not None:
        kv_heads = whole_number(content, "num_key_value_heads", path)
    if content.get("head_dim") is not None:
        head_dim = whole_number(content, "head_dim", path)
    if model_type == "mistral" and content["sliding_window"] is not None:
        window = whole_number(content, "sliding_window", path)
    keys = ("hidden_size", "num_attention_heads", "num_key_value_heads")
    own_head_dim = require_heads(dim, n_heads, kv_heads, head_dim, keys, path)
    rope = {**_object(content, "rope_scaling", path), **_object(content, "rope_parameters", path)}
    eps = content.get("rms_norm_eps", 1e-6)
    theta = rope.get("rope_theta", content.get("rope_theta", 10000.0))
    require_positive({"rms_norm_eps": eps, "rope_theta": theta}, path)
    multiple_of, multiplier = mlp_rule(dim, hidden_dim)
    return LlamaConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        vocab_size=vocab_size,
        multiple_of=multiple_of,
        norm_eps=float(eps),
        rope_theta=float(theta),
        n_kv_heads=kv_heads,
        ffn_dim_multiplier=multiplier,
        rope_scaling=_read_rope_scaling(rope, path),
        own_head_dim=own_head_dim,
        sliding_window=window,
    )


def _require_llama(content: Mapping[str, Any], path: Path) -> None:
    model_type = content.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        raise UserError(
            f"{path}: 'model_type' is {show(model_type)}, and only {' and '.join(MODEL_TYPES)} are "
            "read (LLaMA, TinyLlama, SmolLM2, Mistral and others of this form); use weights of one "
            "of these"
        )
    for key, allowed in UNSUPPORTED.items():
        if content.get(key) not in allowed:
            raise UserError(
                f"{path}: {key} {show(content[key])}: no LLaMA has this, and ViCo cannot run it; "
                "use LLaMA weights"
            )
    if content.get("quantization_config") is not None:
        raise UserError(
            f"{path}: 'quantization_config' is given; quantized weights are not supported: "
            "use the original ones"
        )
    is_tied = content.get("tie_word_embeddings", False)
    if not isinstance(is_tied, bool):
        raise UserError(
            f"{path}: 'tie_word_embeddings' is {show(is_tied)} and must be true or false"
        )


def _object(content: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if value is not None and not isinstance(value, dict):
        raise UserError(
            f"{path}: '{key}' is {show(value)} and must be an object; copy the file again"
        )
    return value or {}


def _read_rope_scaling(rope: Mapping[str, Any], path: Path) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise UserError(
            f"{path}: rope_type {show(kind)}: only LLaMA-3's scaling of the rotary embedding "
            "is supported"
        )
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    require_positive({key: rope.get(key) for key in keys}, path)
    factor, low, high, context = (rope[key] for key in keys)
    if low >= high:
        raise UserError(
            f"{path}: low_freq_factor {show(low)} must be below high_freq_factor {show(high)}"
        )
    return RopeScaling(float(factor), float(low), float(high), int(context))


def mlp_rule(dim: int, hidden_dim: int) -> tuple[int, float | None]:
    """(multiple_of, ffn_dim_multiplier) of a params.json whose MLP is `hidden_dim` wide.

    Those of a published model where one fits.
    """
    for multiple_of, multiplier in PUBLISHED_MLP_RULES:
        if mlp_width(dim, multiple_of, multiplier) == hidden_dim:
            return multiple_of, multiplier
    # The half keeps the product from falling below `hidden_dim` when it is cut to a whole number.
    return 1, (hidden_dim + 0.5) / mlp_width(dim, 1, None)
