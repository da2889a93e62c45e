"""`.ci/other_python` where pip fails: without an index it ends with 77, with one it has failed."""

from pathlib import Path

import pytest

from support.processes import ROOT, clean_environment, run_command

# In place of a Python: `-m venv FOLDER` copies it, and its pip does what PIP_CAN names.
STAND_IN = """#!/bin/sh
case "$2 $3" in
venv*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"pip $PIP_CAN") ;;
*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(("pip_can", "code"), [("nothing", 77), ("download", 1)])
def test_pins_that_cannot_be_installed(tmp_path: Path, pip_can: str, code: int) -> None:
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = {**clean_environment(), "PIP_CAN": pip_can, "TMPDIR": str(tmp_path)}
    command = ["bash", str(ROOT / ".ci" / "other_python"), str(python)]
    assert run_command(command, tmp_path, environment).codes == [code]
    assert list(tmp_path.iterdir()) == [python]
