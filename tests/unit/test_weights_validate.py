"""What a config.json, a params.json and their tensors may say: the bounds, and what silence means.

`test_hostile_weights.py` has whole folders that are refused.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from reference import oracle_files
from support.errors import refusal
from vico.model.config import LlamaConfig, RopeScaling
from vico.model.weights import hf_config, meta, validate
from vico.model.weights.convert import convert_weights
from vico.model.weights.hf_config import mlp_rule
from vico.model.weights.load import open_weights
from vico.model.weights.validate import (
    is_positive,
    require_heads,
    require_same_names,
    whole_number,
    with_vocabulary,
)

PATH = Path("it.json")
KEYS = ("width", "heads", "groups")
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
SIZES |= {"intermediate_size": 192, "vocab_size": 10}


@pytest.mark.parametrize(
    ("key", "value", "largest"),
    [
        ("dim", 1, None),
        ("dim", 10**6, None),
        ("n_layers", 1000, None),
        ("num_hidden_layers", 1000, None),
        ("dim", 0, 1000000),
        ("dim", -1, 1000000),
        ("dim", 10**6 + 1, 1000000),
        ("n_layers", 1001, 1000),
        ("num_hidden_layers", 1001, 1000),
        ("dim", True, 1000000),
        ("dim", 64.0, 1000000),
        ("dim", None, 1000000),
    ],
)
def test_whole_numbers(key: str, value: object, largest: int | None) -> None:
    """`largest`: as the refusal names it; None: there is none."""
    if largest is None:
        assert whole_number({key: value}, key, PATH) == value
    else:
        message = refusal(whole_number, {key: value}, key, PATH)
        assert (
            message == f"it.json: '{key}' is {value} and must be a whole number from 1 to {largest}"
        )


def test_positive_numbers() -> None:
    for value in (1e-9, 1, 2.5, 1e30):
        assert is_positive(value) is True
    for other in (0, 0.0, -1, 1.1e30, math.inf, math.nan, True, "1", None):
        assert not is_positive(other)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((64, 4, 4, None), None),
        ((64, 4, 2, None), None),
        ((64, 4, 1, 16), None),  # as without it
        ((64, 4, 2, 32), 32),
        ((64, 3, 1, 2), 2),
        ((63, 4, 4, None), "width 63 over heads 4 is not an even whole number"),
        ((60, 4, 4, None), "width 60 over heads 4 is not an even whole number"),
        ((64, 4, 3, None), "heads 4 over groups 3 is not a whole number"),
        ((64, 4, 8, 16), "heads 4 over groups 8 is not a whole number"),
        ((64, 4, 4, 17), "head_dim 17 must be even"),
    ],
)
def test_heads(sizes: tuple[int, int, int, int | None], expected: object) -> None:
    if isinstance(expected, str):
        assert expected in refusal(require_heads, *sizes, KEYS, PATH)
    else:
        assert require_heads(*sizes, KEYS, PATH) == expected


def test_names() -> None:
    require_same_names({"a", "b"}, {"b", "a"}, PATH, "copy")
    lacks = refusal(require_same_names, {"c"}, {"b", "a", "c"}, PATH, "copy")
    assert lacks == "it.json: lacks 2 tensor(s), e.g. 'a'; copy"
    unknown = refusal(require_same_names, {"z", "y", "x", "c"}, {"c"}, PATH, "copy")
    assert unknown == "it.json: holds unknown 3 tensor(s), e.g. 'x'; copy"


@pytest.mark.parametrize(
    ("num_rows", "num_pieces", "fits"),
    [
        (400, 400, True),
        (400, 401, False),
        (400, 272, True),  # 128 spare rows
        (400, 271, False),
        (32000, 30000, True),  # a sixteenth
        (32000, 29999, False),
    ],
)
def test_vocabularies(num_rows: int, num_pieces: int, fits: bool) -> None:
    config = LlamaConfig(64, 2, 4, num_rows)
    if fits:
        assert with_vocabulary(config, num_pieces, PATH) == LlamaConfig(64, 2, 4, num_pieces)
    else:
        message = refusal(with_vocabulary, config, num_pieces, PATH)
        assert f"have {num_rows} rows and the tokenizer has {num_pieces} pieces" in message


# config.json


def read(content: Mapping[str, Any]) -> LlamaConfig:
    return hf_config.read_llama_config(content, PATH)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_a_config_json_of_few_keys(kind: str) -> None:
    """What it leaves out is what transformers takes."""
    config = read({"model_type": kind, **SIZES})
    theirs = transformers.AutoConfig.for_model(kind, **SIZES)
    assert config.norm_eps == theirs.rms_norm_eps
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.kv_heads == theirs.num_key_value_heads
    assert config.sliding_window == getattr(theirs, "sliding_window", None)
    assert (config.dim, config.n_layers, config.n_heads, config.vocab_size) == (64, 2, 8, 10)
    assert (config.head_dim, config.own_head_dim, config.hidden_dim) == (8, None, 192)
    assert config.rope_scaling is None


LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0}
LLAMA3 |= {"original_max_position_embeddings": 512}
SCALED = RopeScaling(4.0, 2.0, 3.0, 512)


@pytest.mark.parametrize(
    ("more", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_scaling": None, "rope_theta": 7}, 7.0, None),
        ({"rope_scaling": LLAMA3}, 10000.0, SCALED),
        ({"rope_scaling": {**LLAMA3, "rope_type": "default"}}, 10000.0, None),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 6e5}}, 6e5, SCALED),
        ({"rope_parameters": {"rope_theta": 6e5}, "rope_theta": 5e5}, 6e5, None),
        ({"rope_parameters": LLAMA3, "rope_scaling": {**LLAMA3, "factor": 9}}, 10000.0, SCALED),
        ({"rope_scaling": {"type": "default"}}, 10000.0, None),
    ],
)
def test_rotary_settings(more: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    """transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling."""
    config = read({"model_type": "llama", **SIZES, **more})
    assert (config.rope_theta, config.rope_scaling) == (theta, scaling)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': no LLaMA has this"),
        ({"attention_bias": True}, "attention_bias True: no LLaMA has this"),
        ({"mlp_bias": True}, "mlp_bias True: no LLaMA has this"),
        ({"tie_word_embeddings": "yes"}, "'tie_word_embeddings' is 'yes' and must be true or"),
        ({"rms_norm_eps": 0}, "rms_norm_eps 0 and rope_theta 10000.0 must be positive"),
        ({"rope_theta": -1}, "rope_theta -1 must be positive"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 3.0}}, "low_freq_factor 3.0 must be below"),
        ({"rope_scaling": {**LLAMA3, "factor": 0}}, "factor 0 and low_freq_factor 2.0"),
        ({"num_key_value_heads": 0}, "'num_key_value_heads' is 0 and must be a whole number"),
    ],
)
def test_what_would_be_another_model(more: dict[str, Any], expected: str) -> None:
    assert expected in refusal(read, {"model_type": "llama", **SIZES, **more})


def test_settings_that_change_nothing() -> None:
    named = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    named |= {"tie_word_embeddings": True, "quantization_config": None, "head_dim": None}
    plain = read({"model_type": "llama", **SIZES})
    assert read({"model_type": "llama", **SIZES, **named}) == plain
    del named["tie_word_embeddings"]
    assert read({"model_type": "llama", **SIZES, **dict.fromkeys(named)}) == plain
    grouped = read({"model_type": "llama", **SIZES, "num_key_value_heads": 2, "head_dim": 32})
    assert (grouped.kv_heads, grouped.head_dim, grouped.heads_dim) == (2, 32, 256)


@pytest.mark.parametrize(
    ("dim", "hidden_dim", "rule"),
    [
        (4096, 11008, (256, None)),  # LLaMA 7B
        (4096, 14336, (1024, 1.3)),  # LLaMA-3 8B
        (8192, 28672, (1024, 1.3)),  # LLaMA-2 70B, whose multiple of 4096 is one of 1024
        (2048, 8192, (256, 1.5)),  # LLaMA-3.2 1B
        (3072, 8192, (256, None)),  # LLaMA-3.2 3B, whose multiplier is 1
    ],
)
def test_published_widths_of_the_mlp(
    dim: int, hidden_dim: int, rule: tuple[int, float | None]
) -> None:
    """The numbers in the params.json of the published model."""
    assert mlp_rule(dim, hidden_dim) == rule


# Meta's files


def write_model(folder: Path, num_shards: int) -> None:
    oracle_files.write_tiny_meta(folder / "whole", 400)
    if num_shards == 1:
        (folder / "whole").rename(folder / "it")
    else:
        done = convert_weights(folder / "whole", folder / "it", "meta", num_shards)
        num_bytes = sum(path.stat().st_size for path in (folder / "it").iterdir())
        assert f", {num_shards} file(s) of weights, {num_bytes / 1e6:,.1f} MB" in done


@pytest.mark.parametrize(
    ("change", "is_taken"),
    [
        (lambda norm: norm, True),
        (lambda norm: norm * 1.09, True),
        (lambda norm: norm * 1.2 + 0.1, False),
        (lambda norm: norm * 0 + torch.nan, False),
    ],
)
def test_replicas_may_have_drifted(change: Any, is_taken: bool, tmp_path: Path) -> None:
    write_model(tmp_path, 2)
    path = tmp_path / "it" / "consolidated.01.pth"
    shard: dict[str, Tensor] = torch.load(path)
    shard["norm.weight"] = change(shard["norm.weight"])
    torch.save(shard, path)
    if is_taken:
        open_weights(tmp_path / "it", 400)
    else:
        message = refusal(open_weights, tmp_path / "it", 400)
        assert "'norm.weight' differs between the shards" in message


def test_a_shard_twice(tmp_path: Path) -> None:
    write_model(tmp_path, 2)
    first, second = (tmp_path / "it" / f"consolidated.0{n}.pth" for n in range(2))
    second.write_bytes(first.read_bytes())
    assert "two of the 2 shards are the same file" in refusal(open_weights, tmp_path / "it", 400)


@pytest.mark.parametrize("num_shards", [1, 2, 4])
def test_every_slice(num_shards: int, tmp_path: Path) -> None:
    """Of a tensor that is split by rows, one that is split by columns, and replicas."""
    write_model(tmp_path, num_shards)
    weights = open_weights(tmp_path / "it", 400)
    for name in ("layers.0.attention.wk.weight", "layers.0.attention.wo.weight", "norm.weight"):
        flat = weights.read(name).reshape(-1)
        cuts = sorted({*range(0, len(flat), 7), 31, 32, 33, 255, 256, 257, 512, len(flat)})
        for start, stop in zip(cuts, cuts[3:], strict=False):
            assert torch.equal(weights.read_slice(name, start, stop), flat[start:stop])
        assert torch.equal(weights.read_slice(name, 0, len(flat)), flat)


def test_a_buffer_of_old_files_is_passed_over(tmp_path: Path) -> None:
    write_model(tmp_path, 1)
    path = tmp_path / "it" / "consolidated.00.pth"
    shard: dict[str, Tensor] = torch.load(path)
    torch.save({**shard, "rope.freqs": torch.ones(4)}, path)
    open_weights(tmp_path / "it", 400)
    torch.save({**shard, "norm.weight": shard["norm.weight"].to(torch.int8)}, path)
    assert "'norm.weight' is no dense tensor of floating" in refusal(
        open_weights, tmp_path / "it", 400
    )


def test_narrow_models_were_scaled_by_more(tmp_path: Path) -> None:
    """LLaMA-3.1 8B, of width 4096, is the narrowest whose files may leave out the factor, 8."""
    path = tmp_path / "params.json"

    def scaling(dim: int) -> RopeScaling | None:
        values = {"dim": dim, "n_layers": 1, "n_heads": 2, "use_scaled_rope": True}
        path.write_text(json.dumps(values))
        return meta.read_llama_config(path).rope_scaling

    assert scaling(4096) == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert "does not say by how much" in refusal(scaling, 4092)
    assert validate.MAX_LAYERS == 1000


# What is written


def test_files_of_both_layouts(tmp_path: Path) -> None:
    """Every key of what is written for a model that needs all of them."""
    write_model(tmp_path, 1)
    params_path = tmp_path / "it" / "params.json"
    params = json.loads(params_path.read_text())
    plain = {**params, "norm_eps": 1e-5}
    scaled = {"use_scaled_rope": True, "rope_scaling_factor": 32.0, "rope_theta": 5e5}
    written = []
    for name, more in (("plain", {}), ("scaled", scaled)):
        params_path.write_text(json.dumps({**plain, **more}))
        convert_weights(tmp_path / "it", tmp_path / f"{name} hf")
        convert_weights(tmp_path / f"{name} hf", tmp_path / name)
        config = json.loads((tmp_path / f"{name} hf" / "config.json").read_text())
        written.append((config, json.loads((tmp_path / name / "params.json").read_text())))
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / f"{name} hf")
        assert theirs.hidden_size == 32 and theirs.intermediate_size == config["intermediate_size"]
    (plain_config, plain_params), (scaled_config, scaled_params) = written
    assert (
        plain_config.items()
        >= {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": "float16",
            "hidden_size": 32,
            "num_hidden_layers": params["n_layers"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 400,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
        }.items()
    )
    assert scaled_config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert scaled_config["max_position_embeddings"] == 262144
    assert not {"rope_scaling", "max_position_embeddings", "head_dim"} & plain_config.keys()
    sizes = {"dim": 32, "n_layers": params["n_layers"], "n_heads": 4, "vocab_size": 400}
    width = {"multiple_of": 1, "ffn_dim_multiplier": pytest.approx(88.5 / 85)}  # of 88
    assert plain_params == {**sizes, **width, "norm_eps": 1e-5}
    assert scaled_params == {**plain_params, **scaled}
