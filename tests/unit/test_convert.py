"""`vico convert`: there and back gives the same bits, and errors leave nothing behind."""

import argparse
import json
import os
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from reference import oracle, oracle_files
from support.backbones import KINDS, LOGITS_RTOL, distance, logits, make_hugging_face, text
from support.errors import refusal
from support.weight_layouts import write_layouts
from vico.checkpoint import format, write
from vico.checkpoint.format import TrainState
from vico.checkpoint.validate import validate_for_model
from vico.cli.convert import convert
from vico.cli.main import main
from vico.model.config import LlamaConfig, backbone_shapes, trainable_shapes
from vico.model.vico import initial_trainables
from vico.model.weights import convert as weight_conversion
from vico.model.weights.load import open_weights
from vico.model.weights.meta import MetaWeights
from vico.train.config import RunConfig
from vico.train.saved_run import read_checkpoint

CONFIG = LlamaConfig(32, 3, 4, 400)


# LLaMA weights


def same_weights(a: Path, b: Path) -> bool:
    """Same shapes, types and bits of all tensors."""
    one, other = open_weights(a, None), open_weights(b, None)
    if backbone_shapes(one.config) != backbone_shapes(other.config):
        return False
    for name in backbone_shapes(one.config):
        value, other_value = one.read(name), other.read(name)
        if value.dtype != other_value.dtype or not torch.equal(value, other_value):
            return False
    return True


def holds_all(whole: Mapping[str, Tensor], part: Mapping[str, Tensor]) -> bool:
    """Meta's own files hold a buffer (rope.freqs) that is not written again."""
    return all(torch.equal(value, whole[name]) for name, value in part.items())


