"""What is read of LLaMA weights, part by part, and what is written; each rule by itself.

`test_weights.py` compares whole layouts, `test_hostile_weights.py` refuses whole folders.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from support.errors import refusal
from support.weight_layouts import HF_CONFIG, PARAMS, write_layouts
from vico.errors import CheckpointError, UserError
from vico.model.config import LlamaConfig, RopeScaling, backbone_shapes
from vico.model.weights import convert, hf_config, meta
from vico.model.weights.convert import convert_weights
from vico.model.weights.hf_config import mlp_rule
from vico.model.weights.hf_files import SafetensorsFile
from vico.model.weights.load import open_weights

WO, NORM, EMBEDDINGS = "layers.1.attention.wo.weight", "norm.weight", "tok_embeddings.weight"
Shard = dict[Any, Any]


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_layouts(tmp_path_factory.mktemp("layouts"))


# Meta's files


def replace_second_shard(folder: Path, change: Callable[[Shard], Any]) -> None:
    path = folder / "consolidated.01.pth"
    shard = torch.load(path)
    changed = change(shard)
    torch.save(shard if changed is None else changed, path)


ASKS = "shard(s), and params.json asks for"
SECOND_SHARDS: dict[str, tuple[Callable[[Shard], Any], str]] = {
    "narrower": (
        lambda s: s.update({"output.weight": s["output.weight"][:, :9].clone()}),
        f"'output.weight' has shape [200, 64] + [200, 9] in 2 {ASKS} [400, 64]",
    ),
    "another replica": (
        lambda s: s.update({NORM: s[NORM][:9].clone()}),
        f"'norm.weight' has shape [64] + [9] in 2 {ASKS} [64]",
    ),
    "a row in place of a matrix": (
        lambda s: s.update({WO: s[WO][0].clone()}),
        f"'{WO}' has shape [64, 32] + [32] in 2 {ASKS} [64, 64]",
    ),
    "no embeddings": (
        lambda s: s.pop(EMBEDDINGS) is None,
        f"consolidated.01.pth: lacks 1 tensor(s), e.g. '{EMBEDDINGS}'; params.json and",
    ),
    "a list": (lambda s: list(s.values()), "not a dict of tensors; LLaMA weights in Meta's"),
    "numbers": (lambda s: {**s, "x": 1}, "consolidated.01.pth: not a dict of tensors"),
    "no names": (lambda s: {**s, 1: s[NORM]}, "consolidated.01.pth: not a dict of tensors"),
}


@pytest.mark.parametrize(("change", "part"), SECOND_SHARDS.values(), ids=SECOND_SHARDS)
def test_a_shard_of_another_form(
    change: Callable[[Shard], Any], part: str, layouts: dict[str, Path], tmp_path: Path
) -> None:
    def changed(shard: Shard) -> Any:
        result = change(shard)
        return None if isinstance(result, bool) else result

    shutil.copytree(layouts["two"], tmp_path / "it")
    replace_second_shard(tmp_path / "it", changed)
    assert part in refusal(open_weights, tmp_path / "it", 400)


@pytest.mark.parametrize("embeddings", [torch.tensor(1.0), torch.ones(64), torch.ones(9, 9)])
def test_embeddings_of_another_form(
    embeddings: Tensor, layouts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(layouts["one"], tmp_path / "it")
    path = tmp_path / "it" / "consolidated.00.pth"
    torch.save({**torch.load(path), EMBEDDINGS: embeddings}, path)
    shown = f"'{EMBEDDINGS}' has shape {list(embeddings.shape)} in 1 {ASKS} [400, 64]"
    assert shown in refusal(open_weights, tmp_path / "it", 401)


def test_how_far_replicas_may_drift() -> None:
    """A hundredth, and a tenth of the first one's; NaN beside NaN is the same."""
    first = torch.tensor([1.0, -1.0, 0.0, torch.nan, 100.0])
    for distance, are_close in ((0.1099, True), (0.1101, False)):
        assert meta._are_close(first + torch.tensor([distance, 0, 0, 0, 0]), first) is are_close
        assert meta._are_close(first - torch.tensor([0, distance, 0, 0, 0]), first) is are_close
    for distance, are_close in ((0.00999, True), (0.01001, False)):
        assert meta._are_close(first + torch.tensor([0, 0, distance, 0, 0]), first) is are_close
    for distance, are_close in ((10.0, True), (10.02, False)):
        assert meta._are_close(first + torch.tensor([0, 0, 0, 0, distance]), first) is are_close
    assert meta._are_close(first.half(), first)
    assert not meta._are_close(torch.zeros(1), torch.tensor([torch.nan]))


