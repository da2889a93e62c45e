"""Hostile files: nothing in them is run, no memory is reserved for what they lack, no crash.

The scenarios are those of the self-test, with fewer cases.
"""

import os
import random
import re
import signal
from pathlib import Path

import pytest

from faults import fuzz_targets, scenario_evaluation, scenario_fuzz
from faults.damage import claims, old_format
from faults.payloads import bites, payloads
from faults.scenario_pickles import ENTRIES, try_payload
from support.errors import refusal
from support.processes import ROOT
from support.run_fixture import FEATURES, PUBLISHED, RunFixture, make_run_fixture
from support.warm_process import WarmProcess
from vico.checkpoint import read as checkpoints
from vico.data.features import Features
from vico.errors import UserError

LOADING = re.compile(
    r"(?<!safetensors\.)\b(torch\.load|pickle\.loads?|Unpickler|weights_only=False"
    r"|allow_pickle=True|load_checkpoint)\b(?=\(|$|,|\))"
)


@pytest.fixture(scope="module")
def original(warm: WarmProcess, tmp_path_factory: pytest.TempPathFactory) -> RunFixture:
    return make_run_fixture(tmp_path_factory.mktemp("original") / "fixture", warm)


@pytest.fixture
def copied(original: RunFixture, tmp_path: Path) -> RunFixture:
    return original.copy(tmp_path / "fixture")


def test_only_one_place_loads_pickles() -> None:
    """torch's loading is in safe_load.py, always with weights_only; DeepSpeed's is never called.

    The payloads test themselves. A rank reads what its own data workers send it, as Python's
    multiprocessing does.
    """
    paths = [*(ROOT / "vico").rglob("*.py"), *(ROOT / "launch").rglob("*.py")]
    uses = set()
    for path in (*paths, ROOT / "tests" / "faults" / "payloads.py"):
        for name in LOADING.findall(path.read_text()):
            uses.add((str(path.relative_to(ROOT)), name))
    assert uses == {
        ("vico/io/safe_load.py", "torch.load"),
        ("tests/faults/payloads.py", "pickle.loads"),
        ("vico/data/dataloader.py", "pickle.loads"),
    }
    assert "weights_only=True" in (ROOT / "vico" / "io" / "safe_load.py").read_text()


def test_payloads_bite_and_are_never_run(
    original: RunFixture, warm: WarmProcess, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    pickles = payloads(canary)
    assert len(pickles) >= 30
    chosen = dict(random.Random(1).sample(sorted(pickles.items()), 4))
    for i, (name, payload) in enumerate(chosen.items()):
        assert bites(payload, canary), name
        for command, entries in ENTRIES.items():
            entry = entries[i % len(entries)]
            content = entry.carriers[i % len(entry.carriers)](payload)
            folder = tmp_path / "case"
            fault = try_payload(content, entry.line, entry.file, original, folder, canary, warm)
            assert fault is None, (name, command, fault)


@pytest.mark.parametrize("numbers", [20_000, 2**40])
def test_tensors_are_as_large_as_their_files(copied: RunFixture, numbers: int) -> None:
    claims(FEATURES, numbers)(copied)
    message = refusal(Features, copied.folder / FEATURES)
    assert "clipvitl14.pth: the video feature file " in message
    old_format(PUBLISHED)(copied)
    claims(PUBLISHED, 2**40)(copied)
    message = refusal(checkpoints.read, copied.folder / PUBLISHED)
    assert "numbers that are not all among its" in message


def test_evaluation_is_exact(original: RunFixture) -> None:
    cases = [(33, 3, 2)]  # of all types
    for num_questions in (0, 1, 9):
        for batch in (1, 3):
            cases += [(num_questions, batch, ranks) for ranks in (1, 2, 5)]
    assert scenario_evaluation.emulate(original, cases) == []


def test_features_that_change_during_a_run_end_it(copied: RunFixture) -> None:
    config, inputs = scenario_evaluation.read_fixture(copied)
    os.utime(copied.folder / FEATURES, ns=(1, 1))
    questions = scenario_evaluation.make_questions()
    for problem in scenario_evaluation.evaluate_on_ranks(config, inputs, questions, 2):
        assert isinstance(problem, UserError)
        assert "the video feature file changed during the run; start again" in str(problem)


def test_fuzzed_files_are_taken_or_refused(copied: RunFixture) -> None:
    """Two seconds over all kinds of files; the self-test takes ten minutes."""
    fuzz_targets.add_files(copied)
    faults: list[str] = []
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    tried = scenario_fuzz.fuzz(copied, random.Random(5), 2.0, faults.append)
    signal.signal(signal.SIGALRM, before)
    assert faults == [] and min(tried.values()) >= 1
