"""Our own code, broken on purpose in a copy of the checkout: each break must turn a test red.

BREAKS are made by hand, one for each promise. The other breaks are drawn by --seed from the
operators of mutation_operators.py. At full scale a share of them must be caught; those that are not
are named. The few of the quick scale are no measure: their share is printed only.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from faults import drawn_mutations
from faults.drawn_mutations import Verdict, copy_checkout
from faults.result import Result, Scale, SkippedError
from support.processes import clean_environment, run_command

NAME = "mutations"
TITLE = "our own code broken by hand and by drawn operators turns a test red"
MINUTES = (0.5, 40.0)
SECONDS = 300.0  # for one test; a test that exceeds it is not red
DEVELOPMENT_TOOLS = ("pytest", "hypothesis")


@dataclass(frozen=True)
class Break:
    what: str
    file: str
    old: str  # occurs once in it
    new: str
    test: str


CUT_IN_TWO = "tests/e2e/test_resuming.py::test_a_run_cut_in_two_is_the_run"
ORDER = "tests/faults/test_store.py::test_files_are_flushed_before_the_rename"
TIES = "tests/unit/test_evaluate.py::test_of_equals_the_first_is_taken"
BREAKS = (
    Break(
        "no file is flushed",
        "vico/io/atomic.py",
        "        os.fsync(file.fileno())\n",
        "        pass\n",
        ORDER,
    ),
    Break(
        "the manifest is ignored",
        "vico/checkpoint/read.py",
        "digest != recorded",
        "digest == recorded",
        "tests/unit/test_checkpoint.py::test_flipped_bit",
    ),
    Break(
        "pruned before it is verified",
        "vico/checkpoint/write.py",
        "    save(output_dir.checkpoint(state.step),",
        "    prune(output_dir, 0, state.step)\n    save(output_dir.checkpoint(state.step),",
        "tests/faults/test_store.py::test_old_checkpoints_go_after_the_new_is_read_back",
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
        "tests/unit/test_evaluate.py::test_an_accuracy_is_a_count_of_questions",
    ),
    Break(
        "the last of equal options is chosen",
        "vico/train/evaluate.py",
        "int(np.argmin(row))",
        "len(row) - 1 - int(np.argmin(row[::-1]))",
        TIES,
    ),
    Break(
        "the last of equal epochs is the best",
        "vico/train/loop.py",
        "accuracy > best",
        "accuracy >= best",
        TIES,
    ),
    Break(
        "a logit of half precision is 2 % too large",
        "vico/model/ops/autograd.py",
        "linear(h_CD, weight_WD).float()",
        "linear(h_CD, weight_WD).float() * 1.02",
        "tests/unit/test_half_precision.py::test_scores_of_a_trained_model",
    ),
    Break(
        "dialogue is dropped",
        "vico/data/prompts.py",
        "dialogue=self._shorten_dialogue(question.dialogue, budget)",
        'dialogue=""',
        "tests/unit/test_shortening.py::test_much_is_kept",
    ),
    Break(
        "the order of questions from no seed",
        "vico/data/epoch_order.py",
        "default_rng([self._seed, epoch])",
        "default_rng()",
        "tests/unit/test_batching.py::test_ranks_divide_a_step",
    ),
    Break(
        "a loss that is not finite is let through",
        "vico/train/step.py",
        "_require_finite(~sums_and_stop_RT.isfinite().all(dim=1)",
        "_require_finite(torch.zeros(world.size, dtype=torch.bool)",
        "tests/distributed/test_engine.py::test_non_finite_step_updates_nothing",
    ),
    Break(
        "a checkpoint of another run is taken",
        "vico/checkpoint/read.py",
        'if run and record.get("run", run) != run:',
        "if False:",
        "tests/faults/test_store.py::test_a_checkpoint_of_another_run_is_passed_over",
    ),
    Break(
        "the place in the data is forgotten",
        "vico/train/loop.py",
        "range(run.state.step, run.last_step)",
        "range(run.last_step - run.state.step)",
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
        "        if not run.world.is_main:\n            return\n",
        "        if run.world.is_main:\n            return\n",
        CUT_IN_TWO,
    ),
    Break(
        "the lock is not taken",
        "vico/io/output_dir.py",
        "        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        "tests/faults/test_resume_checks.py::test_a_second_writer_is_refused",
    ),
)
QUICK = 3  # the first ones have the fastest tests
MIN_SHARE = 0.9  # of the drawn mutations that are caught


def run(scale: Scale) -> Result:
    if missing := [name for name in DEVELOPMENT_TOOLS if find_spec(name) is None]:
        raise SkippedError(
            f"its tests need {' and '.join(missing)}; "
            "'bash launch/environment.sh --dev' installs the development tools"
        )
    by_hand = _run_breaks(scale)
    verdicts = drawn_mutations.run(scale.quick, scale.seed, scale.folder)
    too_few = _print_share(verdicts)
    problems = [] if scale.quick else too_few
    failures = [*by_hand.facts["failures"], *problems]
    facts = {**by_hand.facts, "failures": failures, "drawn": drawn_mutations.facts(verdicts)}
    # The drawn ones are one case: a share of them.
    return Result(by_hand.passed + (not problems), by_hand.of + 1, facts)


def _print_share(verdicts: Sequence[Verdict]) -> list[str]:
    """Print the share of the drawn mutations that is caught, and the others.

    Returns a failure where the share is below the goal.
    """
    caught = sum(verdict.is_caught for verdict in verdicts)
    share = f"{caught} of {len(verdicts)} drawn mutations are caught"
    print(f"   {share} ({caught / len(verdicts):.0%}; goal {MIN_SHARE:.0%})", flush=True)
    for verdict in verdicts:
        if not verdict.is_caught:
            print(f"   {verdict.how}: {verdict.mutation.name}", flush=True)
    return [] if caught >= MIN_SHARE * len(verdicts) else [f"only {share}"]


def _run_breaks(scale: Scale) -> Result:
    breaks = BREAKS[:QUICK] if scale.quick else BREAKS
    copy = copy_checkout(scale.folder / "copy")
    unbroken = _run_tests(copy, sorted({b.test for b in breaks}))
    if unbroken != "green":
        failure = f"the unbroken copy is not green, so nothing follows: {unbroken}"
        return Result(0, len(breaks), {"failures": [failure]})
    failures = []
    for b in breaks:
        path = copy / b.file
        text = path.read_text(encoding="utf-8")
        if text.count(b.old) != 1:
            failures.append(f"{b.what}: what it would break is no longer in {b.file}")
            continue
        path.write_text(text.replace(b.old, b.new), encoding="utf-8")
        if (how := _run_tests(copy, [b.test])) != "red":
            failures.append(f"{b.what}: {b.test} is not red: {how}")
        path.write_text(text, encoding="utf-8")
    facts = {"failures": failures, "breaks": {b.what: b.test for b in breaks}}
    return Result(len(breaks) - len(failures), len(breaks), facts)


def _run_tests(copy: Path, tests: list[str]) -> str:
    """green, red, or what else became of them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    environment = {
        **clean_environment(),
        "PYTHONPATH": os.pathsep.join([str(copy), str(copy / "tests")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    run = run_command(command, copy, environment, SECONDS * len(tests))
    (code,) = run.codes
    if code is None:
        return "it ran into its time limit"
    said = {0: "green", 1: "red"}.get(code)
    return said or f"pytest ended with {code}: {run.stdouts[0][-300:]}"
