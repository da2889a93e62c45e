"""Layouts of weights on the disk against each other: `vico convert` has its own test."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from reference import oracle_files
from support.backbones import KINDS, logits, make_hugging_face, text
from support.errors import refusal
from support.weight_layouts import write_layouts
from vico.checkpoint import fingerprint
from vico.io.host_memory import return_free_memory
from vico.model.config import LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights import meta
from vico.model.weights.hf_config import mlp_rule, read_llama_config
from vico.model.weights.load import Weights, open_weights

LAYOUTS = ("two", "two of LLaMA-3", "HF", "HF in files", "torch", "torch in files")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_layouts(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(layout: str, layouts: dict[str, Path]) -> None:
    """Bit for bit."""
    one, other = open_weights(layouts["one"], 400), open_weights(layouts[layout], 400)
    assert backbone_shapes(one.config) == backbone_shapes(other.config)
    for name, shape in backbone_shapes(one.config).items():
        assert torch.equal(one.read(name), other.read(name)) and one.read(name).shape == shape, name
    assert torch.equal(logits(one, text(one)), logits(other, text(one)))


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same tensors, but for rows behind the vocabulary."""
    return write_layouts(tmp_path_factory.mktemp("padded"), num_spare=48)


def digests(weights: Weights) -> dict[str, str]:
    """The backbone's fingerprint."""
    tensors = fingerprint.backbone_tensors(weights)
    return tensors.fingerprints({name: tensors.digest(name) for name in tensors.num_bytes})


@pytest.mark.parametrize("layout", ("one", *LAYOUTS))
def test_rows_behind_the_vocabulary_are_as_if_not_there(
    layout: str, layouts: dict[str, Path], padded: dict[str, Path]
) -> None:
    """Tensors, slices, logits and fingerprint are those of the model without them."""
    plain, spare = open_weights(layouts["one"], 400), open_weights(padded[layout], 400)
    assert (plain.num_rows, spare.num_rows, spare.config.vocab_size) == (400, 448, 400)
    for name, shape in backbone_shapes(plain.config).items():
        assert torch.equal(plain.read(name), spare.read(name)), name
        size = math.prod(shape)
        assert torch.equal(spare.read_slice(name, 3, size), plain.read_slice(name, 3, size)), name
    assert torch.equal(logits(plain, text(plain)), logits(spare, text(plain)))
    assert digests(plain) == digests(spare)
    assert open_weights(padded[layout], None).config.vocab_size == 448


def test_a_params_json_that_was_not_edited(padded: dict[str, Path], tmp_path: Path) -> None:
    """It says the tokenizer's number, although rows were added."""
    shutil.copytree(padded["two"], tmp_path / "it")
    path = tmp_path / "it" / "params.json"
    path.write_text(path.read_text().replace('"vocab_size": 448', '"vocab_size": 400'))
    weights = open_weights(tmp_path / "it", 400)
    assert (weights.num_rows, weights.config.vocab_size) == (448, 400)


