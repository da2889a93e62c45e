"""The launch scripts, by real starts: what is typed arrives at the ranks as it is, and how they end arrives at the caller.

A start takes 4 to 12 s, nearly all of it the launchers' imports, so most starts check several things. The ranks run a
stand-in for the package, in a copy of launch/ that nobody has installed and whose path has blanks.
"""

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [
        *ROOT.glob("launch/**/*.sh"),
        *ROOT.glob("launch/slurm/*.sbatch"),
        *ROOT.glob("tests/**/*.sh"),
        ROOT / ".ci" / "run",
    ]
)
START_SECONDS = 120  # 10 on an idle machine

STAND_IN = """
import json, os, signal, sys, time

def main(argv):
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])  # as vico.stopping does
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
        time.sleep(60)  # as a rank that leaves the word to rank 0: the launcher ends it
    if code > 0:
        print("vico: error: said once", file=sys.stderr)
    return code

def console(argv):
    sys.exit(main(argv))
"""
AWKWARD = ["--a", "x  y", "q'\"$HOME", "", "*", "back\\slash", "two\nlines", "--", "--b=1"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "a check out"
    shutil.copytree(ROOT / "launch", folder / "launch")
    (folder / "vico").mkdir()
    (folder / "vico" / "__init__.py").touch()
    (folder / "vico" / "cli.py").write_text(STAND_IN)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "seen").mkdir()
    return folder


def environment(checkout: Path, **extra: str) -> dict[str, str]:
    return {**clean_environment(), "SEEN": str(checkout.parent / "seen"), **extra}


def clean_environment() -> dict[str, str]:
    """Ours, but no word about ranks: a test before this one may have been a rank."""
    words = {
        "VICO_RANKS",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        "OMP_NUM_THREADS",
        "PYTHONPATH",
    }
    return {
        **{name: value for name, value in os.environ.items() if name not in words},
        "PYTHON": sys.executable,
    }


def start(command: list[str], checkout: Path, **extra: str) -> "subprocess.CompletedProcess[str]":
    elsewhere = checkout.parent / "elsewhere"
    return subprocess.run(
        command,
        cwd=elsewhere,
        env=environment(checkout, **extra),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
        check=False,
    )


def seen(checkout: Path) -> dict[str, dict[str, object]]:
    return {
        path.name: json.loads(path.read_text())
        for path in sorted((checkout.parent / "seen").glob("[!.]*"))
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_bash(script: Path) -> None:
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["train.sh", "eval.sh"])
def test_is_valid_python(name: str) -> None:
    compile((ROOT / "launch" / name).read_text(), name, "exec")


def test_one_rank_gets_the_flags_verbatim_in_the_users_directory(checkout: Path) -> None:
    link = checkout.parent / "train"
    link.symlink_to(checkout / "launch" / "train.sh")
    done = start(["bash", str(link), *AWKWARD], checkout)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    rank = seen(checkout)["0"]
    assert rank["argv"] == ["train", "--local_rank=0", *AWKWARD]
    assert rank["cwd"] == str(checkout.parent / "elsewhere")
    assert (rank["WORLD_SIZE"], rank["OMP_NUM_THREADS"]) == ("1", str(len(os.sched_getaffinity(0))))


