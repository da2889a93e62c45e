"""Ranks that wait for other ranks at the start: what they log, and how the wait ends."""

import re
import signal
import socket
import time
from pathlib import Path

import pytest

from support.processes import Processes, free_port, start
from support.toy_dataset import ToyData
from vico.errors import RESUMABLE, UnreachableError, UserError
from vico.io.output_dir import OutputDir

TIMEOUT_SECONDS = 120.0
START_SECONDS = 60.0
# A rank that is told to stop ends within this time, of which 2 s are those of a lost rank 0.
STOP_SECONDS = 8.0
# Prints its hints after SILENT_SECONDS; as `vico` otherwise.
PROGRAM = """
from vico.cli import main, with_world
from vico.distributed import rendezvous
rendezvous.SILENT_SECONDS = {silent_seconds}
with_world.SECONDS_FOR_RANK_0 = 1.0
main.console()
"""
IMPATIENT = ("-c", PROGRAM.format(silent_seconds=1.0))
# Just before SHORT_TIMEOUT: on a busy machine another rank may start seconds after rank 0.
LESS_PATIENT = ("-c", PROGRAM.format(silent_seconds=2.5))
PATIENT = ("-c", PROGRAM.format(silent_seconds=8.0))
FIRST_OF_ITS_HOST = {"LOCAL_RANK": "0"}  # it speaks in place of a missing rank 0
SHORT_TIMEOUT = ("--collective_timeout", "0.05")  # minutes


def train_flags(toy: ToyData, folder: Path) -> list[str]:
    return ["train", *toy.flags, "--output_dir", str(folder / "run")]


def has_no_trace(run: Processes) -> bool:
    """Neither Python's traceback nor torch's C++ stack frames."""
    return "Traceback" not in run.output and "frame #" not in run.output


def test_missing_ranks_are_named(toy: ToyData, tmp_path: Path) -> None:
    flags = [*train_flags(toy, tmp_path), *SHORT_TIMEOUT]
    run = start(*flags, ranks=4, only=(0, 2), program=LESS_PATIENT)
    assert run.wait(TIMEOUT_SECONDS) == [5, 5]
    hint, error = [line for line in run.stderrs[0].splitlines() if line.startswith("vico: ")]
    assert hint.startswith("vico: waiting at 127.0.0.1:")
    assert "for ranks 1, 3 of 4; at most 3 s" in hint
    assert error.startswith("vico: error: rendezvous timed out after 3 s: ranks 1, 3 of 4 did not ")
    assert "did not join 127.0.0.1:" in error
    assert "Traceback" not in run.output and not (tmp_path / "run").exists()


def test_missing_rank_0_is_reported_by_another(toy: ToyData, tmp_path: Path) -> None:
    flags = [*train_flags(toy, tmp_path), *SHORT_TIMEOUT]
    rank_1 = {1: FIRST_OF_ITS_HOST}
    run = start(*flags, ranks=2, only=(1,), program=IMPATIENT, rank_environments=rank_1)
    assert run.wait(TIMEOUT_SECONDS) == [5] and has_no_trace(run)
    host, text = socket.gethostname(), run.stderrs[0]
    assert f"vico: [rank 1] {host} is waiting for rank 0 at 127.0.0.1:" in text
    assert f"vico: error: {host}: rank 0 did not answer at 127.0.0.1:" in text
    assert issubclass(UnreachableError, UserError)


@pytest.mark.parametrize("rank", [0, 1])
def test_waiting_rank_stops_on_request(rank: int, toy: ToyData, tmp_path: Path) -> None:
    flags = train_flags(toy, tmp_path)
    own = {rank: FIRST_OF_ITS_HOST}
    run = start(*flags, ranks=2, only=(rank,), program=IMPATIENT, rank_environments=own)
    hint = "is waiting for rank 0" if rank else "waiting at"
    assert run.wait_until(lambda: hint in run.stderrs[0], START_SECONDS), run.output
    run.processes[0].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert run.wait(TIMEOUT_SECONDS) == [RESUMABLE]
    assert time.monotonic() - begin < STOP_SECONDS
    assert run.stderrs[0].count("vico:") <= 2 and has_no_trace(run)
    assert "vico: stopped by SIGTERM before the rendezvous" in run.stdouts[0]


