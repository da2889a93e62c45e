"""Mutations drawn from the operators: which tests run the changed line, and whether one turns red.

A traced run of the tests says which lines each of them runs, in whatever process. A mutation is
then tried in a copy of the checkout, by some of its tests, in a process that has loaded torch.
"""

import contextlib
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults import line_trace, mutation_operators
from faults.mutation_operators import Mutation
from support.processes import ROOT, Processes, base_environment
from support.warm_process import CommandResult, WarmProcess, share_out

COPIED = "vico tests launch ds_configs benchmarks .github README.md setup.py .pytest.ini".split()
# Some plugins have been imported before pytest starts.
IMPORTED = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
PYTEST = ("-q", "-p", "no:cacheprovider", *IMPORTED)
# Two processes share the traced run.
ALL_TESTS = (
    ("tests/unit",),
    ("tests/distributed", "tests/faults", "tests/e2e"),
)
# Tests that read the source itself, and would be red for any change of it.
NOT_TRACED = (
    "tests/unit/test_house.py",
    "tests/unit/test_layers.py",
    "tests/unit/test_selftest.py",
)
# At --quick: some files that are tested without a LLaMA or a second process.
QUICK_FILES = ("vico/data/bin_packing.py", "vico/data/packing.py", "vico/data/batching.py")
QUICK_TESTS = (
    ("tests/unit/test_bin_packing.py", "tests/unit/test_packing.py"),
    ("tests/unit/test_batching.py",),
)
TRACE_ALL = "from faults import line_trace\n\nline_trace.start()\n"  # a sitecustomize.py
NUMBER, QUICK_NUMBER = 100, 6
TRACE_SECONDS = 3600.0  # limit of the traced run
MAX_SECONDS = 120.0  # of the tests that try a mutation, as traced
# Limit of one of them: a mutation may loop.
MIN_TEST_SECONDS, SLOWER = 30.0, 4.0


@dataclass(frozen=True)
class LineMap:
    lines: dict[line_trace.Line, set[str]]  # the tests that run a line
    seconds: dict[str, float]  # of a test


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    num_tests: int
    how: str  # red, time limit, survived, undecided, no test runs it
    test: str = ""  # which was red
    seconds: float = 0.0

    @property
    def is_caught(self) -> bool:
        return self.how in ("red", "time limit")

    @property
    def record(self) -> dict[str, Any]:
        return {
            "mutation": self.mutation.name,
            "how": self.how,
            "test": self.test,
            "num_tests": self.num_tests,
            "seconds": round(self.seconds, 1),
        }


def copy_checkout(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, target / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, target / name)
    return target


def map_tests(folder: Path, parts: Sequence[Sequence[str]]) -> LineMap:
    """Run the tests, each part in a process of its own, and note the lines that each test runs."""
    copy = copy_checkout(folder / "traced")
    (copy / "sitecustomize.py").write_text(TRACE_ALL, encoding="utf-8")
    paths = os.pathsep.join([str(copy), str(copy / "tests")])
    notes = [folder / f"lines-{number}" for number in range(len(parts))]
    skipped = [f"--ignore={path}" for path in NOT_TRACED]
    command = [sys.executable, "-m", "pytest", *PYTEST, "-p", "faults.line_trace", *skipped]
    environments = [
        base_environment(PYTHONPATH=paths, **{line_trace.TRACE_FILE: str(path)}) for path in notes
    ]
    run = Processes([[*command, *part] for part in parts], environments, copy)
    if not set(run.wait(TRACE_SECONDS)) <= {0, 1}:  # 1: tests failed, whose lines are not used
        raise RuntimeError(f"the traced run ended with {run.codes}: {run.output[-1000:]}")
    lines: dict[line_trace.Line, set[str]] = {}
    seconds: dict[str, float] = {}
    for path in notes:
        seconds |= line_trace.read_seconds(path)
        for line, tests in line_trace.read(path).items():
            lines.setdefault(line, set()).update(tests)
    return LineMap(lines, seconds)