@pytest.mark.parametrize("layout", ["one", "two", "two of LLaMA-3", "HF", "torch"])
def test_what_is_whole_in_a_file_is_not_copied(layout: str, layouts: dict[str, Path]) -> None:
    """A view of the mapped file has the same address again; what is joined or put in order not."""
    weights, is_split = open_weights(layouts[layout], 400), layout.startswith("two")
    query = "layers.0.attention.wq.weight"
    for name, is_view in ((NORM, True), (WO, not is_split), (query, layout == "one")):
        assert is_same_memory(partial(weights.read, name)) is is_view
    assert is_same_memory(partial(weights.read_slice, NORM, 5, 9))
    # A tensor that is split by rows: the shards' halves, and a slice of both.
    half, whole = 200 * 64, 400 * 64
    for start, stop, is_view in ((0, half, True), (half, whole, True), (1, half + 1, not is_split)):
        read = partial(weights.read_slice, "output.weight", start, stop)
        assert is_same_memory(read) is is_view


def is_same_memory(read: Callable[[], Tensor]) -> bool:
    one, other = read(), read()
    assert torch.equal(one, other)
    return one.data_ptr() == other.data_ptr()


def test_shards_that_cannot_be_read(layouts: dict[str, Path], tmp_path: Path) -> None:
    """A damaged file is told apart from a wrong one by its exit code, 3."""
    shutil.copytree(layouts["two"], tmp_path / "it")
    path = tmp_path / "it" / "consolidated.01.pth"
    weights = open_weights(tmp_path / "it", 400)
    for name in backbone_shapes(weights.config):
        weights.verify(name)
    content = bytearray(path.read_bytes())
    content[content.index(torch.load(path)[WO].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    broken = open_weights(tmp_path / "it", 400)
    broken.verify(NORM)
    with pytest.raises(CheckpointError) as caught:
        broken.verify(WO)
    assert str(caught.value).startswith(f"{path}: the shard of LLaMA weights is ")
    assert f"(wrong checksum of '{WO}')" in str(caught.value)
    path.write_bytes(content[:5000])
    with pytest.raises(CheckpointError) as caught:
        open_weights(tmp_path / "it", 400)
    assert str(caught.value).startswith(f"{path}: the shard of LLaMA weights is cut off or damaged")


REFUSED_PARAMS = [
    ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes' and must be true or false"),
    ({"norm_eps": 0}, "norm_eps 0 and rope_theta 10000.0 must be positive numbers"),
    ({"rope_theta": -1}, "norm_eps 1e-05 and rope_theta -1 must be positive numbers"),
    ({"vocab_size": 0}, "'vocab_size' is 0 and must be a whole number from 1 to 1000000"),
    ({"multiple_of": 0}, "'multiple_of' is 0 and must be a whole number from 1 to 1000000"),
    ({"n_kv_heads": 0}, "'n_kv_heads' is 0 and must be a whole number from 1 to 1000000"),
    ({"head_dim": 0}, "'head_dim' is 0 and must be a whole number from 1 to 1000000"),
    (
        {"use_scaled_rope": True, "rope_scaling_factor": 0},
        "rope_scaling_factor 0 must be positive numbers",
    ),
    ({"n_heads": 3}, "dim 64 over n_heads 3 is not an even whole number; copy the file again"),
    ({"n_kv_heads": 3}, "n_heads 4 over n_kv_heads 3 is not a whole number; copy the file again"),
]


@pytest.mark.parametrize(("more", "message"), REFUSED_PARAMS)
def test_a_params_json_that_is_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    path.write_text(json.dumps(PARAMS | more))
    assert refusal(meta.read_llama_config, path) == f"{path}: {message}"


def test_null_in_a_params_json_is_silence(tmp_path: Path) -> None:
    path = tmp_path / "params.json"
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 4}
    keys = ("n_kv_heads", "head_dim", "ffn_dim_multiplier", "use_scaled_rope")
    path.write_text(json.dumps(sizes | dict.fromkeys(keys)))
    plain = LlamaConfig(64, 2, 4, -1, n_kv_heads=4)
    assert meta.read_llama_config(path) == plain
    path.write_text(json.dumps(sizes | {"use_scaled_rope": False, "rope_scaling_factor": 4}))
    assert meta.read_llama_config(path) == plain


# Hugging Face's files


def test_a_window_is_a_mistrals(tmp_path: Path) -> None:
    """null: there is none. A LLaMA has none, whatever its file says."""

    def window(kind: str, value: object) -> int | None:
        content = HF_CONFIG | {"model_type": kind, "sliding_window": value}
        return hf_config.read_llama_config(content, tmp_path).sliding_window

    assert (window("mistral", None), window("mistral", 7), window("llama", 7)) == (None, 7, None)


@given(dim=st.integers(1, 300), width=st.integers(1, 2000))
def test_any_width_of_the_mlp_has_a_rule(dim: int, width: int) -> None:
    multiple_of, multiplier = mlp_rule(dim, width)
    config = LlamaConfig(dim, 1, 1, 1, multiple_of, ffn_dim_multiplier=multiplier)
    assert config.hidden_dim == width


def test_files_that_cannot_be_opened(layouts: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    path = tmp_path / "model.safetensors"
    message = f"{path}: the file of LLaMA weights cannot be opened (Is a directory)"
    assert refusal(SafetensorsFile, path) == message
    shutil.copytree(layouts["torch in files"], tmp_path / "it")
    missing = tmp_path / "it" / "pytorch_model-1.bin"
    missing.unlink()
    assert (
        refusal(open_weights, tmp_path / "it", 400)
        == f"{missing}: no such file; copy all files of the model"
    )


def test_parts_without_an_index(tmp_path: Path) -> None:
    """Where both kinds lie there, safetensors are asked for: they are read first."""
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for name, asked in (
        ("pytorch_model-1.bin", "pytorch_model.bin and no pytorch_model.bin.index.json"),
        ("model-1.safetensors", "model.safetensors and no model.safetensors.index.json"),
    ):
        (tmp_path / name).write_bytes(b"")
        assert refusal(open_weights, tmp_path, 400) == f"{tmp_path}: no {asked}; copy it"


@pytest.mark.parametrize("value", [3, None, "a/model-0.safetensors", "/model-0.safetensors"])
def test_an_index_names_files_beside_it(
    value: object, layouts: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(layouts["HF in files"], tmp_path / "it")
    path = tmp_path / "it" / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.norm.weight"] = value
    path.write_text(json.dumps(content))
    assert refusal(open_weights, tmp_path / "it", 400) == (
        f"{path}: 'weight_map' is no object of tensor names and names of files beside it; "
        "copy the file again"
    )


# What is written

GROUPED = LlamaConfig(64, 2, 4, 400, 32, 1e-6, n_kv_heads=2, ffn_dim_multiplier=1.3)
SIZES = {"dim": 64, "n_layers": 2, "n_heads": 4}
AFTER = {"vocab_size": 400, "multiple_of": 32, "norm_eps": 1e-6}


def test_a_params_json_says_what_is_needed() -> None:
    """Keys that not every reader knows only where their values are not the usual ones."""
    plain = replace(GROUPED, n_kv_heads=4, ffn_dim_multiplier=None)
    assert convert._meta_params(plain) == SIZES | AFTER
    assert convert._meta_params(replace(plain, n_kv_heads=None)) == SIZES | AFTER
    more = {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
    assert convert._meta_params(GROUPED) == SIZES | AFTER | more
    wide = replace(plain, own_head_dim=32, rope_theta=5e5)
    assert convert._meta_params(wide) == SIZES | AFTER | {"head_dim": 32, "rope_theta": 5e5}
    scaled = replace(plain, rope_scaling=RopeScaling(factor=32.0))
    scaling = {"use_scaled_rope": True, "rope_scaling_factor": 32.0}
    assert convert._meta_params(scaled) == SIZES | AFTER | scaling


@pytest.mark.parametrize(
    ("factor", "longest"), [(8.0, 65536), (2.0, 16384), (2.5, 20480), (1.5, 16384), (1.0, 16384)]
)
def test_the_longest_text_of_a_scaled_model(factor: float, longest: int) -> None:
    """The factor's, and twice the old context at least."""
    config = replace(GROUPED, rope_scaling=RopeScaling(factor))
    assert convert._hugging_face_config(config, "float16")["max_position_embeddings"] == longest


def test_a_config_json_names_wide_heads() -> None:
    plain = convert._hugging_face_config(GROUPED, "bfloat16")
    wide = convert._hugging_face_config(replace(GROUPED, own_head_dim=32), "bfloat16")
    assert wide == plain | {"head_dim": 32} and "head_dim" not in plain
    assert plain["torch_dtype"] == "bfloat16" and plain["intermediate_size"] == 224


@pytest.mark.parametrize(
    ("config", "num_shards", "message"),
    [
        (replace(GROUPED, n_heads=6), 4, "n_heads 6"),
        (replace(GROUPED, n_heads=6, n_kv_heads=2), 3, "n_kv_heads 2"),
        (replace(GROUPED, multiple_of=1, ffn_dim_multiplier=1.006), 2, "the MLP's width 171"),
        (replace(GROUPED, vocab_size=401), 2, "vocab_size 401"),
    ],
)
def test_what_shards_must_divide(config: LlamaConfig, num_shards: int, message: str) -> None:
    assert refusal(convert._require_representable, config, num_shards) == (
        f"--shards {num_shards}: {message} of this model cannot be divided by it; choose a divisor"
    )
    convert._require_representable(config, 1)


def test_how_files_are_cut(layouts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors as fit into the bytes, in their order, and one at least."""
    assert convert.MAX_FILE_BYTES == 2**32 and convert.LARGE_VOCAB_SIZE == 100_000
    weights = open_weights(layouts["one"], 400)
    num_bytes = {name: 4 * math.prod(s) for name, s in backbone_shapes(weights.config).items()}
    first = num_bytes[EMBEDDINGS] + num_bytes[NORM]
    for limit in (1, first - 1, first, first + 1, 200_000, sum(num_bytes.values())):
        monkeypatch.setattr(convert, "MAX_FILE_BYTES", limit)
        files = list(convert._split_by_size(weights))
        assert [name for names in files for name in names] == list(num_bytes)
        sizes = [sum(map(num_bytes.__getitem__, names)) for names in files]
        for names, size in zip(files, sizes, strict=True):
            assert len(names) == 1 or size <= limit
        for size, following in zip(sizes, files[1:], strict=False):
            assert size + num_bytes[following[0]] > limit
    assert len(files) == 1


def test_large_vocabularies_are_split_by_rows() -> None:
    """LLaMA-3's, of more than 100,000 pieces; smaller ones by their width."""
    tensor = torch.arange(16.0).view(4, 4)
    for vocab_size, expected in ((100_000, tensor[:, 2:]), (100_001, tensor[2:])):
        config = replace(GROUPED, vocab_size=vocab_size)
        part = convert._shard_part(tensor, EMBEDDINGS, config, 1, 2)
        assert torch.equal(part, expected) and part.is_contiguous()
        assert torch.equal(convert._shard_part(tensor, WO, config, 1, 2), tensor[:, 2:])
        assert convert._shard_part(tensor[0], NORM, config, 1, 2) is not None


def test_files_in_parts(
    layouts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their names, their index, and what transformers asks of their headers."""
    monkeypatch.setattr(convert, "MAX_FILE_BYTES", 150_000)
    done = convert_weights(layouts["one"], tmp_path / "it")
    weights = open_weights(tmp_path / "it", 400)
    sizes = {name: 4 * math.prod(s) for name, s in backbone_shapes(weights.config).items()}
    num_files = len(list(convert._split_by_size(weights)))
    names = [f"model-{n:05d}-of-{num_files:05d}.safetensors" for n in range(1, num_files + 1)]
    others = {"config.json", "model.safetensors.index.json"}
    assert {path.name for path in (tmp_path / "it").iterdir()} == {*names, *others}
    assert f" to Hugging Face's, {num_files} file(s) of weights, " in done
    weight_map: dict[str, str] = {}
    for name in names:
        with safetensors.safe_open(tmp_path / "it" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            weight_map |= dict.fromkeys(file.keys(), name)
    text = (tmp_path / "it" / "model.safetensors.index.json").read_text()
    index = json.loads(text)
    assert index == {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    assert text == json.dumps(index, indent=2) + "\n"
    config = (tmp_path / "it" / "config.json").read_text()
    assert config == json.dumps(json.loads(config), indent=2) + "\n"


def test_tied_tensors_are_written_twice(layouts: dict[str, Path], tmp_path: Path) -> None:
    """One tensor under two names in Meta's file, which safetensors would refuse."""
    shutil.copytree(layouts["one"], tmp_path / "it")
    path = tmp_path / "it" / "consolidated.00.pth"
    shard = torch.load(path)
    torch.save({**shard, "output.weight": shard[EMBEDDINGS]}, path)
    convert_weights(tmp_path / "it", tmp_path / "out")
    weights = open_weights(tmp_path / "out", 400)
    for name in (EMBEDDINGS, "output.weight"):
        assert torch.equal(weights.read(name), shard[EMBEDDINGS])


def test_a_writer_that_fails(tmp_path: Path) -> None:
    """torch and safetensors have errors of their own, told by their first line."""
    for problem, reason in (
        (RuntimeError("no room\nat all"), "no room"),
        (RuntimeError(), "writing failed"),
        (safetensors.SafetensorError("full"), "full"),
    ):

        def fill(folder: Path, problem: Exception = problem) -> None:
            (folder / "part").write_text("x")
            raise problem

        with pytest.raises(UserError) as caught:
            convert._write_folder(tmp_path / "out", fill)
        assert f"{tmp_path / 'out'}: cannot be written ({reason})" in str(caught.value)
        assert caught.value.exit_code == 6 and not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "part").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert._write_folder(tmp_path / "out", fill)
    assert not list(tmp_path.iterdir())
