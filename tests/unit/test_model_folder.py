"""Where --model leads, and what is said of a backbone's files."""

import shutil
from pathlib import Path

import pytest
import torch

from reference import oracle_files
from support.backbones import KINDS, make_hugging_face
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.cli.flags import parse
from vico.cli.plan import named_config
from vico.distributed.world import World
from vico.model.config import LLAMA_CONFIGS
from vico.model.weights.folders import model_folder, tokenizer_folder
from vico.train.build import Inputs, read_inputs

ALONE = World(0, 1, torch.device("cpu"), None)


def test_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder inside --llama_model_path, else a path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    llamas = Path("llamas")
    for name in ("llamas/7B", "7B", "elsewhere/own"):
        (tmp_path / name).mkdir(parents=True)
    assert model_folder(llamas, "7B") == llamas / "7B"
    assert model_folder(llamas, "elsewhere/own") == Path("elsewhere/own")
    assert model_folder(llamas, "~/elsewhere/own") == tmp_path / "elsewhere" / "own"
    assert model_folder(llamas, str(tmp_path / "7B")) == tmp_path / "7B"
    assert model_folder(llamas, "13B") == llamas / "13B"
    assert model_folder(llamas, ".") == llamas
    assert tokenizer_folder(llamas, llamas / "7B") == llamas
    assert tokenizer_folder(llamas, Path("elsewhere/own")) == Path("elsewhere")


def open_inputs(toy: ToyData, out: Path, *flags: str) -> Inputs:
    config = parse([*toy.flags, "--output_dir", str(out), *flags], "vico train", "").resolve()
    return read_inputs(config, ("train",), ALONE)


def test_a_run_takes_a_path(toy: ToyData, tmp_path: Path) -> None:
    """Its tokenizer is in the folder, or in the one above, not in --llama_model_path."""
    other = tmp_path / "other"
    make_hugging_face(other / "own", KINDS["wide heads"])
    shutil.copy(toy.llama / "tokenizer.model", other / "own")
    inputs = open_inputs(toy, tmp_path / "out", "--model", str(other / "own"))
    assert inputs.tokenizer_path == other / "own" / "tokenizer.model"
    assert inputs.weights.config.head_dim == 32
    (other / "own" / "tokenizer.model").rename(other / "tokenizer.model")
    inputs = open_inputs(toy, tmp_path / "out", "--model", str(other / "own"))
    assert inputs.tokenizer_path == other / "tokenizer.model"
    missing = refusal(open_inputs, toy, tmp_path / "out", "--model", "nowhere")
    assert "no such folder of weights; --model can be tiny, or the path of a folder" in missing


def test_a_plan_takes_both(tmp_path: Path) -> None:
    make_hugging_face(tmp_path / "7B", KINDS["wide heads"])
    assert named_config("7B", tmp_path)[1].head_dim == 32
    assert named_config("13B", tmp_path) == ("13B", LLAMA_CONFIGS["13B"])
    assert named_config(str(tmp_path / "7B"), tmp_path / "none")[1].heads_dim == 128


def test_rows_behind_the_vocabulary_are_said(toy: ToyData, tmp_path: Path) -> None:
    num_pieces = toy.tokenizer.vocab_size()
    oracle_files.write_tiny_meta(tmp_path / "tiny", num_pieces + 1)
    (tmp_path / "tokenizer.model").write_bytes((toy.llama / "tokenizer.model").read_bytes())
    inputs = open_inputs(toy, tmp_path / "out", "--llama_model_path", str(tmp_path))
    note = f"have {num_pieces + 1} rows and tokenizer.model has {num_pieces} pieces: the last 1 row"
    assert any(note in line for line in inputs.notes)
    assert inputs.weights.read("output.weight").shape[0] == num_pieces


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ("--max_seq_len 256 --cap 0", "--max_seq_len 200"),
        ("--max_seq_len 200 --max_cap_len 201", "--max_cap_len 200"),
        ("--max_seq_len 200 --max_cap_len 200", None),
        ("--max_seq_len 200 --cap 0", None),
    ],
)
def test_sequences_fit_the_window(
    flags: str, refused: str | None, toy: ToyData, tmp_path: Path
) -> None:
    window = KINDS["Mistral"] | {"sliding_window": 200}
    make_hugging_face(tmp_path / "m", window)
    shutil.copy(toy.llama / "tokenizer.model", tmp_path / "m")
    command = ["--model", str(tmp_path / "m"), *flags.split()]
    if refused is None:
        assert open_inputs(toy, tmp_path / "out", *command).weights.config.sliding_window == 200
    else:
        message = refusal(open_inputs, toy, tmp_path / "out", *command)
        assert "sliding_window is 200 tokens, and sequences may have" in message
        assert message.endswith(f"set {refused} or less")
