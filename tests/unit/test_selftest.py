"""`vico selftest` as a command, without running its scenarios."""

import ast
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from faults import line_trace, scenario_mutations, scenario_store
from faults import main as selftest
from faults.drawn_mutations import MAX_SECONDS, TRACE_ALL, LineMap, Verdict, pick_tests
from faults.line_trace import NO_TEST
from faults.mutation_operators import EQUIVALENT, FILES_LEFT_OUT, Equivalent, draw, mutations
from faults.result import Result, Scale, SkippedError
from faults.scenario_mutations import BREAKS, Break
from support.errors import refusal
from support.processes import ROOT, base_environment, run_command
from vico import errors
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


SOURCE = b"""
LIMIT = 3

def f(a, b, *, steps=True):
    \"\"\"Not code: 1 < 2.\"\"\"
    assert a < 7
    if a < b and not steps:
        raise ValueError(f"{a + 1}")
    zip(a, b, strict=True)
    a.step(max(a[1:], key=len))
    log.info("step %d", 5)
    run(num_warps=8, **{"num_stages": 2}, dim=-1)
    return a.shape[-1]
"""
MUTATIONS = """
    LIMIT = 4; LIMIT = 2; steps=False; if (a <= b) and not steps:; if (a >= b) and not steps:;
    if (a < b or not steps):; if a < b and steps:; if True:; if False:; pass;
    zip(b, a, strict=True); max(a[1:]); min(a[1:], key=len); a[1 + 1:]; a[2:]; a[0:]; return None;
    run(num_warps=8, **{'num_stages': 2}); dim=-2; dim=-0; a.shape[-2]; a.shape[-0]
"""


def test_mutations_by_operator() -> None:
    """All of a small source. Docstrings, assertions and what is said to people stay as they are."""
    lines = SOURCE.decode().splitlines()
    found = mutations("f.py", SOURCE)
    texts = [mutation.apply(SOURCE).decode() for mutation in found]
    for text, mutation in zip(texts, found, strict=True):
        changed = text.splitlines()
        assert len(changed) == len(lines)
        differing = [i for i, line in enumerate(lines, start=1) if line != changed[i - 1]]
        assert differing == [mutation.line]
    for words in MUTATIONS.split(";"):
        assert any(words.strip() in text for text in texts), words
    assert len(set(texts)) == len(texts) == 25
    in_default = next(m for m in found if m.old == "True")
    assert in_default.lines == (5, 13), "the tests of the function, which has the default"
    assert next(m for m in found if m.old == "3").lines == (0, 0), "the tests of the file"


def test_drawn_mutations_are_code() -> None:
    drawn = draw(ROOT, 0, 100)
    assert len({m.operator for m in drawn}) > 10 and len({m.file for m in drawn}) > 30
    files = ("vico/errors.py",)
    assert draw(ROOT, 0, 9, files) == draw(ROOT, 0, 9, files) != draw(ROOT, 1, 9, files)
    for mutation in drawn:
        ast.parse(mutation.apply((ROOT / mutation.file).read_bytes()))
    assert all((ROOT / file).exists() for file in FILES_LEFT_OUT)


@pytest.mark.parametrize("place", EQUIVALENT, ids=lambda place: f"{place.file}: {place.old}")
def test_an_equivalent_mutation_finds_its_code(place: Equivalent) -> None:
    assert place.old in (ROOT / place.file).read_text(encoding="utf-8")


def test_a_mutation_is_tried_by_the_tests_of_its_lines() -> None:
    mutation = next(m for m in mutations("vico/f.py", SOURCE) if m.old == "a < b")
    lines = {("f.py", 7): {"slow", "fast", "failed"}, ("f.py", 8): {"other"}}
    known = LineMap(lines, {"slow": 30.0, "fast": 0.1, "other": 0.2})
    assert mutation.line == 7 and pick_tests(mutation, known) == ["fast", "slow"]
    constant = next(m for m in mutations("vico/f.py", SOURCE) if m.old == "3")
    assert pick_tests(constant, known) == ["fast", "other", "slow"]
    lines["f.py", 7].add(NO_TEST)  # it runs as the file is imported too
    assert pick_tests(mutation, known) == ["fast", "other", "slow"]


def test_files_take_turns_where_time_is_short() -> None:
    """A hundred cases of one file do not keep the one whole command out."""
    mutation = next(m for m in mutations("vico/f.py", SOURCE) if m.old == "a < b")
    seconds = {f"test_many.py::{i:03}": 1.0 for i in range(200)}
    seconds |= {"test_f.py::own": 2.0, "test_run.py::short": 60.0, "test_run.py::long": 90.0}
    picked = pick_tests(mutation, LineMap({("f.py", 7): set(seconds)}, seconds))
    assert picked[0] == "test_many.py::000" and len(picked) == 60
    assert picked[-2:] == ["test_f.py::own", "test_run.py::short"], "the fastest first"
    assert sum(seconds[test] for test in picked) == MAX_SECONDS


TRACED = """
import subprocess, sys
from vico.errors import nearest

def test_inside():
    nearest("ab", ["ac"])

def test_in_a_child():
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-k", "inside", __file__], check=True)
"""


def test_lines_are_noted_in_every_process(tmp_path: Path) -> None:
    """A line that runs in a child of a test is that test's, also where the child runs pytest."""
    (tmp_path / "sitecustomize.py").write_text(TRACE_ALL)
    (tmp_path / "test_traced.py").write_text(TRACED)
    notes = tmp_path / "lines"
    environment = base_environment(
        **{line_trace.TRACE_FILE: str(notes)},
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")]),
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "faults.line_trace"]
    run = run_command(
        [*command, "--rootdir", str(tmp_path), "test_traced.py"], tmp_path, environment
    )
    assert run.codes == [0], run.output
    tests = ["test_traced.py::test_inside", "test_traced.py::test_in_a_child"]
    assert list(line_trace.read_seconds(notes)) == tests
    source = inspect.getsourcelines(errors.nearest)
    last = source[1] + len(source[0]) - 1
    assert line_trace.read(notes)["errors.py", last] == set(tests)


def test_the_share_that_is_caught_is_judged(capsys: pytest.CaptureFixture[str]) -> None:
    mutation = mutations("vico/f.py", SOURCE)[0]
    caught = [Verdict(mutation, 1, "red", "t")] * 8 + [Verdict(mutation, 1, "time limit", "t")]
    assert not scenario_mutations._print_share([*caught, Verdict(mutation, 1, "survived")])
    said = capsys.readouterr().out
    assert "9 of 10 drawn mutations are caught (90%; goal 90%)" in said
    assert "survived: vico/f.py:2: constant: 3 -> 4" in said
    none = [Verdict(mutation, 0, "no test runs it")] * 2
    assert scenario_mutations._print_share([*caught, *none]) == [
        "only 9 of 11 drawn mutations are caught"
    ]


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
