"""The launch scripts, by real starts: flags reach the ranks unchanged, exit codes reach the caller.

A start takes 4 to 12 s, mostly the launchers' imports, so most starts check several things. The
ranks run a stand-in for the package, in a copy of launch/ whose path has blanks.
"""

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.processes import ROOT, Processes, clean_environment, run_command, start_command

SCRIPTS = sorted(
    [
        *ROOT.glob("launch/**/*.sh"),
        *ROOT.glob("launch/slurm/*.sbatch"),
        *ROOT.glob("tests/**/*.sh"),
        ROOT / ".ci" / "run",
        ROOT / ".ci" / "other_python",
    ]
)
START_SECONDS = 120  # 10 on an idle machine

# In place of vico/cli/main.py: records its flags and environment, and ends with END_WITH.
STAND_IN = """
import json, os, signal, sys, time

def main(argv):
    # As vico.distributed.signals does.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
    rank = os.environ.get("RANK", "alone")
    names = ("LOCAL_RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "MASTER_PORT")
    seen = {"argv": argv, "cwd": os.getcwd(), **{name: os.environ.get(name) for name in names}}
    with open(os.environ["SEEN"] + "/." + rank, "w") as file:
        json.dump(seen, file)
    os.rename(file.name, os.environ["SEEN"] + "/" + rank)
    code = int(os.environ.get("END_WITH", "0"))
    if code < 0 and rank == "1":
        os.kill(os.getpid(), -code)
    if code < 0 or (code and rank not in ("0", "alone")):
        time.sleep(60)  # as a rank that lets rank 0 speak: the launcher ends it
    if code > 0:
        print("vico: error: from the stand-in", file=sys.stderr)
    return code

def console(argv):
    sys.exit(main(argv))
"""
ERROR = "vico: error: from the stand-in\n"
AWKWARD_FLAGS = ["--a", "x  y", "q'\"$HOME", "", "*", "back\\slash", "two\nlines", "--", "--b=1"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a check out"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "vico", folder / "vico", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "vico" / "cli" / "main.py").write_text(STAND_IN)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "seen").mkdir()
    return folder


def user_environment(**more: str) -> dict[str, str]:
    """What a user's shell would have: nothing about ranks, threads or modules."""
    ours = clean_environment()
    for name in ("VICO_RANKS", "OMP_NUM_THREADS", "PYTHONPATH"):
        ours.pop(name, None)
    return {**ours, "PYTHON": sys.executable, **more}


def environment(checkout: Path, **more: str) -> dict[str, str]:
    return user_environment(SEEN=str(checkout.parent / "seen"), **more)


def run(command: list[str], checkout: Path, **more: str) -> Processes:
    """Run a command of one process, from a directory that is not the checkout."""
    elsewhere = checkout.parent / "elsewhere"
    return run_command(command, elsewhere, environment(checkout, **more), START_SECONDS)


def run_script(name: str, *flags: str, checkout: Path, **more: str) -> Processes:
    return run(["bash", str(checkout / "launch" / name), *flags], checkout, **more)


def seen(checkout: Path) -> dict[str, dict[str, object]]:
    """What the stand-in recorded, by rank."""
    files = sorted((checkout.parent / "seen").glob("[!.]*"))
    return {path.name: json.loads(path.read_text()) for path in files}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["train.sh", "eval.sh"])
def test_is_valid_python(name: str) -> None:
    compile((ROOT / "launch" / name).read_text(), name, "exec")


FAKE_PYTHON = """#!/bin/sh
pwd >>"$SEEN/folders"
exit 3
"""
START_HELPERS = """
from vico.data.dataloader import start_forkserver
start_forkserver()
"""


