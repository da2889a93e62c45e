"""The files of launch/slurm/ on a SLURM cluster: completed, interrupted, on a lost node, misused.

    eval "$(bash tests/slurm/local_slurm.sh up)"
    bash tests/run.sh -m slurm
    bash tests/slurm/local_slurm.sh down

makes a cluster of two nodes on this machine (root, Debian or Ubuntu). Any other cluster that
answers `sinfo` works too; add --basetemp, a folder that its nodes share. A training run takes some
15 s, so that it can be interrupted in the middle of an epoch.
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

from support.processes import ROOT, clean_environment
from support.toy_dataset import ToyData, records

pytestmark = pytest.mark.slurm

SCRIPTS = ROOT / "launch" / "slurm"
EPOCHS, STEPS_PER_EPOCH = 2, 150
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
# 15 to 25 s on an idle machine, and as long again where the job is interrupted.
JOB_SECONDS = 240
REFUSED_WITHIN_SECONDS = 30
# Ranks per node: two ranks in all, so that all files train the same.
RANKS = {"one": 2, "nodes": 1, "tasks": 1}
# The local cluster has no GPUs.
SBATCH_OPTIONS = "--gpus-per-node=0 --cpus-per-task=1 --ntasks-per-node=1 --mem=2G".split()
TRAINING = f"--batch_size 2 --epochs {EPOCHS} --warmup_epochs 0".split()


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout


def cluster_answers() -> bool:
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    give_up = pytest.fail if os.environ.get("VICO_WANTS_SLURM") else pytest.skip
    if not cluster_answers():
        up = 'eval "$(bash tests/slurm/local_slurm.sh up)"'
        give_up(f"no cluster answers `sinfo`; {up} starts one")
    nodes = slurm("sinfo", "-h", "-N", "-t", "idle,mix,alloc,comp", "-o", "%N").split()
    if len(nodes) < 2:
        give_up("the cluster that answers `sinfo` has less than two nodes up")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ToyData:
    return ToyData(tmp_path_factory.mktemp("slurm") / "toy", num_train=600)


@dataclass
class Job:
    number: str
    output_dir: Path
    log: Path

    def wait(self, seconds: float = JOB_SECONDS) -> "Job":
        """Until it has ended. Not by `sbatch --wait`, which polls less and less often."""
        deadline = time.monotonic() + seconds
        # A job that waits to start again has not ended.
        while slurm("squeue", "-h", "-j", self.number, "-t", "PD,CF,R,CG,RQ"):
            assert time.monotonic() < deadline, f"not ended after {seconds} s: {self.text}"
            time.sleep(0.3)
        return self

    def wait_for_step(self, step: int) -> "Job":
        """Until training has done this step of the first epoch."""
        deadline = time.monotonic() + JOB_SECONDS
        while self.step < step:
            assert time.monotonic() < deadline, self.text
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

    def field(self, name: str) -> str:
        """A field of `scontrol show job`."""
        match = re.search(rf"\b{name}=(\S+)", slurm("scontrol", "show", "job", self.number))
        assert match
        return match[1]

    def weights_digest(self) -> str:
        checkpoint = self.output_dir / f"checkpoint-{LAST_STEP}"
        return hashlib.sha256((checkpoint / "adapter_model.safetensors").read_bytes()).hexdigest()

    def completes(self, restarts: int) -> "Job":
        self.wait()
        state = (self.field("JobState"), self.field("Restarts"))
        assert state == ("COMPLETED", str(restarts)), self.text
        steps = [record["step"] for record in records(self.output_dir / "steps.jsonl")]
        assert steps == list(range(1, LAST_STEP + 1))
        return self


def submit_job(
    folder: Path,
    dataset: ToyData,
    name: str,
    *options: str,
    before: tuple[str, ...] = (),
    flags: tuple[str, ...] = (),
    ranks: int | None = None,
) -> Job:
    """sbatch OPTIONS launch/slurm/NAME.sbatch BEFORE TRAINING FLAGS; outputs go to `folder`."""
    environment = {
        **clean_environment(),
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "VICO_RANKS": str(ranks or RANKS.get(name, 1)),
    }
    sbatch = ["sbatch", "--parsable", *SBATCH_OPTIONS, f"--output={folder}/%j.out", *options]
    run = folder / "run"
    training = [*before, *dataset.flags, *TRAINING, "--output_dir", str(run), *flags]
    command = [*sbatch, str(SCRIPTS / f"{name}.sbatch"), *training]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    number = done.stdout.strip().split(";")[0]
    return Job(number, run, folder / f"{number}.out")


Submit = Callable[..., Job]


@pytest.fixture
def submit(dataset: ToyData, tmp_path: Path) -> Iterator[Submit]:
    yield partial(submit_job, tmp_path, dataset)
    for path in tmp_path.glob("*.out"):
        subprocess.run(["scancel", path.stem], capture_output=True, check=False)


@pytest.fixture(scope="session")
def undisturbed(dataset: ToyData, tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("undisturbed")
    return submit_job(folder, dataset, "tasks").completes(restarts=0)


def test_two_nodes(undisturbed: Job) -> None:
    world = r"^world: 2 ranks on 2 hosts\n  \S+: rank 0 on .+\n  \S+: rank 1 on .+$"
    assert re.search(world, undisturbed.text, re.MULTILINE)


@pytest.mark.parametrize("name", RANKS)
def test_stopped_before_the_time_limit(name: str, submit: Submit, undisturbed: Job) -> None:
    """USR1 to the batch script alone, as --signal=B:USR1@120 sends it. The job is requeued, resumes
    at the step that it saved, and ends with the bits of the undisturbed run.
    """
    job = submit(name).wait_for_step(30)
    slurm("scancel", "--batch", "--signal=USR1", job.number)
    job.completes(restarts=1)
    stopped = r"^vico: stopped by SIGUSR1; saved \S+/checkpoint-(\d+)"
    saved = re.search(stopped, job.text, re.MULTILINE)
    assert saved and 30 <= int(saved[1]) < STEPS_PER_EPOCH
    assert f"resuming from step {saved[1]}\n" in job.text
    assert job.weights_digest() == undisturbed.weights_digest()


def test_requeued_by_hand(submit: Submit, undisturbed: Job) -> None:
    job = submit("tasks").wait_for_step(30)
    slurm("scontrol", "requeue", job.number)
    job.completes(restarts=1)
    assert "vico: stopped by SIGTERM; saved " in job.text
    assert job.weights_digest() == undisturbed.weights_digest()


@pytest.mark.skipif(
    "SLURM_LOCAL_DIR" not in os.environ,
    reason="only nodes of tests/slurm/local_slurm.sh can be switched off",
)
def test_a_lost_node(submit: Submit, undisturbed: Job) -> None:
    """The node is back before the job starts again, which resumes from the last save."""
    job = submit("tasks", flags=("--save_steps", "20")).wait_for_step(30)
    node_pid = int((Path(os.environ["SLURM_LOCAL_DIR"]) / "node2.pid").read_text())
    os.kill(node_pid, signal.SIGKILL)
    deadline = time.monotonic() + JOB_SECONDS
    while "down" not in slurm("sinfo", "-h", "-n", "node2", "-o", "%T"):
        assert time.monotonic() < deadline, "SLURM does not notice the loss of the node"
        time.sleep(0.3)
    slurm("bash", str(ROOT / "tests" / "slurm" / "local_slurm.sh"), "up")
    job.completes(restarts=1)
    resumed = r"^resuming from step [24]0( \(\d+ step\(s\) to redo\))?$"
    assert re.search(resumed, job.text, re.MULTILINE)
    assert job.weights_digest() == undisturbed.weights_digest()


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(1, "srun started 2 tasks and the world size is 1"), (2, "SLURM started 2 node(s) and")],
)
def test_one_node_script_on_two_nodes_is_refused(ranks: int, message: str, submit: Submit) -> None:
    """Each node would train separately, with one rank or with several."""
    begin = time.monotonic()
    job = submit("one", "--nodes=2", ranks=ranks).wait()
    assert time.monotonic() - begin < REFUSED_WITHIN_SECONDS, job.text
    # srun kills the other node's task. Where that task was ending anyway, the step's code is 143.
    assert job.field("JobState") == "FAILED", job.text
    assert job.field("ExitCode") in ("2:0", "143:0"), job.text
    assert f"vico: error: {message}" in job.text and "Traceback" not in job.text
    assert not job.output_dir.exists()


def test_another_world_size_than_expected_is_refused(submit: Submit) -> None:
    begin = time.monotonic()
    job = submit("tasks", flags=("--expect_world_size", "4")).wait()
    assert time.monotonic() - begin < REFUSED_WITHIN_SECONDS, job.text
    assert job.field("JobState") == "FAILED"
    error = "vico: error: --expect_world_size 4: the launcher started 2 rank(s)"
    # The first rank of each host says it; srun may end the second before it does.
    assert 1 <= job.text.count(error) <= 2, job.text


TABLE = """\
name\tlr\tno_shuffle
fast\t1e-2\t
slow\t1e-4\tyes
none\t-1\tno
"""
COLUMNS = "name lr no_shuffle status best_val_acc best_epoch val_acc train_loss step".split()


def test_array(submit: Submit, tmp_path: Path) -> None:
    """Each row of the table is a run, and the results of all are one table, printed once."""
    table = tmp_path / "table.tsv"
    table.write_text(TABLE)
    job = submit("array", "--array=1-3", before=(str(table),), flags=("--max_steps", "10")).wait()
    lines = (job.output_dir / "results.tsv").read_text().splitlines()
    header, *rows = [line.split("\t") for line in lines]
    assert header == COLUMNS
    assert [row[:4] for row in rows] == [
        ["fast", "1e-2", "", "done"],
        ["slow", "1e-4", "yes", "done"],
        ["none", "-1", "no", "failed (2)"],
    ]
    for name, *_, best, _, last, loss, step in rows[:2]:
        record = records(job.output_dir / name / "log.txt")[-1]
        assert last == f"{record['val_acc']:.6g}" and float(best) >= float(last)
        assert (loss, step) == (f"{record['train_loss']:.6g}", "10")
    outputs = [path.read_text() for path in tmp_path.glob("*.out")]
    assert sum("  best_val_acc  " in text for text in outputs) == 1
