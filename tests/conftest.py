"""Fixtures of all tests."""

import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent)]

from support.processes import STARTED, forked_ranks  # noqa: E402
from support.toy_dataset import ToyData  # noqa: E402
from vico.distributed import world  # noqa: E402
from vico.distributed.world import World, connect  # noqa: E402

# On a busy machine an example of a millisecond may take any time.
settings.register_profile("without deadline", settings.default, deadline=None)
settings.load_profile("without deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse an id with an address in it: the processes that share the tests would not agree."""
    unstable = [item.nodeid for item in items if " at 0x" in item.nodeid]
    if unstable:
        raise pytest.UsageError(f"{unstable[0]}: give its parameters ids")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """End the processes that a failed test has left, or the next test is blamed for them."""
    before = set(STARTED)
    try:
        return (yield)
    finally:
        for run in set(STARTED) - before:
            if not run.codes:  # nobody waited for its end
                run.kill()


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The cache is not the user's. DeepSpeed, whichever test imports it, knows the device."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with forked_ranks():
        yield


@pytest.fixture(scope="session")
def alone() -> World:
    """A world of one rank, shared by all tests: DeepSpeed connects once per process."""
    return connect()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, alone: World) -> None:
    """DeepSpeed connects once per process, so the commands of a test share a world of one rank."""
    monkeypatch.setattr(world, "connect", lambda *_: alone)
    monkeypatch.setattr(world, "disconnect", lambda world, together: None)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    """A toy data set for tests that only read it."""
    return ToyData(tmp_path_factory.mktemp("toy"))
