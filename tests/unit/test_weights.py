"""Layouts of weights on the disk against each other: `vico convert` has its own test."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from reference import oracle_files
from support.backbones import logits, make_hugging_face, text
from support.weight_layouts import write_layouts
from vico.model.config import LlamaConfig, backbone_shapes
from vico.model.weights.hf import mlp_rule
from vico.model.weights.load import open_weights

LAYOUTS = ("two", "two of LLaMA-3", "HF", "HF in files")


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
