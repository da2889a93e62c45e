"""The examples of vico/data/README.md work as they are printed there."""

import dataclasses
import re
import textwrap
from pathlib import Path

from support.annotation_files import put
from support.processes import ROOT
from support.toy_dataset import ToyData
from vico.data import prompts
from vico.data.datasets import read_questions
from vico.data.readers import spec
from vico.data.tokenizer import Tokenizer
from vico.data.types import Question

GUIDE = (ROOT / "vico" / "data" / "README.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def example(text: str) -> str:
    """The one block of code that contains `text`."""
    (code,) = [block for block in CODE if text in block]
    return textwrap.dedent(code)


def test_tables(tmp_path: Path) -> None:
    """Both examples of a table, and every key of dataset.yaml."""
    blocks = re.findall(r"```(?:yaml)?\n(.*?)```", GUIDE, flags=re.DOTALL)
    (lines,) = [block for block in blocks if block.startswith('{"video"')]
    (semicolons,) = [block for block in blocks if block.startswith("Video;")]
    (described,) = [block for block in blocks if block.startswith("files:")]
    put(tmp_path / "my" / "train.jsonl", lines)
    put(tmp_path / "my" / "val.csv", semicolons)
    asked = [read_questions("my", tmp_path / "my", split)[0] for split in ("train", "val")]
    assert [q.options[q.answer or 0] for q in asked] == ["3", "a child"]
    put(tmp_path / "my" / "dataset.yaml", described)
    names = {field.name for field in dataclasses.fields(spec.Spec)} - {"path"}
    assert {line.partition(":")[0] for line in described.splitlines()} == names
    assert spec.read(tmp_path / "my").frames_per_second == 2


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
