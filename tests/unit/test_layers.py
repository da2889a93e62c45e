"""Layers: imports go downward only, lazy ones included. Some modules must load without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vico"
FLOORS = (
    "errors io distributed model data video planner checkpoint generation train report cli api"
).split()
WITHOUT_TORCH = (
    "model.config planner.plan planner.memory planner.zero3_trace train.config "
    "cli.plan cli.plan_text cli.ask cli.caption api"
).split()


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports from, anywhere in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("vico.")}


@pytest.mark.parametrize("room", FLOORS)
def test_imports_go_down(room: str) -> None:
    is_file = room in ("errors", "api")
    files = [PACKAGE / f"{room}.py"] if is_file else sorted((PACKAGE / room).rglob("*.py"))
    allowed = set(FLOORS[: FLOORS.index(room) + 1])
    assert files
    for path in files:
        assert imported_rooms(path) <= allowed, path


def test_every_entry_has_a_floor() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert entries - {"__init__", "__main__", "__pycache__", "README", "METHOD"} == set(FLOORS)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("__init__.py")), ids=lambda p: p.parent.name)
def test_init_files_are_empty(path: Path) -> None:
    assert not path.read_text(encoding="utf-8")


def test_modules_without_torch() -> None:
    modules = ", ".join(f"vico.{name}" for name in WITHOUT_TORCH)
    program = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)
