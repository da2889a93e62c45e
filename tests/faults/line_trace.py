"""Which test runs which line of the package, in its own process or in one that it starts.

`start()` in a copy's sitecustomize.py traces all its Python processes. With `-p faults.line_trace`
pytest names the running test in an environment variable, which they inherit, and writes how each
test ended. Pytest's own variable would not do: a test may run pytest.
"""

import fcntl
import os
import sys
import threading
import typing
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

TRACE_FILE = "VICO_TRACE_FILE"  # a variable: where lines are noted; nothing is traced without it
TEST = "VICO_TRACED_TEST"  # its id
REPORTS = ".reports"
NO_TEST = ""
MIN_DESCRIPTOR = 64
# A file of the package and a line of it.
Line = tuple[str, int]


class Report(typing.Protocol):
    """What is read of pytest's."""

    nodeid: str
    outcome: str
    duration: float


class _Tracer:
    """Notes each line of `folder` once for each test."""

    def __init__(self, folder: Path, notes: int) -> None:
        self._prefix, self._notes = f"{folder}{os.sep}", notes
        self._seen: set[tuple[str, str, int]] = set()

    def call(self, frame: FrameType, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        # Lines of a module's body belong to no test: the first that imports it runs them.
        if not name.startswith(self._prefix) or frame.f_code.co_name == "<module>":
            return None
        test = os.environ.get(TEST, NO_TEST)
        file, seen, notes = name[len(self._prefix) :], self._seen, self._notes

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            noted = (test, file, frame.f_lineno)
            if noted not in seen:
                seen.add(noted)
                os.write(notes, f"{test}\t{file}\t{frame.f_lineno}\n".encode())
            return line

        return line


_trace: list[Callable[[FrameType, str, Any], Any]] = []  # that of this process, once it is traced


def start() -> None:
    """Trace this process, its threads and the processes that it forks from now on."""
    path = os.environ.get(TRACE_FILE)
    if path is None:
        return
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # Not a standard stream's number, where a test has closed that stream.
    notes = fcntl.fcntl(opened, fcntl.F_DUPFD_CLOEXEC, MIN_DESCRIPTOR)
    os.close(opened)
    package = Path(__file__).resolve().parents[2] / "vico"
    _trace.append(_Tracer(package, notes).call)
    threading.settrace(_trace[0])
    sys.settrace(_trace[0])


def pytest_runtest_logstart(nodeid: str) -> None:
    """Before each test: Python ends the tracing of a thread that overflows its stack."""
    os.environ[TEST] = nodeid
    sys.settrace(_trace[0])


def pytest_runtest_logreport(report: Report) -> None:
    """Of a test's set-up, call and tear-down."""
    with open(os.environ[TRACE_FILE] + REPORTS, "a", encoding="utf-8") as file:
        print(report.nodeid, report.outcome, report.duration, sep="\t", file=file)


def read(path: Path) -> dict[Line, set[str]]:
    """The tests that run each line; NO_TEST: it runs as a file is imported before the tests."""
    tests: dict[Line, set[str]] = defaultdict(set)
    for note in path.read_text(encoding="utf-8").splitlines():
        test, file, line = note.split("\t")
        tests[file, int(line)].add(test)
    return tests


def read_seconds(path: Path) -> dict[str, float]:
    """The seconds of the tests that passed, their set-up included."""
    seconds: dict[str, float] = defaultdict(float)
    failed = set()
    reports = path.with_name(path.name + REPORTS)
    for report in reports.read_text(encoding="utf-8").splitlines():
        test, outcome, duration = report.split("\t")
        seconds[test] += float(duration)
        if outcome != "passed":
            failed.add(test)
    return {test: time for test, time in seconds.items() if test not in failed}
