"""The world at the start: who this process is, whether those came who should have, whether they run the same, and how long one waits."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from support.errors import refusal
from support.processes import ROOT
from support.toy_dataset import ToyData
from vico.distributed import launcher_env, topology
from vico.distributed.launcher_env import SlurmAllocation
from vico.errors import RESUMABLE, UnreachableError, UserError

BATCH = {
    "SLURM_JOB_ID": "712",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NUM_NODES": "2",
}
STEP = {
    **BATCH,
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


# ---- words of launchers ----------------------------------------------------------------------------------------------


def adopted(environment: dict[str, str]) -> dict[str, str]:
    changed = dict(environment)
    launcher_env.set_rank_variables(changed)
    return {name: value for name, value in changed.items() if name not in environment}


def test_a_task_of_srun_is_a_rank() -> None:
    found = adopted(STEP)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    assert (
        20000 <= int(port) < 30000
        and port != adopted({**STEP, "SLURM_JOB_ID": "713"})["MASTER_PORT"]
    )
    assert adopted({**STEP, "MASTER_ADDR": "other"}).get("MASTER_ADDR") is None
    uneven = adopted({**STEP, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"})
    assert uneven["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b[1-2]", "a"),
        ("b[1-2],a", "b1"),
        ("r1n[003,007-9]-ib", "r1n003-ib"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_list(nodes: str, first: str) -> None:
    assert adopted({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "SLURM_JOB_ID": "5",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NUM_NODES": "2",
        },  # the shell of salloc
        {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # the same, on a node
        {**STEP, "SLURM_PTY_PORT": "40000"},  # srun --pty bash
        {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
        BATCH,
        {**STEP, "RANK": "0"},  # torchrun in a task
    ],
)
def test_who_stays_alone_or_as_the_launcher_said(environment: dict[str, str]) -> None:
    assert adopted(environment) == {}


def test_a_process_of_mpirun_is_a_rank() -> None:
    mpi = {
        f"OMPI_COMM_WORLD_{name}": value
        for name, value in {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}.items()
    }
    assert adopted(mpi) == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    assert "MASTER_ADDR and MASTER_PORT must say" in refusal(
        launcher_env.check_world_size, None, {**mpi, **adopted(mpi)}
    )


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (RANK, None),
        (RANK, 4),
        ({**STEP, **RANK}, None),
        ({**STEP, **RANK, "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2"}, None),  # salloc
        (
            {**STEP, "RANK": "0", "WORLD_SIZE": "1"},
            1,
        ),  # a search over seeds: the user says that they are apart
        ({**BATCH, "SLURM_JOB_NUM_NODES": "1"}, None),
    ],
)
def test_worlds_that_may_be(environment: dict[str, str], expected: int | None) -> None:
    launcher_env.check_world_size(expected, environment)


@pytest.mark.parametrize(
    ("environment", "expected", "says"),
    [
        (RANK, 8, "--expect_world_size 8: the launcher made a world of 4 rank(s)"),
        ({}, 2, "--expect_world_size 2: the launcher made a world of 1 rank(s)"),
        (
            {**STEP, **RANK, "WORLD_SIZE": "1"},
            None,
            "srun started 4 tasks and this world has 1 rank(s), so they would train apart",
        ),
        (
            {**STEP, **RANK, "WORLD_SIZE": "8"},
            None,
            "WORLD_SIZE=8: srun started 4 task(s), and the others would never come",
        ),
        (
            BATCH,
            None,
            "SLURM gave 2 nodes and this world has 1 rank(s), so nodes would be idle or train apart",
        ),
        ({**RANK, "RANK": "4"}, None, "RANK=4: must be below WORLD_SIZE=4"),
        ({**RANK, "WORLD_SIZE": "two"}, None, "WORLD_SIZE=two: must be a whole number"),
        (
            {**RANK, "MASTER_PORT": ""},
            None,
            "MASTER_ADDR and MASTER_PORT must say where the ranks meet",
        ),
        (
            {**RANK, "MASTER_ADDR": "no-such-host.invalid"},
            None,
            "MASTER_ADDR=no-such-host.invalid: ",
        ),
    ],
)
def test_worlds_that_contradict_themselves(
    environment: dict[str, str], expected: int | None, says: str
) -> None:
    assert refusal(launcher_env.check_world_size, expected, environment).startswith(says)


# ---- who came --------------------------------------------------------------------------------------------------------


def nodes_of(*ranks: int, gpus: int = 0, chosen: bool = False) -> list[topology.Member]:
    """Hosts n0, n1, ... with so many ranks, each on a GPU of its own where its host has some."""
    members: list[topology.Member] = []
    for node, count in enumerate(ranks):
        for i in range(count):
            gpu = f"GPU-{node}-{i}" if gpus else None
            members.append(
                topology.Member(
                    len(members),
                    f"n{node}",
                    "H200" if gpus else "cpu",
                    gpu,
                    gpus,
                    chosen or not gpus,
                    count,
                )
            )
    return members


def test_every_run_says_who_came() -> None:
    assert topology.describe(nodes_of(1)) == "world: 1 rank, n0: rank 0 on cpu"
    assert (
        topology.describe(nodes_of(3, 2, gpus=4))
        == "world: 5 ranks on 2 hosts\n  n0: ranks 0-2 on H200\n  n1: ranks 3-4 on H200"
    )
    cyclic = [replace(member, host=f"n{member.rank % 2}") for member in nodes_of(4)]
    assert topology.describe(cyclic).endswith("\n  n0: ranks 0,2 on cpu\n  n1: ranks 1,3 on cpu")


@pytest.mark.parametrize("member", nodes_of(1, 1, gpus=2))
def test_what_a_rank_says_of_itself_arrives(member: topology.Member) -> None:
    assert topology.Member.from_text(member.to_text()) == member


@pytest.mark.parametrize(
    ("members", "there", "expected"),
    [
        (nodes_of(1), SlurmAllocation(), None),
        (nodes_of(2, 2), SlurmAllocation(nodes=2, tasks=4), None),
        (nodes_of(8, 8, gpus=8), SlurmAllocation(nodes=2, tasks=2), None),
        (nodes_of(1, gpus=8, chosen=True), SlurmAllocation(), None),
        (nodes_of(1, gpus=8), SlurmAllocation(), 1),
        (nodes_of(2), SlurmAllocation(nodes=2), 2),
        (
            [replace(m, num_visible=1) for m in nodes_of(4, gpus=4)],
            SlurmAllocation(nodes=1, tasks=4),
            None,
        ),  # --gpus-per-task=1
    ],
)
def test_those_who_should_came(
    members: list[topology.Member], there: SlurmAllocation, expected: int | None
) -> None:
    topology.check_topology(members, there, expected)


@pytest.mark.parametrize(
    ("members", "there", "says"),
    [
        (
            nodes_of(2),
            SlurmAllocation(nodes=2),
            "SLURM started 2 node(s) and the ranks of this world are on 1 (n0), so nodes are idle or train apart",
        ),
        (
            nodes_of(1, 1),
            SlurmAllocation(nodes=1),
            "SLURM started 1 node(s) and the ranks of this world are on 2 (n0, n1)",
        ),
        (
            nodes_of(1, gpus=8),
            SlurmAllocation(),
            "n0: rank 0 of this host leave 7 of its GPUs idle",
        ),
        (
            nodes_of(8, 2, gpus=8),
            SlurmAllocation(),
            "n1: ranks 8-9 of this host leave 6 of its GPUs idle",
        ),
        (
            [replace(m, gpu="GPU-x") for m in nodes_of(2, gpus=2)],
            SlurmAllocation(),
            "n0: ranks 0-1 share a GPU",
        ),
        (
            [replace(m, local_size=8) for m in nodes_of(2)],
            SlurmAllocation(),
            "n0: the launcher speaks of 8 ranks on this host and 2 came",
        ),
    ],
)
def test_others_came_than_should(
    members: list[topology.Member], there: SlurmAllocation, says: str
) -> None:
    assert refusal(topology.check_topology, members, there, None).startswith(says)


# ---- real ranks ------------------------------------------------------------------------------------------------------


def ranks(
    code: str, *arguments: str, world_size: int = 2, which: tuple[int, ...] = (0, 1), **extra: str
) -> list[subprocess.Popen[str]]:
    """Python CODE as these ranks; `extra`: paths in front of rank 1's modules."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    said = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = []
    for rank in which:
        modules = ":".join([*(extra.values() if rank == 1 else ()), str(ROOT), str(ROOT / "tests")])
        env = {
            **os.environ,
            **said,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "PYTHONPATH": modules,
        }
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code, *arguments],
                cwd="/",
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def outputs(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[str, str]]:
    try:
        return [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()


MAIN = (
    "from vico.cli import main; from vico.distributed import rendezvous; "
    "rendezvous.SECONDS_OF_SILENCE = 1.0; main.SECONDS_FOR_RANK_0 = 1.0; main.console()"
)


def test_a_rank_that_does_not_come_is_waited_for_aloud_and_named(
    toy: ToyData, tmp_path: Path
) -> None:
    flags = [
        "train",
        *toy.flags,
        "--output_dir",
        str(tmp_path / "run"),
        "--collective_timeout",
        "0.05",
    ]
    processes = ranks(MAIN, *flags, world_size=4, which=(0, 2))
    found = outputs(processes)
    waits, refuses = [line for line in found[0][1].splitlines() if line.startswith("vico: ")]
    assert (
        waits.startswith("vico: waiting at 127.0.0.1:")
        and "for rank(s) 1, 3 of 4 (2 in all); at most 0:00:03" in waits
    )
    assert refuses.startswith(
        "vico: error: rank(s) 1, 3 of 4 (2 in all) did not come to 127.0.0.1:"
    )
    assert [process.returncode for process in processes] == [5, 5]
    assert not any("Traceback" in text for _, text in found) and not (tmp_path / "run").exists()


def test_where_rank_0_is_missing_another_says_so(toy: ToyData, tmp_path: Path) -> None:
    flags = [
        "train",
        *toy.flags,
        "--output_dir",
        str(tmp_path / "run"),
        "--collective_timeout",
        "0.05",
    ]
    code = f"import os; os.environ['LOCAL_RANK'] = '0'; {MAIN}"  # the first of its host
    (process,) = ranks(code, *flags, which=(1,))
    ((_, text),) = outputs([process])
    assert process.returncode == 5 and "Traceback" not in text and "frame #" not in text
    assert f"vico: {socket.gethostname()} waits for an answer at 127.0.0.1:" in text
    assert f"vico: error: {socket.gethostname()}: nobody answers at 127.0.0.1:" in text
    assert issubclass(UnreachableError, UserError)


@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_for_the_others_ends_when_asked(rank: int, toy: ToyData, tmp_path: Path) -> None:
    code = f"import os; os.environ['LOCAL_RANK'] = '0'; {MAIN}"  # the first of its host speaks
    (process,) = ranks(
        code, "train", *toy.flags, "--output_dir", str(tmp_path / "run"), which=(rank,)
    )
    assert process.stderr is not None
    limit = threading.Timer(60, process.kill)
    limit.start()
    waits = "waits for an answer" if rank else "waiting at"
    said = next((line for line in process.stderr if waits in line), None)
    assert said is not None
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    ((printed, text),) = outputs([process])
    limit.cancel()
    assert time.monotonic() - begin < 8 and process.returncode == RESUMABLE
    assert text.count("vico:") <= 2 and "frame #" not in text and "Traceback" not in text
    assert "vico: stopped by SIGTERM before the ranks had met" in printed


@pytest.mark.slow
def test_ranks_that_wait_for_another_end_as_asked_also_when_rank_0_goes_first(
    toy: ToyData, tmp_path: Path
) -> None:
    patient = MAIN.replace("SILENCE = 1.0", "SILENCE = 8.0")  # by then all three wait
    processes = ranks(
        patient,
        "train",
        *toy.flags,
        "--output_dir",
        str(tmp_path / "run"),
        world_size=4,
        which=(0, 1, 2),
    )
    assert processes[0].stderr is not None
    timers = [threading.Timer(60, process.kill) for process in processes]
    for timer in timers:
        timer.start()
    assert any(
        "waiting at" in line and "for rank(s) 3 of 4" in line for line in processes[0].stderr
    )
    for process in processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    found = outputs(processes)
    for timer in timers:
        timer.cancel()
    assert [process.returncode for process in processes] == [RESUMABLE] * 3, found
    assert sum("stopped by SIGTERM" in printed for printed, _ in found) == 1
    assert not any("Traceback" in text or "error" in text for _, text in found)


def test_another_program_where_rank_0_should_be_is_not_waited_for_for_ever(
    toy: ToyData, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        code = f"import os; os.environ |= {{'LOCAL_RANK': '0', 'MASTER_PORT': '{mute.getsockname()[1]}'}}; {MAIN}"
        flags = [
            "train",
            *toy.flags,
            "--output_dir",
            str(tmp_path / "run"),
            "--collective_timeout",
            "0.05",
        ]
        (process,) = ranks(code, *flags, which=(1,))
        ((_, text),) = outputs([process])
    assert (
        process.returncode == 5
        and "waits for an answer" in text
        and "nobody answers at 127.0.0.1:" in text
        and "frame #" not in text
    )


def test_ranks_with_other_code_are_refused(toy: ToyData, tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "vico", tmp_path / "other" / "vico", ignore=shutil.ignore_patterns("__pycache__")
    )
    with (tmp_path / "other" / "vico" / "train" / "optim.py").open("a") as file:
        file.write("# pulled on one host only\n")
    begin = time.monotonic()
    processes = ranks(
        MAIN,
        "train",
        *toy.flags,
        "--output_dir",
        str(tmp_path / "run"),
        first=str(tmp_path / "other"),
    )
    (_, text), _ = outputs(processes)
    assert time.monotonic() - begin < 30 + 30  # of a start on a busy machine
    assert [process.returncode for process in processes] == [2, 2] and not (
        tmp_path / "run"
    ).exists()
    errors = [line for line in text.splitlines() if "error" in line]
    assert len(errors) == 1 and errors[0].startswith(
        f"vico: error: the ranks have different code: {socket.gethostname()} (1 rank(s), the first is 1)"
    )
    assert "vico/train/optim.py: " in errors[0]


TOGETHER = """
import json, os, sys, threading, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as torch_dist
from vico.distributed import world as dist
from vico.train import rank_consistency
from vico.train.config import RunConfig
from vico.errors import UserError
from vico.train.rank_consistency import require_same_code, require_same_files

base = Path(sys.argv[1])
world = dist.connect(timedelta(minutes=2))
said = {}
def note(name, check, *arguments):
    try:
        check(world, *arguments)
        said[name] = ""
    except UserError as error:
        said[name] = str(error)
def config(data="data", out=base / "out"):
    return RunConfig(llama_model_path=base / "llama", model="tiny", data_path=base / data, output_dir=out)
note("same", require_same_code, {"seed": 1})
note("settings", require_same_code, {"seed": world.rank, "blr": 0.1})
note("files", require_same_files, config(data=f"data{world.rank}"))
note("same files", require_same_files, config())
os.chdir(base / f"host{world.rank}")  # what each host sees under the same names
rank_consistency.SECONDS_UNTIL_SEEN, rank_consistency.SECONDS_OF_SILENCE = 10, 1
if world.rank == 1:
    threading.Timer(2, Path("late-hidden").rename, ["late"]).start()
begin = time.monotonic()
note("late", require_same_files, config(out=Path("late")))
said["late after"] = time.monotonic() - begin
rank_consistency.SECONDS_UNTIL_SEEN = 2
begin = time.monotonic()
note("output", require_same_files, config(out=Path("apart")))
said["output after"] = time.monotonic() - begin
from deepspeed.utils import groups
clone = groups._clone_world_group()
dist.set_collective_timeout(timedelta(seconds=3))
world.barrier()
if world.rank == 0:
    begin = time.monotonic()
    try:
        torch_dist.all_reduce(torch.ones(1), group=clone)
    except RuntimeError:
        said["gave up after"] = time.monotonic() - begin
    print(json.dumps(said), flush=True)
else:
    time.sleep(10)
os._exit(0)
"""


def test_ranks_with_other_settings_files_or_folders_are_refused_and_waiting_ends(
    toy: ToyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own group, made without a timeout, gives up too once it has been given one.

    And where a build of DeepSpeed's op was killed, no start waits for its lock: nothing is built.
    """
    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    shutil.copytree(toy.llama, tmp_path / "llama")
    for name in ("data", "data0", "data1"):
        shutil.copytree(toy.data, tmp_path / name / "nextqa")
    with (tmp_path / "data1" / "nextqa" / "val.csv").open("a") as file:
        file.write("\n")
    for name in ("host0/late", "host1/late-hidden", "host0/apart"):
        (tmp_path / name / "checkpoint-7").mkdir(parents=True)
        (tmp_path / name / "args.json").write_text("{}")
    ((text, errors), (_, waiting)) = outputs(ranks(TOGETHER, str(tmp_path)))
    assert text.strip(), errors
    said = json.loads(text.splitlines()[-1])
    assert said["same"] == said["same files"] == ""
    assert (
        "the ranks have different settings: " in said["settings"]
        and "--seed: 0 -> 1; give every rank" in said["settings"]
    )
    assert "the ranks have different files: " in said["files"] and "val.csv: " in said["files"]
    # What is seen late, as over NFS, is waited for, once and aloud; a folder that is not shared is refused when the time is over.
    assert said["late"] == "" and 1.5 < said["late after"] < 8
    lines = [line for line in waiting.splitlines() if line.startswith("vico: ")]
    who = f"vico: {socket.gethostname()} (rank 1; 1 of 2 ranks) does not see"
    assert len(lines) == 2 and lines[0].startswith(
        f"{who} late/checkpoint-7 or late/args.json yet, which another host sees; "
    )
    assert lines[1].startswith(f"{who} apart/checkpoint-7 ")
    assert (
        said["output"].startswith("the ranks have different checkpoints: ")
        and 2 <= said["output after"] < 5
    )
    assert "apart: checkpoint-7 -> no checkpoint; apart/args.json: " in said["output"]
    assert 2 < said["gave up after"] < 8
