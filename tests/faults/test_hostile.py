"""Hostile files: nothing in them is run, memory is not reserved for what they do not hold, and every reader stays on its feet.

The scenarios are the self-test's, on fewer cases.
"""

import os
import random
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import scenario_evaluation as figure_evaluation
from faults import scenario_fuzz as figure_fuzz
from faults.damage import claims, old_format
from faults.payloads import bites, payloads
from faults.scenario_pickles import DOORS, try_payload
from support.errors import refusal
from support.processes import ROOT
from support.run_fixture import FEATURES, RunFixture, make_run_fixture
from support.warm_process import WarmProcess
from vico.checkpoint import read as checkpoints
from vico.data.features import Features
from vico.errors import UserError


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmProcess]:
    with WarmProcess() as found:
        yield found


@pytest.fixture(scope="module")
def fixture(warm: WarmProcess, tmp_path_factory: pytest.TempPathFactory) -> RunFixture:
    return make_run_fixture(tmp_path_factory.mktemp("fixture") / "fixture", warm)


def test_no_code_but_one_place_loads_pickles() -> None:
    """torch's loading is in safe_load.py, always with weights_only; DeepSpeed's is never called.

    The payloads test themselves, and a rank reads what its own data workers send it, as Python's
    multiprocessing does.
    """
    pattern = re.compile(
        r"(?<!safetensors\.)\b(torch\.load|pickle\.loads?|Unpickler|weights_only=False|allow_pickle=True|load_checkpoint)\b(?=\(|$|,|\))"
    )
    paths = [*(ROOT / "vico").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    found = set()
    for path in (*paths, ROOT / "tests" / "faults" / "payloads.py"):
        names = pattern.findall(path.read_text())
        found |= {(str(path.relative_to(ROOT)), name) for name in names}
    allowed = {
        ("vico/io/safe_load.py", "torch.load"),
        ("tests/faults/payloads.py", "pickle.loads"),
        ("vico/data/dataloader.py", "pickle.loads"),
    }
    assert found == allowed
    assert "weights_only=True" in (ROOT / "vico" / "io" / "safe_load.py").read_text()


def test_payloads_bite_and_are_never_run(
    fixture: RunFixture, warm: WarmProcess, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    found = payloads(canary)
    assert len(found) >= 30
    chosen = dict(random.Random(1).sample(sorted(found.items()), 4))
    for i, (name, payload) in enumerate(chosen.items()):
        assert bites(payload, canary), name
        for door, ways in DOORS.items():
            line, target, carriers = ways[i % len(ways)]
            fault = try_payload(
                carriers[i % len(carriers)](payload),
                line,
                target,
                fixture,
                tmp_path / "case",
                canary,
                warm,
            )
            assert fault is None, (name, door, fault)


@pytest.mark.parametrize("numbers", [20_000, 2**40])
def test_tensors_are_as_large_as_their_files(
    fixture: RunFixture, tmp_path: Path, numbers: int
) -> None:
    mine = fixture.copy(tmp_path / "fixture")
    claims(FEATURES, numbers)(mine)
    assert "clipvitl14.pth: the video feature file " in refusal(Features, mine.folder / FEATURES)
    old_format("lineage.pth")(mine)
    claims("lineage.pth", 2**40)(mine)
    assert "numbers that are not all among its" in refusal(
        checkpoints.read, mine.folder / "lineage.pth"
    )


def test_evaluation_is_exact(fixture: RunFixture) -> None:
    cases = [(n, batch, ranks) for n in (0, 1, 9) for batch in (1, 3) for ranks in (1, 2, 5)]
    assert not figure_evaluation.emulate(fixture, [*cases, (33, 3, 2)])  # of all types


def test_features_that_change_during_a_run_end_it(fixture: RunFixture, tmp_path: Path) -> None:
    mine = fixture.copy(tmp_path / "fixture")
    config, inputs = figure_evaluation.open_home(mine)
    os.utime(mine.folder / FEATURES, ns=(1, 1))
    for problem in figure_evaluation.on_ranks(
        config, inputs, figure_evaluation.make_questions(), 2
    ):
        assert isinstance(
            problem, UserError
        ) and "the video feature file changed during the run; start again" in str(problem)


def test_changed_files_are_taken_or_refused(fixture: RunFixture, tmp_path: Path) -> None:
    """Two rounds over all kinds of files; the self-test goes on for ten minutes."""
    mine = fixture.copy(tmp_path / "fixture")
    every = figure_fuzz.targets(mine)
    faults: list[str] = []
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tried = figure_fuzz.fuzz(every, mine, random.Random(5), 2.0, faults.append)
    signal.signal(signal.SIGALRM, before)
    assert not faults and min(tried.values()) >= 1
