"""Command lines of `vico train` as tests write them."""

import shlex
from pathlib import Path

import pytest

from vico.cli.flags import CommandLine, parse
from vico.errors import UserError


def parse_line(line: str) -> CommandLine:
    return parse(shlex.split(line), "vico train", "")


def error_of(line: str) -> str:
    with pytest.raises(UserError) as caught:
        parse_line(line).resolve()
    assert str(caught.value).isprintable()
    return str(caught.value)


def recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return f"--config {tmp_path}/recipe.yaml"
