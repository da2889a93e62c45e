"""`vico plan --dataset`: the numbers of a data set of one's own, or whose numbers they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.annotation_files import put
from support.errors import refusal
from support.toy_dataset import ToyData
from vico.cli.plan import main
from vico.data.datasets import DATASETS

GPU = "--gpu H100 --json".split()
ROW: dict[str, Any] = {"video": "v", "question": "why", "options": ["man", "dog"], "answer": 1}


def lengths(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[float, int, str]:
    """(mean tokens, questions, what is said) of a plan."""
    assert main([*GPU, *flags]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)["lengths"]
    return result["question"], result["questions"], printed.err


def test_published_sets_need_no_files(capsys: pytest.CaptureFixture[str]) -> None:
    star = DATASETS["star"]
    expected = (star.mean_question_tokens, star.num_train_questions, "")
    assert lengths(capsys, "--dataset", "star") == expected
    tokens, count, _ = lengths(capsys, "--dataset", "star:0.5,nextqa")
    assert count == 34132 + round(45731 / 2) and 96 < tokens < 98


def test_any_other_name_says_whose_numbers_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    tokens, count, says = lengths(capsys, "--dataset", "nextqaa")
    assert (tokens, count) == (96, 34132)
    assert "data/nextqaa holds no training questions, so the numbers are those of nextqa" in says
    assert "did you mean 'nextqa'?" in says
    assert main("--gpu H100 --dataset mine".split()) == 0
    assert capsys.readouterr().out.startswith("--dataset mine: data/mine holds no training")


def test_a_set_of_ones_own(
    toy: ToyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its questions are counted, and their lengths measured, where there is a tokenizer."""
    put(tmp_path / "my" / "train.jsonl", [{**ROW, "id": str(i)} for i in range(1030)])
    own = ["--dataset", "my", "--data_path", str(tmp_path)]
    tokens, count, says = lengths(capsys, *own, "--model", "7B")
    assert (tokens, count) == (96, 1030) and "tokenizer.model: no such file, so the mean" in says
    model = ["--model", "tiny", "--llama_model_path", str(toy.llama)]
    tokens, count, says = lengths(capsys, *own, *model)
    assert count == 1030 and 30 < tokens < 90
    assert f"1030 training questions, {tokens:.0f} tokens on average of 344 of them" in says
    given = ["--questions", "7", "--question_tokens", "50"]
    assert lengths(capsys, *own, *given) == (50, 7, "")
    put(tmp_path / "my" / "train.jsonl", "{}")
    assert "train.jsonl:1: no 'video'" in refusal(main, [*GPU, *own])
