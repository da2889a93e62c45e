"""The files of launch/slurm/ on a cluster that answers `sinfo`, two nodes of it: to the end, interrupted, bereft of a node, misused.

    eval "$(bash tests/slurm/local_slurm.sh up)"; bash tests/run.sh -m slurm; bash tests/slurm/local_slurm.sh down

makes one on this machine (root, Debian or Ubuntu). On another cluster add --basetemp, a folder that its nodes share.
A run of the small world takes some 15 s of steps, so that it can be caught in the middle of an epoch.
"""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from support.processes import ROOT
from support.toy_dataset import ToyData, records
from vico.distributed.launcher_env import SINGLE_RANK

pytestmark = pytest.mark.slurm

SCRIPTS = ROOT / "launch" / "slurm"
EPOCHS, STEPS_PER_EPOCH = 2, 150
LAST = EPOCHS * STEPS_PER_EPOCH
JOB_SECONDS = 240  # 15 to 25 on an idle machine, and as long again where the job is interrupted
REFUSED_WITHIN_SECONDS = 30
RANKS = {"one": 2, "nodes": 1, "tasks": 1}  # per node: two in all, so that all files train the same


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    without = pytest.fail if os.environ.get("VICO_WANTS_SLURM") else pytest.skip
    if (
        shutil.which("sinfo") is None
        or subprocess.run(["sinfo"], capture_output=True, check=False).returncode
    ):
        without(
            'no cluster answers `sinfo`; eval "$(bash tests/slurm/local_slurm.sh up)" starts one'
        )
    if len(slurm("sinfo", "-h", "-N", "-t", "idle,mix,alloc,comp", "-o", "%N").split()) < 2:
        without("the cluster that answers `sinfo` has less than two nodes up")


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return ToyData(tmp_path_factory.mktemp("slurm") / "world", num_train=600)


@dataclass
class Job:
    number: str
    output_dir: Path
    log: Path

    def ended(self, seconds: float = JOB_SECONDS) -> "Job":
        end = time.monotonic() + seconds
        # Not `sbatch --wait`, which looks ever more rarely. A job that waits to start again is still there.
        while slurm("squeue", "-h", "-j", self.number, "-t", "PD,CF,R,CG,RQ"):
            assert time.monotonic() < end, f"still there after {seconds} s: {self.text}"
            time.sleep(0.3)
        return self

    def at_step(self, step: int) -> "Job":
        end = time.monotonic() + JOB_SECONDS
        while self.step < step:
            assert time.monotonic() < end, self.text
            time.sleep(0.1)
        assert self.step < STEPS_PER_EPOCH, "too late to be in the middle of an epoch"
        return self

    @property
    def step(self) -> int:
        path = self.output_dir / "steps.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else "(no output)"

    def word(self, name: str) -> str:
        found = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", self.number))
        assert found
        return found[1]

    def weights(self) -> str:
        return hashlib.sha256(
            (self.output_dir / f"checkpoint-{LAST}" / "adapter_model.safetensors").read_bytes()
        ).hexdigest()

    def completed(self, restarts: int) -> "Job":
        self.ended()
        assert (self.word("JobState"), self.word("Restarts")) == ("COMPLETED", str(restarts)), (
            self.text
        )
        assert [line["step"] for line in records(self.output_dir / "steps.jsonl")] == list(
            range(1, LAST + 1)
        )
        return self