@pytest.mark.slow
def test_waiting_ranks_stop_when_rank_0_ends_first(toy: ToyData, tmp_path: Path) -> None:
    flags = train_flags(toy, tmp_path)
    # By the time of the hint all three ranks wait for the fourth.
    run = start(*flags, ranks=4, only=(0, 1, 2), program=PATIENT)
    hint = re.compile("waiting at .* for rank 3 of 4")
    assert run.wait_until(lambda: bool(hint.search(run.stderrs[0])), START_SECONDS), run.output
    for process in run.processes:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert run.wait(TIMEOUT_SECONDS) == [RESUMABLE] * 3, run.output
    assert sum("stopped by SIGTERM" in text for text in run.stdouts) == 1
    assert not any("Traceback" in text or "error" in text for text in run.stderrs)


def test_another_program_on_the_port(toy: ToyData, tmp_path: Path) -> None:
    """It accepts connections and says nothing. The wait for it ends."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        port = str(mute.getsockname()[1])
        rank_1 = {**FIRST_OF_ITS_HOST, "MASTER_PORT": port}
        flags = [*train_flags(toy, tmp_path), *SHORT_TIMEOUT]
        run = start(*flags, ranks=2, only=(1,), program=IMPATIENT, rank_environments={1: rank_1})
        assert run.wait(TIMEOUT_SECONDS) == [5]
    assert "is waiting for rank 0" in run.stderrs[0]
    assert "rank 0 did not answer at 127.0.0.1:" in run.stderrs[0]
    assert "frame #" not in run.stderrs[0]


OTHER_HOST = """
import socket, sys
socket.gethostname = lambda: "far"
sys.argv[1:] = [*sys.argv[1:], "--batch_size", "-1"]
from vico.cli import main
main.console()
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_rank_reaches_the_others(
    failing: int, toy: ToyData, tmp_path: Path
) -> None:
    """Before the ranks have met: the first rank of its host prints it, and rank 0 in any case."""
    flags = train_flags(toy, tmp_path)
    programs = [("-m", "vico"), ("-m", "vico")]
    programs[failing] = ("-c", OTHER_HOST)
    port, runs = str(free_port()), []
    for rank in (0, 1):
        own = {"LOCAL_RANK": "0", "MASTER_PORT": port}
        runs.append(
            start(
                *flags, ranks=2, only=(rank,), program=programs[rank], rank_environments={rank: own}
            )
        )
    begin = time.monotonic()
    assert [run.wait(TIMEOUT_SECONDS) for run in runs] == [[2], [2]]
    assert time.monotonic() - begin < TIMEOUT_SECONDS / 2
    own, other = runs[failing].stderrs[0], runs[1 - failing].stderrs[0]
    assert own.startswith("vico: error: --batch_size -1: must be ") and own.count("\n") == 1
    assert other == f"vico: error: rank {failing} on far: {own.removeprefix('vico: error: ')}"


def test_a_second_writer_takes_its_peer_along(toy: ToyData, tmp_path: Path) -> None:
    """Rank 0 is refused before the rendezvous; its bare peer ends within seconds, in silence."""
    out = OutputDir(tmp_path / "run")
    out.lock()
    out.args.write_text("{}")
    run = start(*train_flags(toy, tmp_path), ranks=2)
    assert run.wait(TIMEOUT_SECONDS) == [6, 6], run.output
    assert "in use by " in run.stderrs[0] and run.stderrs[0].count("\n") == 1
    assert run.stderrs[1] == ""
