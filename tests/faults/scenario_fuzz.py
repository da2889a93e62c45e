"""Files changed at random: every reader takes them or refuses them in one line, and never fails."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from faults.fuzz_targets import TARGETS, Target, add_files
from faults.result import Result, Scale
from support.processes import ROOT, Processes, start_command
from support.run_fixture import RunFixture, make_run_fixture
from support.warm_process import WarmProcess
from vico.checkpoint import format
from vico.errors import UserError

NAME = "fuzz"
TITLE = "fuzzed tables, JSON, YAML, headers and .pth bytes: taken, or refused in one line"
MINUTES = (0.5, 10.2)
SECONDS = {True: 25.0, False: 600.0}
NUM_PROCESSES = 2
MAX_SECONDS_OF_A_FILE = 10.0
MAX_LINE_LENGTH = 1500
MAX_FAILURES = 50
LOG = "fuzz.jsonl"
TOKENS = (
    b'" NaN \n [[ { } ] , : null 1e999 \\ud800 \0 \r \xff\xfe \xef\xbb\xbf -1 99999999999999999999 '
    b"true ../../x \x1b[2J <html> PK\x03\x04 &a *a !!python/name:os.system"
).split(b" ")
NUMBERS: list[Any] = [None, True, -1, 0, 10**30, 1e308, 0.5]
TEXTS: list[Any] = ["", "x" * 3000, "\ud800", "../../x", "nan", "\n\x1b[2J"]
VALUES: list[Any] = [*NUMBERS, *TEXTS, [], {}, [[[]]], {"a": None}]


def run(scale: Scale) -> Result:
    with WarmProcess() as warm:
        fixture = make_run_fixture(scale.folder / "fixture", warm)
    add_files(fixture)
    failures = []
    for name, target in TARGETS.items():
        if fault := _find_fault(target, fixture.folder, must_read=True):
            failures.append(f"{name}: {fault}, though nothing is wrong")
    seconds = SECONDS[scale.quick]
    children = []
    for i in range(NUM_PROCESSES):
        copy = fixture.copy(scale.folder / str(i))
        children.append(_start(copy, f"{scale.seed} {i}", seconds))
    tried = dict.fromkeys(TARGETS, 0)
    for i, child in enumerate(children):
        (code,) = child.wait(seconds + 60)
        lines = (scale.folder / str(i) / LOG).read_text(encoding="utf-8").splitlines()
        for record in map(json.loads, lines):
            for name, number in record.get("tried", {}).items():
                tried[name] += number
            if "fault" in record:
                failures.append(record["fault"])
        if code != 0:
            failures.append(f"process {i} was ended by {code}; the file it was at is lost")
    total = max(1, sum(tried.values()), len(failures))
    facts = {"files_tried": tried, "seed": scale.seed, "failures": failures[:MAX_FAILURES]}
    return Result(total - len(failures), total, facts)


def _start(fixture: RunFixture, seed: str, seconds: float) -> Processes:
    """A process of its own that tries files for so long: a crash costs one process, and is seen."""
    arguments = [str(fixture.folder), seed, str(seconds)]
    return start_command([sys.executable, "-m", "faults.scenario_fuzz", *arguments], cwd=ROOT)


def main(folder: Path, seed: str, seconds: float) -> None:
    signal.signal(signal.SIGALRM, _raise_timeout)
    with (folder / LOG).open("w", encoding="utf-8") as log:

        def report(fault: str) -> None:
            _write(log, {"fault": fault})

        tried = fuzz(RunFixture(folder), random.Random(seed), seconds, report)
        _write(log, {"tried": tried})


def _write(log: TextIO, record: dict[str, Any]) -> None:
    log.write(json.dumps(record) + "\n")
    log.flush()


def _raise_timeout(number: int, frame: object) -> NoReturn:
    raise TimeoutError(f"took more than {MAX_SECONDS_OF_A_FILE:.0f} s")


def fuzz(
    fixture: RunFixture, rng: random.Random, seconds: float, report: Callable[[str], None]
) -> dict[str, int]:
    """Try files in turn for so long; returns how many of each kind. `add_files` comes first."""
    contents = {name: (fixture.folder / t.file).read_bytes() for name, t in TARGETS.items()}
    tried, deadline = dict.fromkeys(TARGETS, 0), time.monotonic() + seconds
    parent = os.getppid()
    # Without its parent, no one waits for the result.
    while time.monotonic() < deadline and os.getppid() == parent:
        for name, target in TARGETS.items():
            content = mutate(contents[name], target, rng)
            path = fixture.folder / target.file
            path.write_bytes(content)
            signal.setitimer(signal.ITIMER_REAL, MAX_SECONDS_OF_A_FILE)
            fault = _find_fault(target, fixture.folder)
            signal.setitimer(signal.ITIMER_REAL, 0)
            path.unlink()  # not overwritten: it may still be mapped
            path.write_bytes(contents[name])
            tried[name] += 1
            if fault is not None:
                report(f"{name}: {fault}, of {content[:400].hex()}")
    return tried


def _find_fault(target: Target, folder: Path, must_read: bool = False) -> str | None:
    """What is wrong with how the file is read; `must_read`: a refusal is wrong, too."""
    try:
        target.read(folder)
    except UserError as refusal:
        text = str(refusal)
        if must_read:
            return f"refused ({text})"
        if len(text) >= MAX_LINE_LENGTH:
            return f"a line of {len(text)} characters: {text[:200]}"
    except BaseException as problem:
        return f"{type(problem).__name__}: {str(problem)[:200]}"
    return None


def mutate(content: bytes, target: Target, rng: random.Random) -> bytes:
    if target.is_json and rng.random() < 0.5:
        content = _mutate_json(content, target.with_checksum, rng)
        if rng.random() < 0.7:
            return content
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        content = _mutate_bytes(content, rng)
    return content


def _mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(content) + 1), rng.choice((0, 1, 2, 8, 200, 5000))
    if rng.random() < 0.3:  # headers and directories are at the ends
        near_start = rng.randrange(min(200, len(content) + 1))
        near_end = max(0, len(content) - rng.randrange(200))
        at = rng.choice((near_start, near_end))
    before, behind = content[:at], content[at:]
    kind = rng.randrange(5)
    if kind == 0 and behind:
        return before + bytes([behind[0] ^ 1 << rng.randrange(8)]) + behind[1:]
    if kind == 1:
        return before
    if kind == 2:
        return before + rng.choice(TOKENS) + behind[size:]
    if kind == 3:
        return before + rng.randbytes(size) + behind
    return before + behind[size:]


def _mutate_json(content: bytes, with_checksum: bool, rng: random.Random) -> bytes:
    """A value or key of a JSON text replaced by another; a state.json gets a valid checksum."""
    value = json.loads(content)
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    node, key = rng.choice(places)
    if isinstance(node, dict) and rng.random() < 0.3:
        moved = node.pop(key)
        if rng.random() < 0.5:
            node[rng.choice(["x", "", "\n", "../x"])] = moved
    else:
        node[key] = rng.choice([*VALUES, rng.choice(places)[1]])
    if with_checksum:
        value.pop("sha256", None)
        return format.with_checksum(value).encode()
    return json.dumps(value).encode()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
