import os
import sys
from pathlib import Path

import pytest
import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

from support.toy_dataset import ToyData  # noqa: E402
from vico.distributed import world as ranks  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What starts remember is kept apart from the user's; DeepSpeed, whichever test imports it first, need not guess the device."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def alone() -> ranks.World:
    """A world of one rank. DeepSpeed connects once per process, so all commands that run in this one share it."""
    return ranks.connect()


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """One world for all tests that only read it."""
    return ToyData(tmp_path_factory.mktemp("world"))