def pick_tests(mutation: Mutation, known: LineMap) -> list[str]:
    """Tests that run its lines and pass without it, the fastest first; MAX_SECONDS in all.

    The tests of one file check much the same, so files take turns, the test file
    of the module's own name first. Time that is left goes to tests that run another line of the
    file, if its lines also run as it is imported: what was computed then is used later.
    """
    file = mutation.file.removeprefix("vico/")
    first, last = mutation.lines
    of_file = [line for line in known.lines if line[0] == file]
    own = [line for line in of_file if first <= line[1] <= last]
    tests = set[str]().union(*(known.lines[line] for line in own))
    others = set[str]()
    if mutation.lines == (0, 0) or line_trace.NO_TEST in tests:
        others = set[str]().union(*(known.lines[line] for line in of_file)) - tests
    module = Path(file).stem
    chosen: list[str] = []
    total = 0.0
    for test in _by_turns(tests, module, known) + _by_turns(others, module, known):
        if not chosen or total + known.seconds[test] <= MAX_SECONDS:
            chosen.append(test)
            total += known.seconds[test]
    return sorted(chosen, key=lambda test: (known.seconds[test], test))


def _by_turns(tests: set[str], module: str, known: LineMap) -> list[str]:
    """The fastest test of each file, then the second fastest of each, and so on."""
    turns = Counter[str]()
    keys = {}
    for test in sorted(tests & known.seconds.keys(), key=lambda test: (known.seconds[test], test)):
        file = test.partition("::")[0]
        keys[test] = (turns[file], module not in Path(file).stem, known.seconds[test], test)
        turns[file] += 1
    return sorted(keys, key=lambda test: keys[test])


def try_all(mutations: Sequence[Mutation], known: LineMap, copies: Sequence[Path]) -> list[Verdict]:
    """One process for each copy."""
    green: dict[str, bool] = {}  # whether a test is green in a copy where nothing is broken

    def is_green(test: str, worker: WarmProcess) -> bool:
        if test not in green:
            green[test] = _run(worker, [test], known).code == 0
        return green[test]

    def try_one(mutation: Mutation, worker: WarmProcess) -> Verdict:
        tests = pick_tests(mutation, known)
        while tests:
            result = _run_broken(mutation, tests, known, worker)
            test = _red_test(result)
            if result.code == 0:
                return Verdict(mutation, len(tests), "survived", "", result.seconds)
            if test in tests and not is_green(test, worker):
                tests.remove(test)  # red in any case, when it runs alone
                continue
            how = "time limit" if "Timeout (" in result.stderr or result.code == -9 else "red"
            if how == "time limit" and _run(worker, tests, known).code != 0:
                how = "undecided: its tests exceed the time limit without it too"
            return Verdict(mutation, len(tests), how, test, result.seconds)
        return Verdict(mutation, 0, "no test runs it")

    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(WarmProcess(copy)) for copy in copies]
        return share_out(mutations, workers, try_one)


def _run_broken(
    mutation: Mutation, tests: Sequence[str], known: LineMap, worker: WarmProcess
) -> CommandResult:
    assert worker.checkout is not None
    path = worker.checkout / mutation.file
    source = path.read_bytes()
    path.write_bytes(mutation.apply(source))
    try:
        return _run(worker, tests, known)
    finally:
        path.write_bytes(source)


def _run(worker: WarmProcess, tests: Sequence[str], known: LineMap) -> CommandResult:
    assert worker.checkout is not None
    seconds = [known.seconds[test] for test in tests]
    limit = max(MIN_TEST_SECONDS, SLOWER * max(seconds))
    limits = ["-o", f"faulthandler_timeout={limit}"]
    arguments = [*PYTEST, "-x", "--tb=no", "-rfE", *limits, *tests]
    return worker.run(arguments, worker.checkout, seconds=2 * limit + SLOWER * sum(seconds))


def _red_test(result: CommandResult) -> str:
    """Its id; or the file that could not be imported."""
    match = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - .*)?$", result.stdout, re.MULTILINE)
    return match[1] if match else ""


def run(quick: bool, seed: int, folder: Path) -> list[Verdict]:
    """Draw mutations and try them."""
    number = QUICK_NUMBER if quick else NUMBER
    drawn = mutation_operators.draw(ROOT, seed, number, QUICK_FILES if quick else ())
    known = map_tests(folder, QUICK_TESTS if quick else ALL_TESTS)
    copies = [copy_checkout(folder / f"mutated-{index}") for index in range(2)]
    return try_all(drawn, known, copies)


def facts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """What is written about them."""
    operators = Counter(verdict.mutation.operator for verdict in verdicts)
    caught = Counter(verdict.mutation.operator for verdict in verdicts if verdict.is_caught)
    return {
        "share": sum(caught.values()) / len(verdicts),
        "operators": {name: f"{caught[name]} of {n}" for name, n in sorted(operators.items())},
        "mutations": [verdict.record for verdict in verdicts],
    }
