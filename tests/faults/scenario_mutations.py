"""Our own code, broken on purpose in a copy of the checkout: each break must turn the test red that is there against it."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from faults.result import Result, Scale
from vico.errors import UserError

NAME = "mutations"
TITLE = "deliberate breakages of our own code, each of which turns a test red"
MINUTES = (0.4, 6.0)
ROOT = Path(__file__).resolve().parents[2]
COPIED = ("vico", "tests", "launch", "ds_configs", "setup.py", ".pytest.ini")
SECONDS = 300.0  # for one test; one that runs into it has not turned red


@dataclass(frozen=True)
class Break:
    what: str
    file: str
    old: str  # stands there once
    new: str
    test: str


CUT_IN_TWO = "tests/e2e/test_resuming.py::test_a_run_cut_in_two_is_the_run"
ORDER = "tests/faults/test_store.py::test_all_is_on_the_disk_before_it_bears_its_name"
BREAKS = (
    Break(
        "no file is flushed",
        "vico/io/atomic.py",
        "            os.fsync(file.fileno())\n    _flush",
        "            pass\n    _flush",
        ORDER,
    ),
    Break(
        "the manifest is ignored",
        "vico/checkpoint/read.py",
        "hashlib.sha256(data).hexdigest() != recorded",
        "hashlib.sha256(data).hexdigest() == recorded",
        "tests/unit/test_checkpoint.py::test_a_flipped_bit_is_found",
    ),
    Break(
        "pruned before it is verified",
        "vico/checkpoint/read.py",
        '    save(output_dir / f"checkpoint-{progress.step}",',
        '    prune(output_dir, 0, progress.step)\n    save(output_dir / f"checkpoint-{progress.step}",',
        "tests/faults/test_store.py::test_nothing_goes_before_what_replaces_it_was_read_back",
    ),
    Break(
        "copied in place, not renamed",
        "vico/io/atomic.py",
        "        temporary.rename(target)\n",
        "        shutil.copytree(temporary, target)\n",
        ORDER,
    ),
    Break(
        "accuracy as the mean over groups",
        "vico/train/evaluate.py",
        "float(right.sum() / len(right))",
        "float(np.mean([r / n for r, n in counts.values()]))",
        "tests/faults/test_store.py::test_an_accuracy_is_a_count_of_questions",
    ),
    Break(
        "the order of questions from no seed",
        "vico/data/batching.py",
        "default_rng([self._seed, epoch])",
        "default_rng()",
        "tests/distributed/test_engine.py::test_order_is_a_function_of_seed_and_epoch_and_ranks_divide_it",
    ),
    Break(
        "a loss that is not finite is let through",
        "vico/train/loop.py",
        "_require_finite(~found_RT.isfinite().all(dim=1)",
        "_require_finite(torch.zeros(world.size, dtype=torch.bool)",
        "tests/distributed/test_engine.py::test_a_loss_or_gradient_that_is_not_finite_updates_nothing",
    ),
    Break(
        "a checkpoint of another run is taken",
        "vico/checkpoint/read.py",
        'if run and state.get("run", run) != run:',
        "if False:",
        "tests/faults/test_store.py::test_a_checkpoint_of_another_run_is_not_this_ones",
    ),
    Break(
        "the place in the data is forgotten",
        "vico/train/loop.py",
        "for k in range(progress.step, last_step)]",
        "for k in range(last_step - progress.step)]",
        CUT_IN_TWO,
    ),
    Break(
        "Adam's first moment is dropped",
        "vico/train/engine.py",
        'moments[f"{name}.{moment}"], moment)',
        'moments[f"{name}.{moment}"] * (moment != "exp_avg"), moment)',
        CUT_IN_TWO,
    ),
    Break(
        "the wrong rank writes",
        "vico/train/loop.py",
        "        if not run.world.is_main:\n            return\n        if first",
        "        if run.world.is_main:\n            return\n        if first",
        CUT_IN_TWO,
    ),
    Break(
        "the lock is not taken",
        "vico/io/output_dir.py",
        "        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        "tests/faults/test_stopping.py::test_a_second_writer_is_refused_and_a_dead_ones_place_is_free",
    ),
)
QUICK = 3  # the first ones, whose tests are the fastest


def run(scale: Scale) -> Result:
    if (
        not (ROOT / "tests").is_dir()
        or subprocess.run(
            [sys.executable, "-c", "import pytest"], capture_output=True, check=False
        ).returncode
    ):
        raise UserError(
            "mutations: this scenario runs tests; start it in a checkout made by 'bash launch/environment.sh --dev'"
        )
    breaks = BREAKS[:QUICK] if scale.quick else BREAKS
    copy = scale.folder / "copy"
    copy.mkdir()
    for name in COPIED:
        source = ROOT / name
        shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(
            source, copy / name
        )
    failures = []
    whole = _ended(copy, sorted({b.test for b in breaks}))
    if whole != "green":
        return Result(
            0,
            len(breaks),
            {"failures": [f"the unbroken copy is not green, so nothing follows: {whole}"]},
        )
    for b in breaks:
        path = copy / b.file
        text = path.read_text(encoding="utf-8")
        if text.count(b.old) != 1:
            failures.append(f"{b.what}: what it would break is no longer in {b.file}")
            continue
        path.write_text(text.replace(b.old, b.new), encoding="utf-8")
        if (how := _ended(copy, [b.test])) != "red":
            failures.append(f"{b.what}: {b.test} is not red: {how}")
        path.write_text(text, encoding="utf-8")
    return Result(
        len(breaks) - len(failures),
        len(breaks),
        {"failures": failures, "breaks": {b.what: b.test for b in breaks}},
    )


def _ended(copy: Path, tests: list[str]) -> str:
    """green, red, or what else became of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        ended = subprocess.run(
            command,
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS * len(tests),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "it ran into its time"
    said = {0: "green", 1: "red"}.get(ended.returncode)
    return said or f"pytest ended with {ended.returncode}: {ended.stdout[-300:]}"
