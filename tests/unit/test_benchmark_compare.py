"""`benchmarks/run.sh compare`: two records of one machine, and a threshold."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run
from benchmarks.paths import RESULTS

CPU = RESULTS / "cpu-2026-11-27T030414Z.json"
GPUS = sorted(RESULTS.glob("gpu-*.json"))


def changed(folder: Path, factor: float, rename: str = "fast") -> Path:
    """The committed CPU record with another speed of fast and another peak of its memory."""
    record = json.loads(CPU.read_text())
    for geometry in record["geometries"].values():
        metrics = geometry["figures"].pop("fast")
        metrics["real_tokens_per_second"]["median"] *= factor
        geometry["figures"][rename] = metrics
    path = folder / "new.json"
    path.write_text(json.dumps(record))
    return path


def compare(capfd: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], str]:
    """(exit code, the JSON object that the output ends with, everything before it)."""
    code = run.main(["compare", *map(str, words)])
    *lines, last = capfd.readouterr().out.splitlines()
    return code, json.loads(last), "\n".join(lines)


@pytest.mark.parametrize(
    ("factor", "threshold", "code", "worse", "better"),
    [
        (1.0, 5, 0, 0, 0),
        (0.96, 5, 0, 0, 0),
        (0.94, 5, 1, 2, 0),
        (0.94, 7, 0, 0, 0),
        (1.06, 5, 0, 0, 2),
        (0.0, 5, 1, 2, 0),
    ],
)
def test_threshold(
    factor: float,
    threshold: float,
    code: int,
    worse: int,
    better: int,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    found, compared, text = compare(capfd, CPU, changed(tmp_path, factor), "--threshold", threshold)
    assert found == code
    assert (len(compared["worse"]), len(compared["better"])) == (worse, better)
    assert compared["compared"] >= 20 and not compared["only_old"] + compared["only_new"]
    assert text.count("wide, fast: real_tokens_per_second") == (1 if worse or better else 0)


def test_missing_figures(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A figure of one record alone is listed and is no failure."""
    code, compared, text = compare(capfd, CPU, changed(tmp_path, 1.0, rename="faster"))
    assert code == 0
    assert "wide, fast: real_tokens_per_second" in compared["only_old"]
    assert "wide, faster: real_tokens_per_second" in compared["only_new"]
    assert f"only in {CPU.name}: wide, fast: questions_per_second" in text


def test_more_memory_is_worse(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    record = json.loads(CPU.read_text())
    record["memory"]["fast"]["growth_mib"] *= 1.2
    (tmp_path / "new.json").write_text(json.dumps(record))
    code, compared, _ = compare(capfd, CPU, tmp_path / "new.json")
    assert code == 1 and list(compared["worse"]) == ["memory fast: growth_mib"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "node"}, "suite node, and suite cpu in"),
        ({"hardware": {"cpu": "Other", "cores": 2}}, "machine Other, 2 cores, and machine"),
        ({"config": {"questions": 4}}, "--questions 4, and --questions 8 in"),
        ({"equal": False}, "did not compute the same"),
        ({"geometries": {}, "memory": {}}, "no figure in common"),
        ({"suite": "none"}, "is no record of a suite"),
    ],
)
def test_refuses(
    change: dict[str, Any], message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Records of other work are one line, with exit code 2."""
    record = json.loads(CPU.read_text())
    config = record["config"] | change.pop("config", {})
    (tmp_path / "new.json").write_text(json.dumps(record | {"config": config} | change))
    assert run.main(["compare", str(CPU), str(tmp_path / "new.json")]) == 2
    err = capfd.readouterr().err
    assert message in err and err.count("\n") == 1


def test_other_card(capfd: pytest.CaptureFixture[str]) -> None:
    assert run.main(["compare", *map(str, GPUS)]) == 2
    assert "machine 1 x NVIDIA H200" in capfd.readouterr().err
    assert run.main(["compare", str(CPU), str(CPU), "--threshold", "nan"]) == 2
    assert "--threshold nan" in capfd.readouterr().err
