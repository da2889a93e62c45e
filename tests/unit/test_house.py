"""Limits that keep the code readable: few entries, short files, no nested comprehension."""

import ast
import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.processes import ROOT

MAX_ENTRIES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_README_WORDS = 17, 400, 60, 2500
MAX_LINE_CHARACTERS = 100
FORMATTER_OFF = re.compile("# *" + "fmt:")
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
PACKAGE = sorted((ROOT / "vico").rglob("*.py"))
CODE = [*PACKAGE, ROOT / "setup.py"]
for folder in ("tests", "benchmarks", "launch"):
    CODE += sorted((ROOT / folder).rglob("*.py"))
each_file = pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> Iterator[str]:
    """Modules, and names in modules, that a file imports: lazily and for types, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_no_import_cycle() -> None:
    """Modules that import none of the others are removed in turn; the rest would form a cycle."""
    paths = {module_of(path): path for path in PACKAGE}
    left = {name: (set(imports_of(path)) & paths.keys()) - {name} for name, path in paths.items()}
    while leaves := [module for module, imports in left.items() if not imports & left.keys()]:
        for module in leaves:
            del left[module]
    assert not left, "these modules import each other, or import modules that do"


def test_the_top_level_is_small() -> None:
    command = ["git", "ls-files", "vico"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    assert len({name.split("/")[1] for name in listed.split()}) <= MAX_ENTRIES


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= MAX_README_WORDS


@each_file
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= MAX_FILE_LINES
    # ruff's own limit passes over lines that end in a comment for a tool.
    assert max(map(len, lines), default=0) <= MAX_LINE_CHARACTERS
    assert not FORMATTER_OFF.search(text), "the formatter is never switched off"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < MAX_FUNCTION_LINES, node.name


@each_file
def test_no_nested_comprehension(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, COMPREHENSIONS):
            inside = [n for n in ast.walk(node) if isinstance(n, COMPREHENSIONS)]
            assert inside == [node], f"line {node.lineno}"


def test_no_two_test_files_share_a_name() -> None:
    """pytest imports them by it, and then collects nothing at all."""
    names = Counter(path.name for path in CODE if path.name.startswith("test_"))
    assert [name for name, count in names.items() if count > 1] == []