def test_two_ranks_and_their_exit_code(checkout: Path) -> None:
    done = start(
        ["bash", str(checkout / "launch" / "eval.sh"), *AWKWARD],
        checkout,
        VICO_RANKS="2",
        END_WITH="2",
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "vico: error: said once\n")
    ranks = seen(checkout)
    assert [ranks[rank]["argv"] for rank in ("0", "1")] == [
        ["eval", f"--local_rank={rank}", *AWKWARD] for rank in ("0", "1")
    ]
    assert ranks["0"]["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    assert ranks["0"]["MASTER_PORT"] == ranks["1"]["MASTER_PORT"] != "29500"


def test_a_killed_rank_is_named(checkout: Path) -> None:
    done = start(
        ["bash", str(checkout / "launch" / "train.sh")], checkout, VICO_RANKS="2", END_WITH="-9"
    )
    assert done.returncode == 128 + 9
    assert (
        done.stderr
        == "vico: error: a rank was ended by SIGKILL; the kernel does that when memory runs out\n"
    )


@pytest.mark.parametrize(
    ("module", "flags", "passed"),
    [
        ("deepspeed.launcher.runner", ["--hostfile=none", "--num_gpus=2"], ["--local_rank=0"]),
        ("torch.distributed.run", ["--nproc-per-node=2", "--standalone"], []),
    ],
)
def test_other_launchers_run_the_same_file(
    module: str, flags: list[str], passed: list[str], checkout: Path
) -> None:
    """DeepSpeed's command hands the ranks' exit code on; torchrun has one of its own, 1."""
    script = str(checkout / "launch" / "train.sh")
    done = start([sys.executable, "-m", module, *flags, script, *AWKWARD], checkout, END_WITH="2")
    assert done.returncode == (2 if "deepspeed" in module else 1)
    assert "vico: error: said once\n" in done.stderr
    assert seen(checkout)["0"]["argv"] == ["train", *passed, *AWKWARD]


def test_plain_python_is_one_process(checkout: Path) -> None:
    done = start(
        [sys.executable, str(checkout / "launch" / "eval.sh"), *AWKWARD], checkout, END_WITH="3"
    )
    assert (done.returncode, done.stderr) == (3, "vico: error: said once\n")
    assert seen(checkout)["alone"]["argv"] == ["eval", *AWKWARD]


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_starts_no_ranks(flag: str, checkout: Path) -> None:
    assert start(["bash", str(checkout / "launch" / "train.sh"), flag], checkout).returncode == 0
    assert seen(checkout)["alone"]["argv"] == ["train", flag]


def test_a_signal_to_the_launcher_ends_the_ranks(checkout: Path) -> None:
    command = ["bash", str(checkout / "launch" / "train.sh")]
    env = environment(checkout, VICO_RANKS="2", END_WITH="5")
    (checkout / "vico" / "cli.py").write_text(
        STAND_IN.replace('("0", "alone")', "()")
    )  # rank 0 stays too
    with subprocess.Popen(
        command,
        cwd=checkout.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launcher:
        end = time.monotonic() + START_SECONDS
        while len(seen(checkout)) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        launcher.send_signal(signal.SIGTERM)
        # Both pipes close only when no rank holds them any more.
        assert launcher.communicate(timeout=START_SECONDS) == ("", "")
    assert launcher.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("settings", "code", "says"),
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
    settings: dict[str, str], code: int, says: str, checkout: Path
) -> None:
    done = start(["bash", str(checkout / "launch" / "train.sh")], checkout, **settings)
    assert done.returncode == code
    assert done.stderr.startswith(f"vico: error: {says}")
    assert done.stderr.count("\n") == 1


def test_a_taken_port_is_named(checkout: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = start(
            ["bash", str(checkout / "launch" / "train.sh")], checkout, MASTER_PORT=str(port)
        )
    assert (done.returncode, done.stderr.count("\n")) == (6, 1)
    assert done.stderr.startswith(f"vico: error: MASTER_PORT={port}: Address already in use")


@pytest.mark.parametrize(
    ("visible", "ranks", "devices"),
    [
        (None, None, ["0", "1"]),
        (None, 1, ["0"]),
        ("3,5", None, ["3", "5"]),
        ("GPU-a, GPU-b,-1,7", None, ["GPU-a", "GPU-b"]),
        ("3,5", 3, None),
    ],
)
def test_devices_of_a_node_with_two_gpus(
    visible: str | None,
    ranks: int | None,
    devices: list[str] | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    node = SimpleNamespace(
        device_name=lambda: "cuda",
        device_count=lambda: 2,
        visible_devices_envs=lambda: ["CUDA_VISIBLE_DEVICES"],
    )
    monkeypatch.setattr("deepspeed.accelerator.get_accelerator", lambda: node)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    spec = importlib.util.spec_from_file_location("start", ROOT / "launch" / "start.py")
    assert spec is not None and spec.loader is not None
    starter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(starter)
    if devices is None:
        with pytest.raises(SystemExit, match="2"):
            starter.node_devices(ranks)
        assert "VICO_RANKS=3: this node shows 2 devices" in capsys.readouterr().err
    else:
        assert starter.node_devices(ranks) == devices


def test_environment_without_a_python(checkout: Path) -> None:
    shutil.copy(ROOT / "setup.py", checkout)
    done = start(
        ["bash", str(checkout / "launch" / "environment.sh")], checkout, PYTHON="/no/python"
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("vico: error: /no/python is missing or older than 3.10")
    assert not (checkout / ".venv").exists()


def test_the_real_doors(tmp_path: Path) -> None:
    """The scripts as they are on the package as it is: help, and a mistyped flag, which rank 0 alone answers."""
    script, env = ROOT / "launch" / "train.sh", {**clean_environment(), "VICO_RANKS": "2"}
    options = {
        "cwd": tmp_path,
        "env": env,
        "capture_output": True,
        "text": True,
        "timeout": START_SECONDS,
    }
    shown = subprocess.run(["bash", script, "--help"], **options)
    assert (shown.returncode, shown.stderr) == (0, "") and "--llama_model_path" in shown.stdout
    refused = subprocess.run(["bash", script, "--no_such_flag"], **options)
    assert refused.returncode == 2
    assert (
        refused.stderr.startswith("vico: error: unknown flag --no_such_flag")
        and refused.stderr.count("\n") == 1
    )
    assert not any(tmp_path.iterdir())
