"""`vico convert`: there and back are the same bits, transformers reads what it should, and nothing half-done is left behind."""

import argparse
import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from reference import oracle, oracle_files
from support.backbones import KINDS, LOGITS_RTOL, distance, logits, make_hugging_face, text
from support.errors import refusal
from vico.checkpoint import format, write
from vico.checkpoint.format import TrainState
from vico.checkpoint.validate import validate_for_model
from vico.cli.convert import convert
from vico.cli.main import main
from vico.model.config import LlamaConfig, backbone_shapes, trainable_shapes
from vico.model.vico import initial_trainables
from vico.model.weights import convert as converter
from vico.model.weights.load import open_weights
from vico.train.config import RunConfig
from vico.train.resume import read_checkpoint

SHAPE = LlamaConfig(32, 3, 4, 400)


def equal(a: Path, b: Path) -> bool:
    """Every tensor bit for bit, and the dimensions."""
    one, other = open_weights(a, None), open_weights(b, None)
    return backbone_shapes(one.config) == backbone_shapes(other.config) and all(
        one.read(n).dtype == other.read(n).dtype and torch.equal(one.read(n), other.read(n))
        for n in backbone_shapes(one.config)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_from_hugging_face_to_meta_and_back(kind: str, tmp_path: Path) -> None:
    reference = make_hugging_face(tmp_path / "hf", KINDS[kind])
    if kind == "stretched":
        assert "which a params.json cannot say; keep Hugging Face's layout" in refusal(
            convert, tmp_path / "hf", tmp_path / "meta"
        )
        return
    convert(
        tmp_path / "hf",
        tmp_path / "meta",
        shards=1 if KINDS[kind].get("num_key_value_heads") == 1 else 2,
    )
    convert(tmp_path / "meta", tmp_path / "back")
    assert equal(tmp_path / "hf", tmp_path / "meta") and equal(tmp_path / "meta", tmp_path / "back")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    ids = text(open_weights(tmp_path / "hf", None))
    with torch.no_grad():
        expected, found = reference(ids[None]).logits[0], again(ids[None]).logits[0]
    assert torch.equal(found, expected)
    assert distance(logits(open_weights(tmp_path / "meta", None), ids), expected) < LOGITS_RTOL


@pytest.mark.parametrize("shards", [1, 2])
def test_from_meta_to_hugging_face_and_back(
    shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle_files.write_tiny_meta(tmp_path / "meta", 400, shards=shards)
    monkeypatch.setattr(converter, "MAX_FILE_BYTES", 40_000)
    convert(tmp_path / "meta", tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("model-0000?-of-0000?.safetensors"))) > 2
    convert(tmp_path / "hf", tmp_path / "back", shards=shards)
    assert equal(tmp_path / "meta", tmp_path / "hf") and equal(tmp_path / "meta", tmp_path / "back")
    for path in (tmp_path / "meta").glob("*.pth"):
        ours, theirs = (
            torch.load(folder / path.name) for folder in (tmp_path / "back", tmp_path / "meta")
        )
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    reference, shape = (
        LlamaForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval(),
        open_weights(tmp_path / "hf", None),
    )
    with torch.no_grad():
        expected = reference(text(shape)[None]).logits[0]
    assert distance(logits(shape, text(shape)), expected) < LOGITS_RTOL


def test_meta_shards_are_divided_anew(tmp_path: Path) -> None:
    oracle_files.write_tiny_meta(tmp_path / "one", 400)
    convert(tmp_path / "one", tmp_path / "four", "meta", 4)
    convert(tmp_path / "four", tmp_path / "again", "meta")
    assert len(list((tmp_path / "four").glob("*.pth"))) == 4 and equal(
        tmp_path / "one", tmp_path / "four"
    )
    ours, theirs = (
        torch.load(tmp_path / name / "consolidated.00.pth") for name in ("again", "one")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_a_large_vocabulary_is_split_as_meta_s_llama_3_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(converter, "LARGE_VOCAB_SIZE", 1000)
    make_hugging_face(tmp_path / "hf", KINDS["LLaMA-3"])
    convert(tmp_path / "hf", tmp_path / "meta", shards=2)
    assert torch.load(tmp_path / "meta" / "consolidated.01.pth")["tok_embeddings.weight"].shape == (
        512,
        64,
    )
    assert equal(tmp_path / "hf", tmp_path / "meta")


# ---- adapters ----------------------------------------------------------------------------------------------------------------


def trainables() -> dict[str, Tensor]:
    values = initial_trainables(trainable_shapes(SHAPE, 2, 10, 10), bias=3.5, seed=3)
    return {name: value + 0.1 for name, value in values.items()}


def save(folder: Path) -> dict[str, Tensor]:
    weights = trainables()
    moments = {
        f"{n}.{m}": torch.zeros_like(v)
        for n, v in weights.items()
        for m in ("exp_avg", "exp_avg_sq")
    }
    config = RunConfig(dataset="star", bias=3.5, adapter_layer=2, output_dir=folder)
    run = write.RunIdentity("", config.to_json(), {})
    write.save(folder, weights, moments, TrainState(step=1), run)
    return weights


def test_adapters_go_to_the_lineage_and_back(tmp_path: Path) -> None:
    weights = save(tmp_path / "checkpoint_best")
    assert "7 tensors, without the optimizer's state" in convert(
        tmp_path / "checkpoint_best", tmp_path / "new" / "best.pth"
    )
    content = torch.load(
        tmp_path / "new" / "best.pth", weights_only=True
    )  # by torch alone, without anything allowed
    assert set(content) == {"model", "args"} and list(content["model"]) == list(weights)
    read = read_checkpoint(tmp_path / "new" / "best.pth")
    assert (
        read.settings["dataset"] == "star"
        and read.settings["bias"] == 3.5
        and read.settings["adapter_layer"] == 2
    )
    convert(tmp_path / "new" / "best.pth", tmp_path / "back.safetensors")
    convert(tmp_path / "checkpoint_best" / format.WEIGHTS, tmp_path / "alone.pth")
    for found in (
        content["model"],
        *(read_checkpoint(tmp_path / n).weights for n in ("back.safetensors", "alone.pth")),
    ):
        assert found.keys() == weights.keys() and all(
            torch.equal(found[n], v) for n, v in weights.items()
        )


def test_the_published_code_s_own_files_are_read(tmp_path: Path) -> None:
    hyper = oracle.Hyper(adapter_layer=2)
    own = oracle.init_trainables({"dim": 32, "n_heads": 4, "n_layers": 3}, hyper, random_gates=True)
    oracle_files.save_lineage(tmp_path / "lineage.pth", own, lower_gates=1)
    convert(tmp_path / "lineage.pth", tmp_path / "ours.safetensors")
    found = validate_for_model(
        read_checkpoint(tmp_path / "ours.safetensors"), trainable_shapes(SHAPE, 2, 10, 10), 3
    )
    assert (
        all(torch.equal(found.weights[n], v.detach()) for n, v in own.items())
        and len(found.notes) == 1
    )


# ---- what is refused, and what is left behind ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nan(path: Path) -> None:
    content = torch.load(path)
    content["layers.2.feed_forward.w2.weight"][3, 3] = torch.nan
    torch.save(content, path)


def drop(path: Path) -> None:
    with torch.serialization.safe_globals([argparse.Namespace, type(Path())]):
        content = torch.load(path, weights_only=True)
    del content["model"]["layers.1.attention.gate2"]
    torch.save(content, path)


# name: (damage, command line, exit code, what the line says)
HOSTILE: dict[str, tuple[Any, str, int, str]] = {
    "nothing there": (None, "nowhere out", 2, "nowhere: no such file or folder to convert"),
    "target is there": (
        None,
        "meta hf",
        2,
        "hf: already exists; name another target, or remove it",
    ),
    "target in a file": (
        None,
        "meta meta/params.json/out",
        2,
        "params.json: 'meta/params.json' is not a folder",
    ),
    "same layout": (
        None,
        "hf out --to hf",
        2,
        "hf: is in Hugging Face's layout already; --to meta writes the other",
    ),
    "shards of HF": (None, "meta out --shards 2", 2, "--shards: is for Meta's layout"),
    "three shards": (
        None,
        "hf out --shards 3",
        2,
        "--shards 3: n_heads 4 of this model cannot be divided by it",
    ),
    "no shards": (None, "hf out --shards 0", 2, "--shards 0: must be a whole number of at least 1"),
    "shards of an adapter": (
        None,
        "lineage.pth out.safetensors --shards 2",
        2,
        "lineage.pth: holds no LLaMA weights, and --to and --shards",
    ),
    "wrong suffix": (
        None,
        "lineage.pth out.pth",
        2,
        "out.pth: this conversion writes a .safetensors file; name the target so",
    ),
    "unknown flag": (
        None,
        "meta out --shard 2",
        2,
        "unrecognized arguments: --shard 2 (see vico convert --help)",
    ),
    "no target": (None, "meta", 2, "the following arguments are required: TARGET"),
    "an empty folder": (
        lambda h: (h / "empty").mkdir(),
        "empty out",
        3,
        "empty/state.json: no such file; a checkpoint is a folder with",
    ),
    "no config": (
        lambda h: (h / "hf" / "config.json").unlink(),
        "hf out",
        2,
        "config.json: no such file; config.json, which comes with the LLaMA",
    ),
    "a flipped bit": (
        lambda h: flip(h / "meta" / "consolidated.00.pth"),
        "meta out",
        3,
        "is cut off or damaged",
    ),
    "not a number": (
        lambda h: nan(h / "meta" / "consolidated.00.pth"),
        "meta out",
        3,
        "'layers.2.feed_forward.w2.weight' holds NaN or infinite",
    ),
    "cut off": (
        lambda h: os.truncate(h / "hf" / "model.safetensors", 5000),
        "hf out",
        3,
        "model.safetensors: the file of LLaMA weights is cut",
    ),
    "half a pair of gates": (
        lambda h: drop(h / "lineage.pth"),
        "lineage.pth out.safetensors",
        3,
        "lineage.pth: lacks layers.1.attention.gate2",
    ),
    "a backbone as adapter": (
        None,
        "hf/model.safetensors out.pth",
        3,
        "model.safetensors: lacks adapter_query.weight, temporal_emb.weight, visual",
    ),
    "a flipped adapter": (
        lambda h: flip(h / "lineage.pth"),
        "lineage.pth out.safetensors",
        3,
        "the checkpoint is cut off or damaged",
    ),
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fixture = tmp_path_factory.mktemp("original")
    oracle_files.write_tiny_meta(fixture / "meta", 400)
    convert(fixture / "meta", fixture / "hf")
    oracle_files.save_lineage(
        fixture / "lineage.pth",
        oracle.init_trainables({"dim": 32, "n_heads": 4, "n_layers": 3}, oracle.Hyper()),
    )
    return fixture


@pytest.mark.parametrize("name", HOSTILE)
def test_one_line_and_no_trace(
    name: str,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    damage, line, code, part = HOSTILE[name]
    fixture = tmp_path / "fixture"
    shutil.copytree(original, fixture)
    if damage is not None:
        damage(fixture)
    monkeypatch.chdir(fixture)
    before = sorted(fixture.rglob("*"))
    ended = main(["convert", *line.split()])
    out, err = capfd.readouterr()
    assert err.startswith("vico: error: ") and err.count("\n") == 1 and out == ""
    assert part in err and ended == code, err
    assert sorted(fixture.rglob("*")) == before


@pytest.mark.parametrize("source", ["meta", "hf"])
def test_a_full_disk_leaves_nothing(
    source: str, original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        ended = main(["convert", str(original / source), str(tmp_path / "out")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert ended == 6 and "out: cannot be written (" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_says_what_it_did(
    original: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(original / "meta"), str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    assert (
        f"{tmp_path}/out: {original}/meta from Meta's layout to Hugging Face's, 1 file(s) of weights, 0."
        in said
        and said.endswith(" s\n")
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_key_value_heads"] == 4
    assert (
        safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")[
            "model.norm.weight"
        ].dtype
        == torch.float16
    )
