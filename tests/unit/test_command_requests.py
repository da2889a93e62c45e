"""What commands make of their flags and of a checkpoint, before any model is loaded."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.errors import refusal
from support.toy_dataset import ToyData
from vico.checkpoint.format import Checkpoint
from vico.cli import check_answers, cognition, data, demo, env, evaluate, interpreter, main, version
from vico.cli import selftest as selftest_command
from vico.cli.cognition import Request
from vico.data.prompts import Prompts
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question
from vico.io.file_cache import FileCache
from vico.train.config import RunConfig

# vico cognition


def test_what_is_measured() -> None:
    """Questions where nothing else is asked for."""
    texts = (Path("t"),)
    assert cognition._request({}, {}) == Request((), None, True)
    assert cognition._request({"text": texts}, {}) == Request(texts, None, False)
    assert cognition._request({"text": texts}, {"questions": True}) == Request(texts, None, True)
    assert cognition._request({"attention_shares": 7}, {}) == Request(
        (), None, False, attention=True
    )
    assert cognition._request({"text": texts}, {"window": 2}).window == 2
    assert refusal(cognition._request, {}, {"window": 2}) == (
        "--window 2: needs texts or tasks; name some by --text or --tasks"
    )
    assert refusal(cognition._request, {}, {"window": 1}) == (
        "--window 1: has no room for a token behind BOS; 2 is the least"
    )
    for flag in ("include_path", "num_fewshot", "limit"):
        message = f"--{flag}: needs tasks; name some by --tasks hellaswag,arc_easy"
        assert refusal(cognition._request, {}, {flag: 1}) == message
    assert refusal(cognition._request, {}, {"tasks": [","]}).startswith("--tasks: needs tasks; ")


def test_tasks_that_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cognition.importlib.util, "find_spec", lambda name: name)
    typed: dict[str, Any] = {"tasks": ["a,b", "c,"], "num_fewshot": 0, "limit": 3}
    typed["include_path"] = tmp_path
    request = cognition._request({}, typed)
    assert request == Request((), None, False, ("a", "b", "c"), tmp_path, 0, 3)
    message = "--num_fewshot -1: must be 0 or more"
    assert refusal(cognition._request, {}, {**typed, "num_fewshot": -1}) == message
    nowhere = tmp_path / "no"
    assert refusal(cognition._request, {}, {**typed, "include_path": nowhere}) == (
        f"--include_path {nowhere}: no such folder; it holds the files of tasks"
    )
    monkeypatch.setattr(cognition.importlib.util, "find_spec", lambda name: None)
    assert refusal(cognition._request, {}, typed) == (
        "--tasks: needs the package lm_eval, which is not installed; pip install '.[lm-eval]'"
    )


def test_windows_of_a_model() -> None:
    """As asked, else the default, and never more than the model sees."""
    free, asked = Request((), None, False), Request((), 100, False)
    assert (free.window_of(None, 512), free.window_of(64, 512)) == (512, 64)
    assert (asked.window_of(None, 512), asked.window_of(100, 50)) == (100, 100)
    assert refusal(asked.window_of, 99, 512) == (
        "--window 100: this model sees 99 tokens; lower it to that"
    )


# vico eval


def trained_on(text: str | None, folder: Path) -> Checkpoint:
    settings = {} if text is None else {"dataset": text}
    return Checkpoint(folder / "checkpoint-3", {}, settings=settings)


def test_data_sets_that_are_evaluated(tmp_path: Path) -> None:
    """Other ones, or fewer, than those of the training have predictions of their own."""
    own, plain = "predictions_val.jsonl", RunConfig(output_dir=tmp_path)
    elsewhere = RunConfig(dataset="tvqa", output_dir=tmp_path / "other")
    for trained, asked, are_others, unknown in (
        ("star", "star", False, ()),
        ("star:2,nextqa", "nextqa,star", False, ()),
        ("star,nextqa", "star", True, ()),
        ("star", "star,tvqa,intentqa", True, ("tvqa", "intentqa")),
        (None, "tvqa", False, ()),
    ):
        checkpoint = trained_on(trained, tmp_path)
        config = RunConfig(dataset=asked, output_dir=tmp_path)
        assert evaluate.evaluates_others(checkpoint, config) is are_others
        path = evaluate.predictions_path(checkpoint, config)
        assert path.parent == tmp_path and (path.name == own) is not are_others
        notes = evaluate.on_other_datasets(checkpoint, config)
        names = ", ".join(evaluate.trained_datasets(checkpoint))
        assert notes == [
            f"note: {checkpoint.path}: was trained on {names}, and is evaluated on "
            f"{', '.join(unknown)}: another data set"
        ] * bool(unknown)
    path = evaluate.predictions_path(trained_on("star", tmp_path), elsewhere)
    assert path == tmp_path / "other" / own
    assert evaluate.trained_datasets(trained_on(None, tmp_path)) == ()
    assert plain.split == "val"


# vico check


class Wordless(Tokenizer):
    """A tokenizer that loses what it encodes."""

    def decode(self, ids: Any) -> str:
        return "?"


def test_targets_that_are_no_letters(toy: ToyData, tmp_path: Path) -> None:
    """The first question is named; what was fine is not looked at again."""
    path = toy.llama / "tokenizer.model"
    options = ("x", "y", "z")
    questions = [
        Question(i, str(i), "v", "C", "why?", options, answer, place=f"val.csv:{i + 2}")
        for i, answer in enumerate((2, None, 0))
    ]

    def check(kind: type[Tokenizer], cache: FileCache) -> None:
        tokenizer = kind(path)
        prompts = Prompts(tokenizer, 10, 512, 384, False)
        backbone: Any = SimpleNamespace(tokenizer=tokenizer, tokenizer_path=path)
        arguments = (RunConfig(), "nextqa", questions, backbone, prompts, cache)
        check_answers.check_answers(*arguments)

    cache = FileCache()
    message = refusal(check, Wordless, cache)
    assert message == (
        "val.csv:2: of 3 of 3 questions the targets are not the answer's letter, here '?' for "
        f"{check_answers.letter(2)}; {path} is no LLaMA tokenizer: use the one that came with the "
        "weights"
    )
    check(Tokenizer, cache)


# vico data, demo, env, selftest, --version


def test_splits_that_are_converted(toy: ToyData, tmp_path: Path) -> None:
    """As named, each once, in this order; else those that are there."""
    folder = toy.folder / "data" / "nextqa"
    assert data._splits("nextqa", folder, " val, train,val") == ["val", "train"]
    assert data._splits("nextqa", folder, None) == ["train", "val"]
    message = "--splits val,x: 'x' is none of train, val, test"
    assert refusal(data._splits, "nextqa", folder, "val,x") == message
    (tmp_path / "nextqa").mkdir()
    assert refusal(data._splits, "nextqa", tmp_path / "nextqa", None) == (
        f"{tmp_path / 'nextqa'}: holds no table of nextqa for train, val, test; correct --data_path"
    )


def test_a_demo_that_is_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is kept, unless its settings are others."""
    settings = {"version": demo.VERSION, "seed": 0, "steps": 1, "splits": {"val": 2}}
    demo.write_json(tmp_path / "world.json", settings)
    demo.make_toy_dataset(tmp_path, 0, 1, {"val": 2})
    assert capfd.readouterr().out == f"{tmp_path}: the demo is there already\n"
    assert [path.name for path in tmp_path.iterdir()] == ["world.json"]
    for seed, steps, splits in ((1, 1, {"val": 2}), (0, 2, {"val": 2}), (0, 1, None)):
        assert refusal(demo.make_toy_dataset, tmp_path, seed, steps, splits) == (
            f"{tmp_path}: holds a demo of other settings; remove it, or choose another --output_dir"
        )


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="H100", total_memory=85 * 10**9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    end = f"H100, 79.2 GiB, compute capability 9.0, CUDA {torch.version.cuda}"
    assert env._devices() == [f"cuda:0 {end}", f"cuda:1 {end}"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert env._devices() == [f"cpu (no GPU that torch {torch.__version__} can use)"]


def test_selftest_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest_command, "TESTS", tmp_path)
    assert refusal(selftest_command.main, []) == (
        f"vico selftest: there is no {tmp_path / 'faults'}; run it in a checkout of ViCo, not from "
        "an installed package"
    )


