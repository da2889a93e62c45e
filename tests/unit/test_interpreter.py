"""The Python that runs a command: its version, packages, locale and warnings; how it is started."""

import ast
import os
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from support.processes import ROOT, base_environment, run_command
from vico.cli import main as command
from vico.cli.main import COMMANDS
from vico.errors import INTERRUPTED

ENTRIES = ["vico/__main__.py", "vico/cli/main.py", "vico/cli/interpreter.py"]
ENTRIES += ["launch/train.sh", "launch/eval.sh", "launch/start.py"]
AS_3_9 = (
    "import runpy, sys; sys.version_info = (3, 9, 18); "
    "runpy.run_module('vico', run_name='__main__', alter_sys=True)"
)


@pytest.mark.parametrize("path", ENTRIES)
def test_old_pythons_can_parse_what_refuses_them(path: str) -> None:
    ast.parse((ROOT / path).read_text(encoding="utf-8"), feature_version=(3, 8))


def test_old_pythons_are_refused_in_one_line() -> None:
    """This Python says that it is 3.9; and those that are older, where there are any."""
    programs = [[sys.executable, "-c", AS_3_9]]
    home = Path.home() / ".pyenv" / "versions"
    for python in (*home.glob("3.8.*/bin/python"), *home.glob("3.9.*/bin/python")):
        programs += [[str(python), "-m", "vico"], [str(python), str(ROOT / "launch" / "train.sh")]]
    environment = {**base_environment(), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    for program in programs:
        run = run_command([*program, "train"], ROOT, environment)
        assert run.codes == [2], run.output
        assert run.stderrs[0].startswith("vico: error: ") and run.stderrs[0].count("\n") == 1
        assert "and ViCo needs 3.10 or newer; run 'bash launch/environment.sh'" in run.stderrs[0]


@pytest.mark.parametrize("words", [["train"], ["check"], ["eval", "--resume", "x"]])
def test_a_python_without_torch_is_refused_in_one_line(words: list[str]) -> None:
    environment = {**base_environment(), "PYTHONPATH": str(ROOT)}
    run = run_command([sys.executable, "-S", "-m", "vico", *words], ROOT, environment)
    assert run.codes == [2], run.output
    assert run.stderrs[0].startswith(f"vico: error: {sys.executable} has no module '")
    assert run.stderrs[0].count("\n") == 1


def test_a_rank_without_torch_says_its_error_once(tmp_path: Path) -> None:
    """It cannot tell the others, which need torch to hear it."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('torch', name='torch')")
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    ranks = {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment = base_environment(**ranks, MASTER_PORT="1", PYTHONPATH=paths)
    run = run_command([sys.executable, "-m", "vico", "train", "--nope"], tmp_path, environment)
    assert run.codes == [2] and run.stderrs[0].count("\n") == 1, run.output


READ = "from vico.cli import interpreter; interpreter.prepare(); print(ascii(open('t').read()))"
C_LOCALE = {"LC_ALL": "C", "LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


def test_text_is_utf_8_in_any_locale(tmp_path: Path) -> None:
    """Also for libraries, which name no encoding."""
    (tmp_path / "t").write_text("é", encoding="utf-8")
    environment = base_environment(**C_LOCALE)
    run = run_command([sys.executable, "-c", READ], tmp_path, environment)
    assert run.stdouts == ["'\\xe9'\n"], run.output


def test_locale_and_warnings_end_no_command(tmp_path: Path) -> None:
    """torch opens a file of its own that is not ASCII, and warns when it is imported."""
    environment = base_environment(**C_LOCALE, PYTHONWARNINGS="error")
    words = [sys.executable, "-m", "vico", "check", "--model", "é", "--cap", "0"]
    run = run_command(words, tmp_path, environment)
    assert run.codes == [2] and "Traceback" not in run.output, run.output
    assert "error(s), 0 warning(s)" in run.stdouts[0]


def test_ctrl_c_speaks_of_no_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a command that saves none."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vico.cli.demo.make_toy_dataset", interrupt)
    assert command.main(["demo"]) == INTERRUPTED
    assert capsys.readouterr().err == "vico: stopped by Ctrl-C; the same command starts it again\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_module_runs_its_command(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m vico.cli.train` and `torchrun vico/cli/train.py` are no silent success."""
    started: list[Any] = []
    monkeypatch.setattr(command, "console", lambda **named: started.append(named))
    module = f"vico.cli.{COMMANDS[name][0]}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")
    assert started == [{"command": name}]


def test_main_module_is_a_program() -> None:
    run = run_command([sys.executable, "-m", "vico.cli.main", "trian"], ROOT)
    assert run.codes == [2] and "unknown command 'trian'" in run.stderrs[0]


@pytest.mark.parametrize("words", [["-m", "vico.train"], [os.path.join("vico", "train.py")]])
def test_what_cannot_be_run_fails(words: list[str]) -> None:
    assert run_command([sys.executable, *words], ROOT).codes != [0]