def start(
    folder: Path,
    home: ToyData,
    name: str,
    *options: str,
    before: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    ranks: int | None = None,
) -> Job:
    """launch/slurm/NAME.sbatch on the small world; what it writes goes into `folder`. `before`: arguments in front of the flags."""
    # A test before this one may have been a rank, and sbatch hands its environment on.
    kept = {
        word: value
        for word, value in os.environ.items()
        if word not in (*SINGLE_RANK, "MASTER_PORT")
    }
    ours = {
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "VICO_RANKS": str(ranks or RANKS.get(name, 1)),
    }
    small = [
        "--gpus-per-node=0",
        "--cpus-per-task=1",
        "--ntasks-per-node=1",
        "--mem=2G",
        f"--output={folder}/%j.out",
        *options,
    ]
    training = [
        "--batch_size",
        "2",
        "--epochs",
        str(EPOCHS),
        "--warmup_epochs",
        "0",
        "--output_dir",
        str(folder / "run"),
        *flags,
    ]
    command = [
        "sbatch",
        "--parsable",
        *small,
        str(SCRIPTS / f"{name}.sbatch"),
        *before,
        *home.flags,
        *training,
    ]
    answer = subprocess.run(
        command, cwd=folder, env={**kept, **ours}, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    number = answer.stdout.strip().split(";")[0]
    return Job(number, folder / "run", folder / f"{number}.out")


Submit = Callable[..., Job]


@pytest.fixture
def submit(home: ToyData, tmp_path: Path) -> Iterator[Submit]:
    yield partial(start, tmp_path, home)
    for path in tmp_path.glob("*.out"):
        subprocess.run(["scancel", path.stem], capture_output=True, check=False)


@pytest.fixture(scope="session")
def undisturbed(home: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Job:
    return start(tmp_path_factory.mktemp("undisturbed"), home, "tasks").completed(restarts=0)


def test_two_nodes_to_the_end(undisturbed: Job) -> None:
    assert re.search(
        r"^world: 2 ranks on 2 hosts\n  \S+: rank 0 on .+\n  \S+: rank 1 on .+$",
        undisturbed.text,
        re.MULTILINE,
    )


@pytest.mark.parametrize("name", RANKS)
def test_asked_before_the_limit_a_job_goes_on_later_as_if_nothing_had_been(
    name: str, submit: Submit, undisturbed: Job
) -> None:
    """USR1 to the batch script alone, as --signal=B:USR1@120 sends it."""
    job = submit(name).at_step(30)
    slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.completed(restarts=1)
    saved = re.search(
        r"^vico: stopped by SIGUSR1; saved \S+/checkpoint-(\d+)", job.text, re.MULTILINE
    )
    assert (
        saved
        and 30 <= int(saved[1]) < STEPS_PER_EPOCH
        and f"resuming from step {saved[1]}\n" in job.text
    )
    assert job.weights() == undisturbed.weights()


def test_requeued_by_hand(submit: Submit, undisturbed: Job) -> None:
    job = submit("tasks").at_step(30)
    slurm("scontrol", "requeue", job.number)
    job.completed(restarts=1)
    assert "vico: stopped by SIGTERM; saved " in job.text
    assert job.weights() == undisturbed.weights()


@pytest.mark.skipif(
    "SLURM_LOCAL_DIR" not in os.environ,
    reason="only nodes of tests/slurm/local_slurm.sh can be switched off",
)
def test_a_node_is_lost(submit: Submit, undisturbed: Job) -> None:
    """The node is back before the job is tried again; what was saved last is where it goes on."""
    job = submit("tasks", flags=("--save_steps", "20")).at_step(30)
    os.kill(int((Path(os.environ["SLURM_LOCAL_DIR"]) / "node2.pid").read_text()), signal.SIGKILL)
    end = time.monotonic() + JOB_SECONDS
    while "down" not in slurm("sinfo", "-h", "-n", "node2", "-o", "%T"):
        assert time.monotonic() < end, "SLURM does not miss the node"
        time.sleep(0.3)
    slurm("bash", str(ROOT / "tests" / "slurm" / "local_slurm.sh"), "up")
    job.completed(restarts=1)
    assert re.search(
        r"^resuming from step [24]0( \(\d+ step\(s\) to redo\))?$", job.text, re.MULTILINE
    )
    assert job.weights() == undisturbed.weights()


@pytest.mark.parametrize(
    ("ranks", "says"),
    [(1, "srun started 2 tasks and this world has 1 rank(s)"), (2, "SLURM started 2 node(s) and")],
)
def test_a_file_for_one_node_on_two_is_refused(ranks: int, says: str, submit: Submit) -> None:
    """Each node would train alone, with one rank or with several."""
    begin = time.monotonic()
    job = submit("one", "--nodes=2", ranks=ranks).ended()
    assert time.monotonic() - begin < REFUSED_WITHIN_SECONDS, job.text
    # srun ends the other node's task; where that one was about to end by itself, the step's code is 143 (the signal's).
    assert job.word("JobState") == "FAILED" and job.word("ExitCode") in ("2:0", "143:0"), job.text
    assert f"vico: error: {says}" in job.text and "Traceback" not in job.text
    assert not job.output_dir.exists()


def test_a_world_of_another_size_than_expected_is_refused(submit: Submit) -> None:
    begin = time.monotonic()
    job = submit("tasks", flags=("--expect_world_size", "4")).ended()
    assert time.monotonic() - begin < REFUSED_WITHIN_SECONDS, job.text
    assert job.word("JobState") == "FAILED"
    assert (
        job.text.count("vico: error: --expect_world_size 4: the launcher made a world of 2 rank(s)")
        == 1
    ), job.text


def test_an_array_writes_its_table(submit: Submit, tmp_path: Path) -> None:
    table = tmp_path / "table.tsv"
    table.write_text("name\tlr\tno_shuffle\nfast\t1e-2\t\nslow\t1e-4\tyes\nnone\t-1\tno\n")
    job = submit("array", "--array=1-3", before=(str(table),), flags=("--max_steps", "10")).ended()
    header, *rows = [
        line.split("\t") for line in (job.output_dir / "results.tsv").read_text().splitlines()
    ]
    assert header == [
        "name",
        "lr",
        "no_shuffle",
        "status",
        "best_val_acc",
        "best_epoch",
        "val_acc",
        "train_loss",
        "step",
    ]
    assert [row[:4] for row in rows] == [
        ["fast", "1e-2", "", "done"],
        ["slow", "1e-4", "yes", "done"],
        ["none", "-1", "no", "failed (2)"],
    ]
    for name, *_, best, _, last, loss, step in rows[:2]:
        line = records(job.output_dir / name / "log.txt")[-1]
        assert (last, loss, step) == (
            f"{line['val_acc']:.6g}",
            f"{line['train_loss']:.6g}",
            "10",
        ) and float(best) >= float(last)
    printed = [path.read_text() for path in tmp_path.glob("*.out")]
    assert sum("  best_val_acc  " in text for text in printed) == 1
