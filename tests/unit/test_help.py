"""The help of every command, word for word as it was committed.

A changed line here is a change that users see. Renew the files with
`VICO_RENEW_HELP=1 bash tests/run.sh tests/unit/test_help.py` on Python 3.10 to 3.12, and read the
diff.
"""

import os
import sys
from pathlib import Path

import pytest

from vico.cli.main import COMMANDS, main

GOLDEN = Path(__file__).resolve().parent / "golden"
RENEW = "VICO_RENEW_HELP=1 bash tests/run.sh tests/unit/test_help.py"


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What `vico COMMAND --help` prints; `vico --help` for an empty command."""
    words = [command, "--help"] if command else ["--help"]
    try:
        code: object = main(words)
    except SystemExit as end:  # argparse ends the process behind its help
        code = end.code
    assert code == 0
    return capsys.readouterr().out


def layout_of(text: str) -> object:
    """What must be equal. Python 3.13 breaks lines elsewhere, and names an alias's value once."""
    if sys.version_info < (3, 13):
        return text
    return text.replace("--local_rank LOCAL_RANK, ", "--local_rank, ").split()


def golden_file(command: str) -> Path:
    return GOLDEN / (f"help_{command}.txt" if command else "help.txt")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_golden(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")  # argparse colours its help from Python 3.14 on
    text, file = help_of(command, capsys), golden_file(command)
    if os.environ.get("VICO_RENEW_HELP") and sys.version_info < (3, 13):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    expected = file.read_text(encoding="utf-8") if file.exists() else ""
    assert layout_of(text) == layout_of(expected), f"the help has changed; to accept it: {RENEW}"


def test_no_golden_file_is_left_over() -> None:
    expected = {golden_file(command).name for command in ["", *COMMANDS]}
    assert {file.name for file in GOLDEN.glob("*.txt")} == expected, f"delete it, or {RENEW}"
