"""Ranks that are killed or hang: the others end with one line that names them; the run resumes."""

import functools
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from torch._C._distributed_c10d import PrefixStore, TCPStore

from faults.interrupted import (
    ENDLESS,
    assert_same_end,
    interrupt,
    steps_done,
    train_command,
)
from support.processes import Processes, run_command, start, succeeds
from support.toy_dataset import ToyData


def kill_all(run: Processes) -> None:
    for process in run.processes:
        process.kill()


def listening(run: Processes) -> set[tuple[str, int]]:
    """Addresses and ports on which the ranks accept connections."""
    addresses = set()
    for process in run.processes:
        for connection in psutil.Process(process.pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                addresses.add((connection.laddr.ip, connection.laddr.port))
    return addresses


@pytest.mark.slow
def test_killed_ranks_resume(toy: ToyData, undisturbed: Path, tmp_path: Path) -> None:
    """From the last save, to the bits of the undisturbed run."""
    out = tmp_path / "out"
    command = train_command(toy, 2, out)
    run = interrupt(command, 2, lambda: steps_done(out) >= 5, kill_all)
    assert run.codes == [-9, -9] and (out / "checkpoint-4").exists()
    assert "resuming from step" in succeeds(*command, ranks=2).stdouts[0]
    assert_same_end(out, undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gets_on(toy: ToyData, tmp_path: Path) -> None:
    """Four times in its third step: no start is refused, and each saves sooner."""
    out = tmp_path / "out"
    command = train_command(toy, 1, out, "--save_steps", "100")
    for kill in range(4):
        run = start(*command, ranks=1, environment={"VICO_FAILPOINT": "step@3=sleep 100"})
        assert run.wait_until(functools.partial(_is_held, run)), run.output
        run.kill()
        assert (out / "checkpoint-1").exists() == (kill > 0), run.output
    assert "resuming from step" in succeeds(*command).stdouts[0]


def _is_held(run: Processes) -> bool:
    return "vico: failpoint" in run.output


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_ends_the_run(toy: ToyData, tmp_path: Path, rank: int) -> None:
    """--hang_timeout is 6 s. The stopped rank is named, and does not stay behind.

    Somebody writes garbage and an innocent's process number into the store: nothing comes of it.
    """
    out = tmp_path / "out"
    run = start(*train_command(toy, 2, out, *ENDLESS, "--hang_timeout", "0.1"), ranks=2)
    assert run.wait_until(lambda: steps_done(out) >= 3), run.output
    assert {address for address, _ in listening(run)} == {"127.0.0.1"}
    port = int(psutil.Process(run.processes[0].pid).environ()["MASTER_PORT"])
    assert ("127.0.0.1", port) in listening(run)
    run.processes[rank].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    innocent = subprocess.Popen(["sleep", "60"])
    if rank == 1:  # a stopped rank 0 takes the store with it
        store = PrefixStore("vico/0", TCPStore("127.0.0.1", port, 2, False))
        store.set("watchdog 0", "{garbage")
        claim = {"tick": 1, "idle_seconds": 9.0, "phase": "", "host": socket.gethostname()}
        store.set("watchdog 1", json.dumps(claim | {"pid": innocent.pid}))
    run.wait(60)
    assert time.monotonic() - began < 6 + 5
    assert innocent.poll() is None and "Exception in thread" not in run.output, run.output
    innocent.kill()
    innocent.wait()
    assert run.codes[1 - rank] == 5 and run.codes[rank] == -9
    error = run.stderrs[1 - rank]
    assert f"rank {rank} on " in error
    assert f"(process {run.processes[rank].pid}) is not responding" in error
    assert "vico/train/loop.py" in error  # the stacks


@pytest.mark.slow
def test_the_first_rank_left_speaks(toy: ToyData, tmp_path: Path) -> None:
    """Ranks 0 and 1 of 4 are killed: rank 2 names them, and rank 3 is silent."""
    out = tmp_path / "out"
    run = start(*train_command(toy, 4, out, *ENDLESS, "--num_workers", "0"), ranks=4)
    assert run.wait_until(lambda: steps_done(out) >= 2), run.output
    for process in run.processes[:2]:
        process.kill()
    run.wait(30)
    assert run.codes == [-9, -9, 5, 5], run.output
    assert run.stderrs[2].count("\n") == 1 and run.stderrs[3] == "", run.output
    rank_0 = f"rank 0 on {socket.gethostname()} (process {run.processes[0].pid})"
    assert f"{rank_0}, rank 1 on " in run.stderrs[2]


def test_a_killed_rank_is_one_line(toy: ToyData, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start(*train_command(toy, 2, out, *ENDLESS, "--num_workers", "1"), ranks=2)
    assert run.wait_until(lambda: steps_done(out) >= 3), run.output
    helpers = []
    for process in run.processes:
        helpers += psutil.Process(process.pid).children(recursive=True)
    run.processes[1].kill()
    run.wait(30)
    assert run.codes == [5, -9] and run.stderrs[1] == "", run.output
    # Data workers, their server, and Python's resource tracker.
    assert len(helpers) >= 6 and not psutil.wait_procs(helpers, timeout=5)[1]
    assert run.stderrs[0].count("\n") == 1
    assert f"(process {run.processes[1].pid}) exited while" in run.stderrs[0]


EXIT = """
import os, signal, sys, time
import torch.distributed
from vico.cli import main
from vico.cli.flags import CommandLine
from vico.cli.with_world import with_world
from vico.distributed import world as connecting

def end_rank_1(*_):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)

def work(world):
    end_rank_1()
    if sys.argv[1] == "alone":
        time.sleep(60)
    torch.distributed.new_group()

if sys.argv[1] == "connecting":
    initialize = connecting._init_process_groups
    connecting._init_process_groups = lambda world: end_rank_1() or initialize(world)
main._run = lambda command, argv: with_world(CommandLine({}, [], False), work)
main.console()
"""


@pytest.mark.parametrize(
    "phase",
    [
        pytest.param("connecting", marks=pytest.mark.slow),
        pytest.param("alone", marks=pytest.mark.slow),
        "making a group",
    ],
)
def test_the_end_of_a_peer_is_seen_in_every_phase(phase: str) -> None:
    """Within seconds, --hang_timeout being 20 minutes; rank 0 names it."""
    run = start(phase, ranks=2, program=("-c", EXIT))
    assert run.wait_until(lambda: run.processes[1].poll() is not None, 60)
    began = time.monotonic()
    run.wait(60)
    assert run.codes == [5, -9] and time.monotonic() - began < 20, run.output
    assert len(run.errors) == 1, run.output
    assert f"(process {run.processes[1].pid}) exited while" in run.errors[0]


START_WORKER = """
import os, pickle, sys
from multiprocessing import forkserver
from vico.data.dataloader import start_forkserver
start_forkserver()
worker, to_worker = forkserver.connect_to_new_process([])
os.write(to_worker, eval(sys.argv[1]))
os.close(to_worker)
assert len(os.read(worker, 8)) == 8  # its process number
assert os.read(worker, 8) and not os.read(worker, 8)  # its end
"""


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("b''", marks=SLOW),
        pytest.param("b'half'", marks=SLOW),
        "pickle.dumps({'name': 'x' * 99})[:50]",
    ],
)
def test_a_rank_killed_while_it_starts_a_worker(message: str) -> None:
    """The worker receives nothing, or half of its orders, and ends in silence."""
    run = run_command([sys.executable, "-c", START_WORKER, message], seconds=60)
    assert (run.codes, run.stdouts, run.stderrs) == ([0], [""], [""])
