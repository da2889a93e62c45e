"""How captions become tokens: what Java is asked and answers, and which metrics are taken."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from support.errors import refusal
from vico.generation import caption_metrics as module
from vico.generation.caption_metrics import caption_metrics, caption_record, metrics_of

pytest.importorskip("pycocoevalcap", exc_type=ImportError)
TEXTS = {"a": ["The dog's  ball.\n", " "], "b": [], "c": ["...", "Two, men"]}


class Java:
    """In the place of `subprocess.run`: it puts a blank before each mark."""

    def __init__(self, **result: Any) -> None:
        self.result = {"returncode": 0, "stderr": b"", **result}
        self.command: list[str] = []
        self.given: dict[str, Any] = {}

    def __call__(self, command: list[str], **given: Any) -> Any:
        self.command, self.given = command, given
        text = given["input"].decode().lower()
        for mark in ",.'":
            text = text.replace(mark, f" {mark}")
        return SimpleNamespace(**{"stdout": text.encode(), **self.result})


@pytest.fixture
def java(monkeypatch: pytest.MonkeyPatch) -> Java:
    made = Java()
    monkeypatch.setattr(subprocess, "run", made)
    return made


def test_what_java_is_asked(java: Java, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all texts, a line for each that has a word; marks are no tokens."""
    from pycocoevalcap.tokenizer import ptbtokenizer

    monkeypatch.setenv("OWN_", "x")
    assert module._by_java(TEXTS) == {"a": ["the dog 's ball", ""], "b": [], "c": ["", "two men"]}
    assert java.command == [
        "java",
        "-cp",
        "stanford-corenlp-3.4.1.jar",
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
        "-encoding",
        "UTF-8",
    ]
    environment = java.given.pop("env")
    assert environment["JAVA_TOOL_OPTIONS"] == "-Dfile.encoding=UTF-8"
    assert environment["OWN_"] == "x", "and what this process has"
    assert java.given == {
        "input": b"The dog's ball.\n...\nTwo, men\n",
        "capture_output": True,
        "cwd": Path(ptbtokenizer.__file__).parent,
        "timeout": 600.0,
    }


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ({"returncode": 1, "stderr": b"first\nno heap\n"}, "no heap"),
        ({"stdout": b"the dog\n", "stderr": b"cut\n"}, "cut"),
        ({"stdout": b"1\n2\n3\n4\n", "stderr": b"\xff"}, "\ufffd"),
    ],
)
def test_java_that_fails(result: dict[str, Any], reason: str, java: Java) -> None:
    """It says so, or writes another number of lines."""
    java.result |= result
    assert refusal(module._by_java, TEXTS) == (
        f"captions: Java's tokenizer failed ({reason}); repair that Java, or take it off the PATH "
        "for the plain tokenizer"
    )


@pytest.mark.parametrize(
    ("problem", "reason"),
    [
        (OSError("no such program"), "no such program"),
        (subprocess.TimeoutExpired("java", 600.0), "Command 'java' timed out after 600.0 seconds"),
    ],
)
def test_java_that_does_not_run(
    problem: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(subprocess, "run", fail)
    assert f"Java's tokenizer failed ({reason}); repair" in refusal(module._by_java, TEXTS)


def test_plain_tokens() -> None:
    """Runs of letters and digits with the apostrophes inside, in lower case; no underscores."""
    texts = {"a": ["The Dog's 2 balls, it’s _red_!", "'quoted' é"], "b": [" ... "]}
    assert module._plainly(texts) == {"a": ["the dog's 2 balls it’s red", "quoted é"], "b": [""]}


@pytest.mark.parametrize("found", ["/usr/bin/java", None])
def test_which_tokenizer_and_metrics(
    found: str | None, java: Java, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Java where it is found, unless it is said; METEOR with it, unless it costs too much."""
    monkeypatch.setattr(module.shutil, "which", lambda name: found if name == "java" else None)
    monkeypatch.setattr(module, "_meteor", lambda references, captions: (references, captions))
    captions, references = {"a": "A man."}, {"a": ["A man", "the men"]}
    metrics = caption_metrics(captions, references)
    used = found is not None
    assert metrics["tokenizer"] == ("ptb" if used else "plain")
    assert metrics.get("meteor") == (
        ({"a": ["a man", "the men"]}, {"a": ["a man"]}) if used else None
    )
    assert (metrics["n"], metrics["n_references"], metrics["cider"]) == (1, 2, None)
    assert metrics["bleu_1"] == pytest.approx(1) and metrics["rouge_l"] == 1
    for java_is_used in (True, False):
        forced = caption_metrics(captions, references, java=java_is_used, meteor=False)
        assert forced["tokenizer"] == ("ptb" if java_is_used else "plain")
        assert "meteor" not in forced
    lines = [caption_record(name, "v", made("a man"), ["a man runs"]) for name in ("x", "y")]
    whole = metrics_of(lines)
    assert (whole["n"], "meteor" in whole) == (2, used) and whole["cider"] is not None
    assert "meteor" not in metrics_of(lines, meteor=False)


def made(text: str) -> Any:
    return SimpleNamespace(text=text, is_cut=True)


def test_a_line_of_captions() -> None:
    assert caption_record("my", "v", made("a man"), ("x", "y")) == {
        "dataset": "my",
        "video": "v",
        "caption": "a man",
        "references": ["x", "y"],
        "is_cut": True,
    }
