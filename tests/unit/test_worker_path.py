"""Where data workers find ViCo: that of this process, and nothing in front of Python's own."""

import os
import sysconfig
from pathlib import Path

import pytest

from vico.data import dataloader
from vico.distributed import signals


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dataloader.resource_tracker, dataloader.forkserver):
        monkeypatch.setattr(module, "ensure_running", lambda: None)
    for name in ("PYTHONPATH", "PYTHONWARNINGS", "PYTHONSAFEPATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(signals, "BLOCKED", ())


@pytest.mark.parametrize(
    ("parent", "given", "expected"),
    [
        ("/a/checkout", "", "/a/checkout"),
        ("/a/checkout", "/b", f"/a/checkout{os.pathsep}/b"),
        ("/a/checkout", f"/b{os.pathsep}/a/checkout", f"/b{os.pathsep}/a/checkout"),
        (sysconfig.get_path("purelib"), "/b", "/b"),  # `pip install .`
    ],
)
def test_python_path(
    parent: str, given: str, expected: str, no_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", given)
    monkeypatch.setattr(dataloader, "__file__", str(Path(parent, "vico", "data", "dataloader.py")))
    dataloader.start_forkserver()
    assert os.environ["PYTHONPATH"] == expected