def load_transformers(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_hugging_face_to_meta_and_back(kind: str, tmp_path: Path) -> None:
    hf, meta, back = tmp_path / "hf", tmp_path / "meta", tmp_path / "back"
    reference = make_hugging_face(hf, KINDS[kind])
    if kind == "stretched":
        message = refusal(convert, hf, meta)
        assert "which a params.json cannot say; keep Hugging Face's layout" in message
        return
    num_shards = 1 if KINDS[kind].get("num_key_value_heads") == 1 else 2
    convert(hf, meta, shards=num_shards)
    convert(meta, back)
    assert same_weights(hf, meta) and same_weights(meta, back)
    ids = text(open_weights(hf, None))
    with torch.no_grad():
        expected, found = (
            reference(ids[None]).logits[0],
            load_transformers(back)(ids[None]).logits[0],
        )
    assert torch.equal(found, expected)
    assert distance(logits(open_weights(meta, None), ids), expected) < LOGITS_RTOL


def test_a_window_stays_in_hugging_faces_layout(tmp_path: Path) -> None:
    make_hugging_face(tmp_path / "hf", KINDS["Mistral"] | {"sliding_window": 64})
    message = refusal(convert, tmp_path / "hf", tmp_path / "meta")
    assert "tokens see 64 tokens, which a params.json cannot say; keep Hugging Face's" in message


def test_torch_files_and_mixed_types_are_copied(tmp_path: Path) -> None:
    layouts = write_layouts(tmp_path / "layouts")
    mix_types(layouts["torch"] / "pytorch_model.bin")
    convert(layouts["torch"], tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "hf")
    assert same_weights(layouts["torch"], tmp_path / "meta")
    assert same_weights(layouts["torch"], tmp_path / "hf")


def mix_types(path: Path) -> None:
    """A third of the tensors in each of three types."""
    types = (torch.float32, torch.float16, torch.bfloat16)
    content = torch.load(path)
    mixed = {name: value.to(types[i % 3]) for i, (name, value) in enumerate(content.items())}
    torch.save(mixed, path)


def test_a_model_is_named_as_for_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder inside --llama_model_path."""
    write_layouts(tmp_path / "llamas")
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "one", "hf", "--llama_model_path", "llamas"]) == 0
    assert same_weights(tmp_path / "llamas" / "one", tmp_path / "hf")


@pytest.mark.parametrize("num_shards", [1, 2])
def test_meta_to_hugging_face_and_back(
    num_shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta, hf, back = tmp_path / "meta", tmp_path / "hf", tmp_path / "back"
    oracle_files.write_tiny_meta(meta, 400, shards=num_shards)
    monkeypatch.setattr(weight_conversion, "MAX_FILE_BYTES", 40_000)
    convert(meta, hf)
    assert len(list(hf.glob("model-0000?-of-0000?.safetensors"))) > 2
    convert(hf, back, shards=num_shards)
    assert same_weights(meta, hf) and same_weights(meta, back)
    for path in meta.glob("*.pth"):
        assert holds_all(torch.load(path), torch.load(back / path.name))
    weights = open_weights(hf, None)
    with torch.no_grad():
        expected = load_transformers(hf)(text(weights)[None]).logits[0]
    assert distance(logits(weights, text(weights)), expected) < LOGITS_RTOL


def test_meta_shards_are_divided_anew(tmp_path: Path) -> None:
    one, four, again = tmp_path / "one", tmp_path / "four", tmp_path / "again"
    oracle_files.write_tiny_meta(one, 400)
    convert(one, four, "meta", 4)
    convert(four, again, "meta")
    assert len(list(four.glob("*.pth"))) == 4 and same_weights(one, four)
    shard = "consolidated.00.pth"
    assert holds_all(torch.load(one / shard), torch.load(again / shard))


def test_the_model_is_read_once_for_all_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but shards stays, each as long as its tensors."""
    one, four = tmp_path / "one", tmp_path / "four"
    oracle_files.write_tiny_meta(one, 400)
    reads = Counter[str]()
    read = MetaWeights.read

    def counted(weights: MetaWeights, name: str) -> Tensor:
        reads[name] += 1
        return read(weights, name)

    monkeypatch.setattr(MetaWeights, "read", counted)
    convert(one, four, "meta", 4)
    assert len(reads) > 20 and set(reads.values()) == {1}
    assert len(list(four.iterdir())) == 5
    shards = [torch.load(path) for path in four.glob("*.pth")]
    for tensor in shards[0].values():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_large_vocabulary_is_split_like_llama_3(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_conversion, "LARGE_VOCAB_SIZE", 1000)
    hf, meta = tmp_path / "hf", tmp_path / "meta"
    make_hugging_face(hf, KINDS["LLaMA-3"])
    convert(hf, meta, shards=2)
    shard = torch.load(meta / "consolidated.01.pth")
    assert shard["tok_embeddings.weight"].shape == (512, 64)
    assert same_weights(hf, meta)


# Adapters


def save_checkpoint(folder: Path) -> dict[str, Tensor]:
    """A checkpoint of random trainables, which are returned."""
    initial = initial_trainables(trainable_shapes(CONFIG, 2, 10, 10), bias=3.5, seed=3)
    weights = {name: value + 0.1 for name, value in initial.items()}
    moments = {}
    for name, value in weights.items():
        moments[f"{name}.exp_avg"] = torch.zeros_like(value)
        moments[f"{name}.exp_avg_sq"] = torch.zeros_like(value)
    config = RunConfig(dataset="star", bias=3.5, adapter_layer=2, output_dir=folder)
    run = write.RunIdentity("", config.to_json(), {})
    write.save(folder, weights, moments, TrainState(step=1), run)
    return weights


def test_adapters_to_the_published_format_and_back(tmp_path: Path) -> None:
    checkpoint, published = tmp_path / "checkpoint_best", tmp_path / "new" / "best.pth"
    weights = save_checkpoint(checkpoint)
    assert "7 tensors, without the optimizer's state" in convert(checkpoint, published)
    # torch alone reads it, without any class allowed.
    content = torch.load(published, weights_only=True)
    assert set(content) == {"model", "args"} and list(content["model"]) == list(weights)
    settings = read_checkpoint(published).settings
    expected = {"dataset": "star", "bias": 3.5, "adapter_layer": 2}
    assert expected.items() <= settings.items()
    back, from_weights = tmp_path / "back.safetensors", tmp_path / "alone.pth"
    convert(published, back)
    convert(checkpoint / format.WEIGHTS, from_weights)
    written = [content["model"], *(read_checkpoint(p).weights for p in (back, from_weights))]
    for tensors in written:
        assert tensors.keys() == weights.keys() and holds_all(weights, tensors)


def test_the_published_code_s_own_files_are_read(tmp_path: Path) -> None:
    hyper = oracle.Hyper(adapter_layer=2)
    own = oracle.init_trainables({"dim": 32, "n_heads": 4, "n_layers": 3}, hyper, random_gates=True)
    source, target = tmp_path / "published.pth", tmp_path / "ours.safetensors"
    oracle_files.save_published(source, own, lower_gates=1)
    convert(source, target)
    shapes = trainable_shapes(CONFIG, 2, 10, 10)
    found = validate_for_model(read_checkpoint(target), shapes, 3)
    assert all(torch.equal(found.weights[name], value.detach()) for name, value in own.items())
    assert len(found.notes) == 1


# Errors, and what they leave behind


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def put_nan(path: Path) -> None:
    content = torch.load(path)
    content["layers.2.feed_forward.w2.weight"][3, 3] = torch.nan
    torch.save(content, path)


def drop_gate(path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        content = torch.load(path, weights_only=True)
    del content["model"]["layers.1.attention.gate2"]
    torch.save(content, path)


@dataclass(frozen=True)
class Hostile:
    """A command that fails: its exit code, part of its message, and the damage done before."""

    command: str
    code: int
    message: str
    damage: Callable[[Path], object] = lambda folder: None


SHARD = "meta/consolidated.00.pth"
HOSTILE = {
    "nothing there": Hostile("nowhere out", 2, "nowhere: no such file or folder to convert"),
    "target is there": Hostile(
        "meta hf", 2, "hf: already exists; name another target, or remove it"
    ),
    "target in a file": Hostile(
        "meta meta/params.json/out", 2, "params.json: 'meta/params.json' is not a folder"
    ),
    "same layout": Hostile(
        "hf out --to hf", 2, "hf: is in Hugging Face's layout already; --to meta writes the other"
    ),
    "shards of HF": Hostile("meta out --shards 2", 2, "--shards: is for Meta's layout"),
    "three shards": Hostile(
        "hf out --shards 3", 2, "--shards 3: n_heads 4 of this model cannot be divided by it"
    ),
    "no shards": Hostile(
        "hf out --shards 0", 2, "--shards 0: must be a whole number of at least 1"
    ),
    "shards of an adapter": Hostile(
        "published.pth out.safetensors --shards 2",
        2,
        "published.pth: holds no LLaMA weights, and --to and --shards",
    ),
    "wrong suffix": Hostile(
        "published.pth out.pth",
        2,
        "out.pth: this conversion writes a .safetensors file; name the target so",
    ),
    "unknown flag": Hostile(
        "meta out --shard 2", 2, "unrecognized arguments: --shard 2 (see vico convert --help)"
    ),
    "no target": Hostile("meta", 2, "the following arguments are required: TARGET"),
    "an empty folder": Hostile(
        "empty out",
        3,
        "empty/state.json: no such file; a checkpoint is a folder with",
        lambda folder: (folder / "empty").mkdir(),
    ),
    "no config": Hostile(
        "hf out",
        2,
        "config.json: no such file; config.json, which comes with the LLaMA",
        lambda folder: (folder / "hf" / "config.json").unlink(),
    ),
    "a flipped bit": Hostile(
        "meta out", 3, "is cut off or damaged", lambda folder: flip_bit(folder / SHARD)
    ),
    "not a number": Hostile(
        "meta out",
        3,
        "'layers.2.feed_forward.w2.weight' holds NaN or infinite",
        lambda folder: put_nan(folder / SHARD),
    ),
    "cut off": Hostile(
        "hf out",
        3,
        "model.safetensors: the file of LLaMA weights is cut",
        lambda folder: os.truncate(folder / "hf" / "model.safetensors", 5000),
    ),
    "half a pair of gates": Hostile(
        "published.pth out.safetensors",
        3,
        "published.pth: lacks layers.1.attention.gate2",
        lambda folder: drop_gate(folder / "published.pth"),
    ),
    "a backbone as adapter": Hostile(
        "hf/model.safetensors out.pth",
        3,
        " tensors of a LLaMA and none of an adapter; name a checkpoint of ViCo by --resume",
    ),
    "a flipped adapter": Hostile(
        "published.pth out.safetensors",
        3,
        "the checkpoint is cut off or damaged",
        lambda folder: flip_bit(folder / "published.pth"),
    ),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same LLaMA in both layouts, and an adapter."""
    folder = tmp_path_factory.mktemp("original")
    oracle_files.write_tiny_meta(folder / "meta", 400)
    convert(folder / "meta", folder / "hf")
    dimensions = {"dim": 32, "n_heads": 4, "n_layers": 3}
    trainables = oracle.init_trainables(dimensions, oracle.Hyper())
    oracle_files.save_published(folder / "published.pth", trainables)
    return folder


@pytest.mark.parametrize("case", HOSTILE.values(), ids=HOSTILE.keys())
def test_errors_are_one_line_and_leave_nothing(
    case: Hostile,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(original, folder)
    case.damage(folder)
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code = main(["convert", *case.command.split()])
    stdout, stderr = capfd.readouterr()
    assert stderr.startswith("vico: error: ") and stderr.count("\n") == 1 and stdout == ""
    assert case.message in stderr and code == case.code, stderr
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("source", ["meta", "hf"])
def test_full_disk_leaves_nothing(
    source: str, original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        code = main(["convert", str(original / source), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert code == 6 and "out: cannot be written (" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_reports_what_was_done(
    original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = original / "meta", tmp_path / "out"
    assert main(["convert", str(source), str(target)]) == 0
    stdout = capfd.readouterr().out
    layouts = "from Meta's layout to Hugging Face's, 1 file(s) of weights, 0."
    assert f"{target}: {source} {layouts}" in stdout and stdout.endswith(" s\n")
    assert json.loads((target / "config.json").read_text())["num_key_value_heads"] == 4
    tensors = safetensors.torch.load_file(target / "model.safetensors")
    assert tensors["model.norm.weight"].dtype == torch.float16
