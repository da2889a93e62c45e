"""`vico selftest`: runs the fault scenarios of a checkout, tests/faults/main.py."""

import importlib
import sys
from pathlib import Path

from vico.errors import UserError

TESTS = Path(__file__).resolve().parents[2] / "tests"


def main(argv: list[str]) -> int:
    """Run the scenarios; returns the exit code. Raises UserError outside a checkout."""
    if not (TESTS / "faults" / "main.py").is_file():
        raise UserError(
            f"vico selftest: there is no {TESTS / 'faults'}; "
            "run it in a checkout of ViCo, not from an installed package"
        )
    sys.path.insert(0, str(TESTS))
    code: int = importlib.import_module("faults.main").main(argv)
    return code


if __name__ == "__main__":  # `python -m vico.cli.selftest`, or this file
    from vico.cli.main import console

    console(command="selftest")
