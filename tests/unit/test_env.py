"""`vico --version`, and `vico env` as a user and a program read it."""

import json
import re

import pytest

from support.processes import ROOT
from vico.cli import env
from vico.cli.main import main
from vico.cli.version import VERSION
from vico.distributed.launcher_env import RANK_VARIABLES


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """That of setup.py; in a checkout with its commit."""
    assert main(["--version"]) == 0
    assert re.fullmatch(rf"vico {VERSION}( \(commit [0-9a-f]+(, changed)?\))?\n", _out(capsys))
    assert f'version="{VERSION}"' in (ROOT / "setup.py").read_text(encoding="utf-8")


def _out(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Text, then the same facts as JSON in the last line."""
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(env, "EXTRAS", {**env.EXTRAS, "unheard": ("vico-unheard",)})
    assert main(["env"]) == 0
    text = _out(capsys)
    facts = json.loads(text.splitlines()[-1])
    assert facts["vico"].startswith(VERSION) and facts["libraries"]["torch"]
    assert facts["extras"]["unheard"] == {"vico-unheard": None}
    assert "  unheard       vico-unheard not installed\n" in text
    assert "  OMP_NUM_THREADS 1\n" in text
    assert facts["ranks"] == {"launcher": "torchrun", "RANK": "0", "WORLD_SIZE": "1"}
    assert set(facts["computed by"]) == {"bf16", "fp16", "fp32", "CUDA graphs"}
    for name, fact in facts["computed by"].items():
        assert re.search(r"\(.+\)|yes, ", fact), f"{name}: no reason"
        assert f"  {name:<14}{fact}\n" in text


def test_env_without_a_library(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for reports of broken installations, too."""

    def broken() -> list[str]:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(env, "_devices", broken)
    assert main(["env"]) == 0
    assert "devices: unknown: libcudart.so.13: cannot open" in _out(capsys)
    assert main(["env", "--jsn"]) == 2


def test_extras_are_those_of_setup() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    for extra, packages in env.EXTRAS.items():
        assert f'"{extra}": ' in setup
        assert all(f'"{package}>=' in setup for package in packages)
    named = re.findall(r'^        "(\w+)": ', setup.partition("extras_require")[2], re.M)
    assert {*named} - {"benchmarks", "dev"} == {*env.EXTRAS}
