"""`vico selftest` as a command, without running its scenarios."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from faults import main as selftest
from faults import scenario_mutations, scenario_store
from faults.result import Result, Scale, SkippedError
from faults.scenario_mutations import BREAKS, Break
from support.errors import refusal
from support.processes import ROOT
from vico.cli import selftest as command


@pytest.mark.parametrize("case", BREAKS, ids=lambda case: case.what)
def test_a_mutation_finds_its_code_and_test(case: Break) -> None:
    """Fails when a rename in the package leaves BREAKS behind."""
    assert (ROOT / case.file).read_text(encoding="utf-8").count(case.old) == 1
    file, _, name = case.test.partition("::")
    functions = [
        node.name
        for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    ]
    assert functions.count(name) == 1


def test_scenarios_describe_themselves() -> None:
    for name in selftest.SCENARIOS:
        scenario = selftest._load_scenario(name)
        assert name == scenario.NAME
        assert len(scenario.TITLE) < 90 and "\n" not in scenario.TITLE
        quick, full = scenario.MINUTES
        assert quick > 0 and full >= quick


def test_results_and_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A skipped scenario is counted apart; one that fails makes the exit code 1."""

    def skip(scale: Scale) -> Result:
        raise SkippedError("no tool")

    monkeypatch.setattr(scenario_mutations, "run", skip)
    monkeypatch.setattr(scenario_store, "run", lambda scale: Result(3, 3))
    arguments = ["--quick", "--only", "store", "mutations", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "   3 of 3 in 0 s" in lines and "   skipped: no tool" in lines
    results: dict[str, Any] = json.loads(lines[-1])
    assert results["store"]["passed"] == results["store"]["of"] == 3
    assert results["mutations"]["skipped"] == "no tool" and results["mutations"]["of"] == 0
    monkeypatch.setattr(scenario_store, "run", lambda scale: Result(2, 3, {"failures": ["x"]}))
    assert command.main(arguments) == 1
    assert "   failed: x\n   2 of 3 in 0 s: FAILED\n" in capsys.readouterr().out
    assert command.main(["--table", "--out", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    assert "| 2 of 3 | quick |" in table and "| skipped | quick |" in table


def test_mutations_need_the_development_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenario_mutations, "find_spec", lambda name: None)
    with pytest.raises(SkippedError, match="need pytest and hypothesis"):
        scenario_mutations.run(Scale(quick=True, seed=0, folder=tmp_path))


def test_mistakes_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = refusal(command.main, ["--only", "stor"])
    assert message.startswith("--only stor: no such scenario; did you mean 'store'?")
    monkeypatch.setattr(command, "TESTS", tmp_path)
    assert "run it in a checkout of ViCo" in refusal(command.main, [])