def test_safetensors_are_read_where_both_are_there(
    layouts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(layouts["HF"], tmp_path / "it")
    (tmp_path / "it" / "pytorch_model.bin").write_bytes(b"not read")
    assert digests(open_weights(tmp_path / "it", 400)) == digests(open_weights(layouts["HF"], 400))


def test_a_mistral_of_few_keys(layouts: dict[str, Path]) -> None:
    """What transformers takes where a config.json is silent."""
    path = layouts["HF"] / "config.json"
    content = json.loads(path.read_text())
    del content["num_key_value_heads"]
    config = read_llama_config(content | {"model_type": "mistral", "num_attention_heads": 8}, path)
    assert (config.kv_heads, config.sliding_window) == (8, 4096)
    assert read_llama_config(content, path).sliding_window is None
    assert read_llama_config(content, path).kv_heads == 4


@pytest.mark.parametrize("layout", ("one", *LAYOUTS))
def test_slices_are_those_of_the_flattened_tensor(layout: str, layouts: dict[str, Path]) -> None:
    weights = open_weights(layouts[layout], 400)
    for name in backbone_shapes(weights.config):
        whole = weights.read(name).flatten()
        size, half = whole.numel(), whole.numel() // 2
        ends = [(0, size), (0, 1), (size - 1, size), (5, 5), (7, half), (half, size)]
        ends += [(half - 3, half + 5), (half - 70, half + 70)]
        for start, stop in ends:
            start, stop = max(start, 0), min(stop, size)
            part = weights.read_slice(name, start, stop)
            assert torch.equal(part, whole[start:stop]), (name, start, stop)


@pytest.mark.parametrize("layout", ("two", "HF"))
def test_memory_holds_a_tensor_at_most(layout: str, tmp_path: Path) -> None:
    """Anonymous memory, without the files' own pages, while a model of 140 MB is read."""
    write_large_model(tmp_path, layout)
    weights = open_weights(tmp_path, None)
    shapes = backbone_shapes(weights.config)
    largest_bytes = max(math.prod(shape) for shape in shapes.values()) * 4

    def read_eighth(name: str) -> Tensor:
        size = math.prod(shapes[name])
        part = weights.read_slice(name, size // 2, size // 2 + size // 8)
        assert part.numel() == size // 8
        return part

    assert peak_bytes(weights.read, list(shapes)) < 1.5 * largest_bytes
    assert peak_bytes(read_eighth, list(shapes)) < 0.4 * largest_bytes


def peak_bytes(read: Callable[[str], Tensor], names: list[str]) -> int:
    """Anonymous memory that reading these tensors, one at a time, takes at most."""
    before, peak = anonymous_bytes(), 0
    for name in names:
        tensor = read(name)
        peak = max(peak, anonymous_bytes() - before)
        assert tensor.numel()
        del tensor
        return_free_memory()  # what the heap keeps for later is not held
    return peak


def write_large_model(folder: Path, layout: str) -> None:
    if layout == "two":
        sizes = {"dim": 1024, "n_layers": 2, "n_heads": 8, "shards": 2, "multiple_of": 32}
        oracle_files.write_tiny_meta(folder, 4000, dtype=torch.float32, **sizes)
    else:
        kind = {"hidden_size": 1024, "vocab_size": 4000, "intermediate_size": 2752}
        make_hugging_face(folder, kind)


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


MLP_WIDTHS = [(4096, 11008), (8192, 28672), (4096, 14336), (2048, 8192), (64, 192), (64, 7)]
MLP_WIDTHS += [(96, 5000), (5120, 13824)]


@pytest.mark.parametrize(("dim", "width"), MLP_WIDTHS)
def test_every_width_of_the_mlp_has_a_rule(dim: int, width: int) -> None:
    multiple_of, multiplier = mlp_rule(dim, width)
    config = LlamaConfig(dim, 1, 1, 1, multiple_of, ffn_dim_multiplier=multiplier)
    assert config.hidden_dim == width


def test_a_shard_that_is_missing(layouts: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(layouts["two"], tmp_path / "it")
    (tmp_path / "it" / "consolidated.01.pth").rename(tmp_path / "it" / "consolidated.02.pth")
    message = refusal(open_weights, tmp_path / "it", 400)
    assert "consolidated.01.pth is missing, consolidated.02.pth is there; copy all" in message


def test_a_tied_output_that_is_stored_too(tmp_path: Path) -> None:
    """It must be the embeddings."""
    make_hugging_face(tmp_path, KINDS["tied"])
    path = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    embeddings = tensors["model.embed_tokens.weight"]
    other = embeddings.clone()
    other[3, 4] += 1
    for output, is_taken in (
        (embeddings.clone(), True),
        (other, False),
        (embeddings.double(), False),
    ):
        safetensors.torch.save_file({**tensors, "lm_head.weight": output}, path, {"format": "pt"})
        if is_taken:
            assert torch.equal(open_weights(tmp_path, None).read("output.weight"), embeddings)
        else:
            assert "lm_head.weight is not the embeddings" in refusal(open_weights, tmp_path, None)


def test_what_a_params_json_says(tmp_path: Path) -> None:
    """And what is taken where it is silent: Meta's values."""
    path = tmp_path / "params.json"
    sizes = {"dim": 4096, "n_layers": 2, "n_heads": 32}

    def read(**more: object) -> LlamaConfig:
        path.write_text(json.dumps({**sizes, **more}))
        return meta.read_llama_config(path)

    config = read()
    assert (config.dim, config.n_layers, config.n_heads, config.vocab_size) == (4096, 2, 32, -1)
    assert (config.multiple_of, config.norm_eps, config.rope_theta) == (256, 1e-5, 10000.0)
    assert (config.kv_heads, config.head_dim, config.rope_scaling) == (32, 128, None)
    config = read(n_kv_heads=8, head_dim=64, vocab_size=9, multiple_of=64, norm_eps=1e-6)
    assert (config.kv_heads, config.head_dim, config.vocab_size) == (8, 64, 9)
    assert (config.multiple_of, config.norm_eps) == (64, 1e-6)
    config = read(rope_theta=5e5, ffn_dim_multiplier=100, use_scaled_rope=False)
    assert (config.rope_theta, config.ffn_dim_multiplier) == (5e5, 100.0)
    assert config.rope_scaling is None
    assert read(use_scaled_rope=True).rope_scaling == RopeScaling(8.0)
    scaled = {"use_scaled_rope": True, "dim": 2048}
    assert read(**scaled, rope_scaling_factor=32).rope_scaling == RopeScaling(32.0)
    assert "does not say by how much" in refusal(read, **scaled)
    assert "ffn_dim_multiplier is 100.5 and must be" in refusal(read, ffn_dim_multiplier=100.5)
    assert "ffn_dim_multiplier is 0 and must be" in refusal(read, ffn_dim_multiplier=0)
