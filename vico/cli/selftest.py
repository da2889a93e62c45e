"""`vico selftest`: hands over to the fault injection of a checkout, tests/faults/."""

import importlib
import sys
from pathlib import Path

from vico.errors import UserError

TESTS = Path(__file__).resolve().parents[2] / "tests"


def main(argv: list[str]) -> int:
    """Run the scenarios; returns the exit code. Raises UserError where there is no checkout around this package."""
    if not (TESTS / "faults" / "main.py").is_file():
        raise UserError(
            f"vico selftest: {TESTS / 'faults'} is not there; run it from a checkout of ViCo, not from an installed package"
        )
    sys.path.insert(0, str(TESTS))
    code: int = importlib.import_module("faults.main").main(argv)
    return code