@pytest.fixture
def planted(tmp_path: Path) -> Path:
    """A folder in which Python would find other modules than it should."""
    folder = tmp_path / "planted"
    folder.mkdir()
    for name in ("torch", "json", "socket", "multiprocessing", "pickle", "venv", "vico"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('planted {name}')")
    return folder


def test_torchrun_imports_nothing_from_the_current_folder(planted: Path) -> None:
    text = (ROOT / "launch" / "slurm" / "nodes.sbatch").read_text()
    assert " -m " not in "".join(line for line in text.splitlines() if "$python" in line)
    program = text.split('torchrun="')[1].split('"')[0]
    done = run_command([sys.executable, "-c", program, "--help"], planted, user_environment())
    assert done.codes == [0] and "--nproc-per-node" in done.output, done.output


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 has no switch for it")
def test_helpers_import_nothing_from_the_current_folder(planted: Path, tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(START_HELPERS)
    paths = user_environment(PYTHONPATH=str(ROOT))
    done = run_command([sys.executable, str(tmp_path / "rank.py")], planted, paths)
    assert (done.codes, done.output.strip()) == ([0], "")


@pytest.mark.parametrize("name", ["environment.sh", "quickstart.sh"])
def test_python_starts_in_the_checkout(checkout: Path, name: str) -> None:
    """Its current folder is one that it may import from."""
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", checkout)
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    if name == "quickstart.sh":
        (checkout / "launch" / "environment.sh").write_text("exit 0")
    done = run_script(name, checkout=checkout, PYTHON=str(python))
    assert done.codes != [0]
    folders = (checkout.parent / "seen" / "folders").read_text().splitlines()
    assert set(folders) == {str(checkout)}, done.output


def test_one_rank(checkout: Path) -> None:
    """It gets the flags verbatim, in the user's directory, also through a link to the script."""
    link = checkout.parent / "train"
    link.symlink_to(checkout / "launch" / "train.sh")
    done = run(["bash", str(link), *AWKWARD_FLAGS], checkout)
    assert (done.codes, done.stdouts, done.stderrs) == ([0], [""], [""])
    rank = seen(checkout)["0"]
    assert rank["argv"] == ["train", "--local_rank=0", *AWKWARD_FLAGS]
    assert rank["cwd"] == str(checkout.parent / "elsewhere")
    assert rank["WORLD_SIZE"] == "1"
    assert rank["OMP_NUM_THREADS"] == str(len(os.sched_getaffinity(0)))


def test_two_ranks_and_their_exit_code(checkout: Path) -> None:
    done = run_script("eval.sh", *AWKWARD_FLAGS, checkout=checkout, VICO_RANKS="2", END_WITH="2")
    assert (done.codes, done.stdouts, done.stderrs) == ([2], [""], [ERROR])
    ranks = seen(checkout)
    for rank in ("0", "1"):
        assert ranks[rank]["argv"] == ["eval", f"--local_rank={rank}", *AWKWARD_FLAGS]
    assert ranks["0"]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert ranks["0"]["MASTER_PORT"] == ranks["1"]["MASTER_PORT"] != "29500"


def test_a_killed_rank_is_named(checkout: Path) -> None:
    done = run_script("train.sh", checkout=checkout, VICO_RANKS="2", END_WITH="-9")
    assert done.codes == [128 + 9]
    cause = "a rank was killed by SIGKILL; the kernel does that when memory runs out"
    assert done.stderrs == [f"vico: error: {cause}\n"]


@pytest.mark.parametrize(
    ("module", "options", "added_flags"),
    [
        ("deepspeed.launcher.runner", ["--hostfile=none", "--num_gpus=2"], ["--local_rank=0"]),
        ("torch.distributed.run", ["--nproc-per-node=2", "--standalone"], []),
    ],
)
def test_other_launchers(
    module: str, options: list[str], added_flags: list[str], checkout: Path
) -> None:
    """They run the same file. DeepSpeed passes the ranks' exit code on; torchrun ends with 1."""
    script = str(checkout / "launch" / "train.sh")
    command = [sys.executable, "-m", module, *options, script, *AWKWARD_FLAGS]
    done = run(command, checkout, END_WITH="2")
    assert done.codes == [2 if "deepspeed" in module else 1]
    assert ERROR in done.stderrs[0]
    assert seen(checkout)["0"]["argv"] == ["train", *added_flags, *AWKWARD_FLAGS]


def test_plain_python_is_one_process(checkout: Path) -> None:
    script = str(checkout / "launch" / "eval.sh")
    done = run([sys.executable, script, *AWKWARD_FLAGS], checkout, END_WITH="3")
    assert (done.codes, done.stderrs) == ([3], [ERROR])
    assert seen(checkout)["alone"]["argv"] == ["eval", *AWKWARD_FLAGS]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_starts_no_ranks(flag: str, checkout: Path) -> None:
    assert run_script("train.sh", flag, checkout=checkout).codes == [0]
    assert seen(checkout)["alone"]["argv"] == ["train", flag]


def test_a_signal_to_the_launcher_ends_the_ranks(checkout: Path) -> None:
    # Rank 0 sleeps too.
    all_sleep = STAND_IN.replace('("0", "alone")', "()")
    (checkout / "vico" / "cli" / "main.py").write_text(all_sleep)
    command = ["bash", str(checkout / "launch" / "train.sh")]
    settings = environment(checkout, VICO_RANKS="2", END_WITH="5")
    launcher = start_command(command, checkout.parent, settings)
    assert launcher.wait_until(lambda: len(seen(checkout)) == 2, START_SECONDS)
    launcher.processes[0].send_signal(signal.SIGTERM)
    # `wait` returns a code only when no rank holds the pipes open any more.
    assert launcher.wait(START_SECONDS) == [128 + signal.SIGTERM]
    assert launcher.output.strip() == ""


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ({"VICO_RANKS": "0"}, 2, "VICO_RANKS=0: must be a whole number of at least 1"),
        ({"VICO_RANKS": "two"}, 2, "VICO_RANKS=two: must be a whole number of at least 1"),
        (
            {"MASTER_PORT": "80000"},
            2,
            "MASTER_PORT=80000: must be a port number; unset it to get a free one",
        ),
        ({"PYTHON": "/no/python"}, 2, "there is no Python at '/no/python'"),
    ],
)
def test_bad_settings_are_one_line(
    settings: dict[str, str], code: int, message: str, checkout: Path
) -> None:
    done = run_script("train.sh", checkout=checkout, **settings)
    assert done.codes == [code]
    assert done.stderrs[0].startswith(f"vico: error: {message}")
    assert done.stderrs[0].count("\n") == 1