def test_the_commit_of_a_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a checkout and git answers."""
    monkeypatch.setattr(version, "ROOT", tmp_path)
    assert version.version() == version.VERSION
    (tmp_path / ".git").mkdir()
    assert version.version() == version.VERSION, "git finds nothing there"
    for problem in (OSError(), subprocess.TimeoutExpired("git", 1)):

        def fails(*_: Any, problem: Exception = problem, **__: Any) -> Any:
            raise problem

        with monkeypatch.context() as patch:
            patch.setattr(version.subprocess, "run", fails)
            assert version.version() == version.VERSION
    (tmp_path / ".git").rmdir()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "file").write_text("1")
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    short = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    commit = short.stdout.strip()
    assert version.version() == f"{version.VERSION} (commit {commit})"
    (tmp_path / "file").write_text("2")
    assert version.version() == f"{version.VERSION} (commit {commit}, changed)"


@pytest.mark.parametrize(
    ("options", "after"),
    [
        (["error"], ["default"]),
        (["e"], ["default"]),
        (["ignore", "err::DeprecationWarning"], ["default"]),
        (["ignore", "default"], ["ignore", "default"]),
        (["errors"], ["errors"]),
        ([""], [""]),
    ],
)
def test_warnings_end_no_run(
    options: list[str], after: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they were made errors by the first letters of the word."""
    simple: list[str] = []
    monkeypatch.setattr(sys, "warnoptions", [*options])
    monkeypatch.setattr(interpreter.warnings, "simplefilter", simple.append)
    monkeypatch.setenv("PYTHONWARNINGS", "as it was")
    interpreter._keep_warnings_harmless()
    is_changed = after != options
    assert sys.warnoptions == after and simple == ["default"] * is_changed
    assert interpreter.os.environ["PYTHONWARNINGS"] == ("default" if is_changed else "as it was")


# vico itself


def test_packages_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of others it is said; a module of ViCo that is missing is a bug."""

    def lacks(name: str | None) -> Any:
        def run(*_: Any) -> int:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        return run

    monkeypatch.setattr(main, "_run", lacks("tiktoken.load"))
    assert main.main(["plan"]) == 2
    assert "has no module 'tiktoken" in capfd.readouterr().err
    for name in ("vico.nothing", "vico", None):
        monkeypatch.setattr(main, "_run", lacks(name))
        with pytest.raises(ModuleNotFoundError):
            main.main(["plan"])


def test_words_that_are_no_command(capfd: pytest.CaptureFixture[str]) -> None:
    known = f"use one of {', '.join(main.COMMANDS)}"
    for word, said in (
        ("--epochs", f"--epochs: a command comes first, as in vico train --epochs; {known}"),
        ("trian", f"unknown command 'trian'; did you mean 'train'?; {known}"),
        ("xyz", f"unknown command 'xyz'; {known}"),
    ):
        assert main.main([word]) == 2
        assert capfd.readouterr().err == f"vico: error: {said}\n"
    assert main.main(["--version"]) == 0
    assert capfd.readouterr().out.startswith(f"vico {version.VERSION}")
