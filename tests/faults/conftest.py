"""Fixtures of tests/faults."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.interrupted import train_command
from support.processes import succeeds
from support.toy_dataset import ToyData
from support.warm_process import WarmProcess


@pytest.fixture(scope="session")
def undisturbed(toy: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output_dir of a run on two ranks that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    succeeds(*train_command(toy, 2, out), ranks=2)
    return out


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmProcess]:
    """For commands of one rank: it has loaded torch and DeepSpeed."""
    with WarmProcess() as process:
        yield process
