"""Clocks and power of GPUs, from a program in place of nvidia-smi."""

import time
from pathlib import Path

import pytest

from benchmarks.measure.hardware import gpu_state, hardware, watched_gpus
from benchmarks.report.markdown import Section
from benchmarks.report.tables import add_gpu_samples


def test_gpu_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clocks and power are what nvidia-smi prints, by GPU; "n/a" where it does not run."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_state() == {"gpu_state": "n/a"}
    line = "555.1, 1755 MHz, 1980 MHz, 650.10 W, 700.00 W, 60, 0x0000000000000004"
    program.write_text(f"#!/bin/sh\necho '{line}'\necho '{line}'\n", encoding="utf-8")
    program.chmod(0o755)
    state = gpu_state()["gpu_state"]
    assert len(state) == 2 and state[1]["power.draw"] == "650.10 W"
    program.write_text("#!/bin/sh\nexit 9\n", encoding="utf-8")
    assert gpu_state() == {"gpu_state": "n/a"}
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    assert hardware()["nccl_environment"]["NCCL_DEBUG"] == "WARN"


def test_watched_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nvidia-smi prints during the block, by GPU; a line that was cut off is left out."""
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    with watched_gpus() as samples:
        pass
    assert samples == {"gpu_samples": "n/a"}
    lines = (
        "0, 1755, 650.5, 60, 0x04",
        "1, 1980, [N/A], 50, 0x00",
        "0, 1500, 600, 61, 0x00",
        "0, 1",
    )
    text = "\n".join(lines)
    program.write_text(f"#!/bin/sh\necho '{text}'\nexec /bin/sleep 9\n", encoding="utf-8")
    program.chmod(0o755)
    with watched_gpus() as samples:
        time.sleep(0.3)
    by_gpu = samples["gpu_samples"]
    assert by_gpu["0"]["clocks.sm"] == {"min": 1500.0, "median": 1627.5, "max": 1755.0}
    assert by_gpu["0"]["samples"] == 2 and by_gpu["1"]["power.draw"] == "n/a"
    assert by_gpu["0"]["clocks_throttle_reasons.active"] == ["0x00", "0x04"]
    section = Section()
    add_gpu_samples(section, {"training both": by_gpu, "an old record": None})
    assert "1500, 1628, 1755" in "\n".join(section.lines)
    with watched_gpus(watches=False) as samples:
        assert samples == {}