def test_a_taken_port_is_named(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run_script("train.sh", checkout=checkout, MASTER_PORT=port)
    assert (done.codes, done.stderrs[0].count("\n")) == ([6], 1)
    assert done.stderrs[0].startswith(f"vico: error: MASTER_PORT={port}: Address already in use")


@pytest.mark.parametrize(
    ("visible", "ranks", "shared", "devices"),
    [
        (None, None, "on", ["0", "1"]),
        (None, 1, "on", ["0"]),
        ("3,5", None, "", ["3", "5"]),
        ("GPU-a, GPU-b,-1,7", None, "", ["GPU-a", "GPU-b"]),
        ("3,5", 3, "", None),
        ("3,5", 4, "on", ["3", "5", "-1", "-1"]),
    ],
)
def test_devices_of_a_node_with_two_gpus(
    visible: str | None,
    ranks: int | None,
    shared: str,
    devices: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    accelerator = SimpleNamespace(
        device_name=lambda: "cuda",
        device_count=lambda: 2,
        visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"],
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: accelerator)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("VICO_SHARED_GPU", shared)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    spec = importlib.util.spec_from_file_location("start", ROOT / "launch" / "start.py")
    assert spec is not None and spec.loader is not None
    start = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(start)
    if devices is None:
        with pytest.raises(SystemExit, match="2"):
            start.node_devices(ranks)
        assert "VICO_RANKS=3: this node shows 2 devices" in capsys.readouterr().err
    else:
        assert start.node_devices(ranks) == devices


def test_environment_without_a_python(checkout: Path) -> None:
    shutil.copy(ROOT / "setup.py", checkout)
    done = run_script("environment.sh", checkout=checkout, PYTHON="/no/python")
    assert (done.codes, done.stderrs[0].count("\n")) == ([2], 1)
    assert done.stderrs[0].startswith("vico: error: /no/python is missing or older than 3.10")
    assert not (checkout / ".venv").exists()


def test_the_real_command(tmp_path: Path) -> None:
    """The real package: its help, and a mistyped flag, which rank 0 alone reports."""
    script, settings = str(ROOT / "launch" / "train.sh"), user_environment(VICO_RANKS="2")
    shown = run_command(["bash", script, "--help"], tmp_path, settings, START_SECONDS)
    assert (shown.codes, shown.stderrs) == ([0], [""])
    assert "--llama_model_path" in shown.stdouts[0]
    refused = run_command(["bash", script, "--no_such_flag"], tmp_path, settings, START_SECONDS)
    assert refused.codes == [2]
    assert refused.stderrs[0].startswith("vico: error: unknown flag --no_such_flag")
    assert refused.stderrs[0].count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_ends_of_an_array_wait_for_each_other(tmp_path: Path) -> None:
    """Of launch/slurm/table.py. Two that record their end at once would both print all results."""
    table, out = tmp_path / "table.csv", tmp_path / "out"
    table.write_text("name,lr\na,0.1\n")
    out.mkdir()
    script = str(ROOT / "launch" / "slurm" / "table.py")
    command = [sys.executable, script, "end", "1", str(table), "--output_dir", str(out)]
    with open(out / ".results-lock", "w", encoding="utf-8") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        end = start_command(command, tmp_path, user_environment(VICO_EXIT_CODE="0"))
        pid = f" {end.processes[0].pid} "

        def waits() -> bool:
            """Linux lists who waits for a lock after an arrow."""
            locks = Path("/proc/locks").read_text(encoding="utf-8").splitlines()
            return any("->" in line and pid in line for line in locks)

        assert end.wait_until(waits, START_SECONDS), end.output
        assert not (out / "a" / "exit_code").exists()
        fcntl.lockf(lock, fcntl.LOCK_UN)
        assert end.wait(START_SECONDS) == [0], end.output
    assert (out / "a" / "exit_code").read_text() == "0\n"
    assert "a\t0.1\tdone" in (out / "results.tsv").read_text()
