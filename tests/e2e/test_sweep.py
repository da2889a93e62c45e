"""launch/sweep.sh: the rows of a table on this machine, one after another.

Most tests have a stand-in for launch/train.sh, whose real start takes seconds.
"""

import fcntl
import re
import shutil
import signal
from pathlib import Path

import pytest

from support.processes import ROOT, Processes, launch, run_command, start_command
from support.toy_dataset import ToyData, records

RESULTS = re.compile(r"^name +.*best_val_acc", re.MULTILINE)
STAND_IN = """
out=${@: -1}
echo "${out##*/}" >>STARTED
case $out in
*/fails) exit 4 ;;
*/killed) kill -KILL $$ ;;
*/sleeps) exec sleep 600 ;;
*/told_*) kill "-${out##*_}" $PPID ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a check out"
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "vico").symlink_to(ROOT / "vico")
    (folder / "launch" / "train.sh").write_text(STAND_IN)
    return folder


def sweep_command(checkout: Path, table: str, name: str = "table.csv") -> list[str]:
    (checkout.parent / name).write_text(table)
    script = str(checkout / "launch" / "sweep.sh")
    return ["bash", script, name, "--dataset", "nextqa", "--output_dir", "out"]


def sweep(checkout: Path, table: str) -> Processes:
    return run_command(sweep_command(checkout, table), cwd=checkout.parent)


def started(checkout: Path) -> list[str]:
    """The names of the rows whose training was started."""
    path = checkout.parent / "STARTED"
    return path.read_text().split() if path.exists() else []


def statuses(folder: Path) -> list[str]:
    text = (folder / "results.tsv").read_text()
    header, *lines = [line.split("\t") for line in text.splitlines()]
    return [line[header.index("status")] for line in lines]


def test_a_failed_row_does_not_stop_the_others(checkout: Path) -> None:
    """Whether it is refused, ends with an error or is killed. The results come once, at the end."""
    done = sweep(checkout, "name,lr\nrefused,-1\nfails,1\nfine,1\nkilled,2\n")
    assert done.codes == [128 + signal.SIGKILL], done.output
    assert started(checkout) == ["fails", "fine", "killed"]
    ends = ["failed (2)", "failed (4)", "done", "failed (137)"]
    assert statuses(checkout.parent / "out") == ends
    assert len(RESULTS.findall(done.stdouts[0])) == 1
    for name, end in zip(("refused", "fails", "fine", "killed"), ends, strict=True):
        shown = done.stdouts[0].splitlines()[-4:]
        assert any(line.startswith(name) and end in line for line in shown), done.output
    assert done.errors == [
        "vico: error: row 1 of 4, refused: --lr -1.0: must be above 0, and finite"
    ]


@pytest.mark.parametrize(("name", "code"), [("TERM", 75), ("INT", 130)])
def test_a_signal_while_a_row_completes(checkout: Path, name: str, code: int) -> None:
    """The row is recorded, and no further one is started."""
    done = sweep(checkout, f"name,lr\ntold_{name},1\nnext,1\n")
    assert done.codes == [code], done.output
    assert started(checkout) == [f"told_{name}"]
    assert statuses(checkout.parent / "out") == ["done", "not ended"]
    assert "stopped before row 2 of 2, next; the same command goes on there\n" in done.output
    assert len(RESULTS.findall(done.stdouts[0])) == 1


def test_a_killed_sweep_leaves_no_run(checkout: Path) -> None:
    run = start_command(sweep_command(checkout, "name,lr\nsleeps,1\n"), checkout.parent)
    assert run.wait_until(lambda: started(checkout) == ["sleeps"]), run.output
    run.processes[0].kill()
    # A code comes only when no process holds the pipes open any more.
    assert run.wait(20) == [-signal.SIGKILL]


def test_a_second_sweep_is_refused(checkout: Path) -> None:
    """It would train beside the first one."""
    out = checkout.parent / "out"
    out.mkdir()
    with open(out / ".vico-lock", "w", encoding="utf-8") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        done = sweep(checkout, "name,lr\nfine,1\n")
    assert (done.codes, started(checkout)) == ([6], [])
    assert done.errors[0].startswith(f"vico: error: {out}: in use by another run; wait for it")


def test_the_table_comes_first(checkout: Path) -> None:
    command = ["bash", str(checkout / "launch" / "sweep.sh"), "--dataset", "nextqa"]
    done = run_command(command, cwd=checkout.parent)
    message = "vico: error: the table comes first: bash launch/sweep.sh TABLE FLAGS\n"
    assert (done.codes, done.stderrs) == ([2], [message])


def test_stopped_and_started_again(toy: ToyData, tmp_path: Path, checkout: Path) -> None:
    """By real runs. SIGTERM reaches the run, which saves, and the same command goes on with it.
    Then it is passed over, until its settings change.
    """
    table, out = tmp_path / "table.tsv", tmp_path / "out"
    table.write_text("name\tlr\nrefused\t-1\nreal\t1e-2\n")
    training = "--batch_size 2 --epochs 2 --warmup_epochs 0".split()
    flags = [*toy.flags, *training, "--output_dir", str(out)]
    steps = out / "real" / "steps.jsonl"

    run = launch("sweep.sh", str(table), *flags, ranks=1)
    assert run.wait_until(lambda: steps.exists() and steps.read_bytes().count(b"\n") > 2)
    run.processes[0].send_signal(signal.SIGTERM)
    assert run.wait() == [75], run.output
    saved = re.search(r"^vico: stopped by SIGTERM; saved \S+/checkpoint-(\d+)", run.output, re.M)
    assert saved and statuses(out) == ["failed (2)", "not ended"], run.output

    run = launch("sweep.sh", str(table), *flags, ranks=1)
    assert run.wait() == [2], run.output
    assert f"resuming from step {saved[1]}\n" in run.output
    best = max(epoch["val_acc"] for epoch in records(out / "real" / "log.txt"))
    end = run.stdouts[0].splitlines()[-1].split()
    assert end[:4] == ["real", "1e-2", "done", f"{best:.6g}"]

    again = ["bash", str(checkout / "launch" / "sweep.sh"), str(table), *flags]
    table.write_text("name\tlr\nreal\t1e-2\n")
    run = run_command(again, tmp_path)
    assert (run.codes, started(checkout)) == ([0], []), run.output
    over, header, row = run.stdouts[0].splitlines()
    assert over == "row 1 of 1, real: passed over, it is complete"
    assert RESULTS.match(header) and row.split() == end
    assert run_command([*again, "--epochs", "3"], tmp_path).codes == [0]
    assert started(checkout) == ["real"]
