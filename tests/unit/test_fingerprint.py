"""Fingerprints: they cover all that a result depends on."""

from dataclasses import fields, replace

from vico.checkpoint.fingerprint import of_llama_config
from vico.model.config import LlamaConfig, RopeScaling, backbone_shapes

CONFIG = LlamaConfig(dim=64, n_layers=2, n_heads=4, vocab_size=100, n_kv_heads=2)
OTHER_VALUES = {
    "dim": 128,
    "n_layers": 3,
    "n_heads": 8,
    "vocab_size": 101,
    "multiple_of": 512,
    "norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "n_kv_heads": 1,
    "ffn_dim_multiplier": 2.0,
    "rope_scaling": RopeScaling(),
    "own_head_dim": 32,
}
# Refused where it is shorter than a sequence may be, so it changes nothing.
WITHOUT_EFFECT = {"sliding_window"}


def test_every_number_of_a_backbone_is_covered() -> None:
    """By the shapes, which the digest of the tensors covers, or as a text of its own."""
    assert OTHER_VALUES.keys() | WITHOUT_EFFECT == {field.name for field in fields(LlamaConfig)}
    for name, value in OTHER_VALUES.items():
        other = replace(CONFIG, **{name: value})
        same_shapes = backbone_shapes(other) == backbone_shapes(CONFIG)
        assert not same_shapes or of_llama_config(other) != of_llama_config(CONFIG), name
