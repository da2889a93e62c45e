"""The examples of vico/data/README.md work as they are printed there."""

import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.processes import ROOT
from support.toy_dataset import ToyData
from vico.data import prompts
from vico.data.datasets import DATASETS, Dataset, read_questions
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question

GUIDE = (ROOT / "vico" / "data" / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def example(text: str) -> str:
    """The one block of code that contains `text`."""
    (code,) = [block for block in CODE if text in block]
    return textwrap.dedent(code)


def test_added_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: dict[str, Any] = {}
    exec(example("def read("), module)
    entry = Dataset(module["annotation_file"], module["read"])
    assert example("Dataset(") == '"myqa": Dataset(myqa.annotation_file, myqa.read),\n'
    monkeypatch.setitem(DATASETS, "myqa", entry)
    options = {"a": "one", "b": "two", "c": "3", "d": "None"}
    row = {"id": 1, "video": "v1", "kind": "count", "question": "How many?", "answer": 2}
    put(tmp_path / "val.jsonl", [row | options])
    (question,) = read_questions("myqa", tmp_path, "val")
    texts = tuple(options.values())
    expected = Question(0, "1", "v1", "count", "How many?", texts, 2, place="val.jsonl:1")
    assert question == replace(expected, dataset="myqa")


def test_added_task(toy: ToyData) -> None:
    namespace = dict(vars(prompts))
    exec(example("def opt("), namespace)
    tokenizer = Tokenizer(toy.llama / "tokenizer.model")
    built = prompts.Prompts(tokenizer, 10, 512, 384, dialogue=False)
    question = Question(0, "1", "v1", "CW", "why", ("red", "blue"), 1)
    sequence = namespace["opt"](built, question, 1)
    targets = [sequence.tokens[t] for t in sequence.targets]
    assert tokenizer.decode(targets[:-1]) == "\n(A) red\n(B) blue"
    assert targets[-1] == tokenizer.eos
