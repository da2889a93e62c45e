"""What a rank prints, and its exit code, when it fails alone or when another rank was lost.

An error other than a UserError hits one rank; the others only see their collective break. The rank
that failed prints the cause at once and publishes it in the store. The others look it up there, so
that one line in one log says why the run ended. "after" counts from the error:

| rank                                         | prints                   | after | exit code   |
|----------------------------------------------|--------------------------|-------|-------------|
| failed: out of memory, or a worker killed    | the cause                | 0 s   | 4           |
| failed: /dev/shm of its host is full         | the cause, once per host | 0 s   | 4           |
| failed: bad input that it alone has         | the cause, once per host | 0.7 s | 2 to 6      |
| failed for another reason (a bug)            | its traceback            | 0 s   | 1           |
| 0; a cause was published on another host     | that host and its cause  | 2 s   | the cause's |
| 0; a cause was published on its own host     | nothing                  | 2 s   | the cause's |
| 0; no cause was published                    | which ranks exited       | 2 s   | 5           |
| lowest one left on its host; rank 0 is gone  | which ranks exited       | 2 s   | 5           |
| any other; a cause was published             | nothing                  | 2 s   | the cause's |
| any other; no cause, or rank 0 is gone       | nothing                  | 2 s   | 5           |

A rank that is in no collective when another exits is ended in the same way by its watchdog, within
ten seconds.

Rank 0, which hosts the store, and a rank that reports in its place stay for 3 more seconds: some
ranks notice a loss only when those that noticed it first have ended.
"""

import json
import multiprocessing.process
import os
import re
import resource
import signal
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import forkserver

import torch
import torch.distributed as torch_dist

from vico.checkpoint import restart_limit
from vico.data.dataloader import SHARED_MEMORY, WORKERS
from vico.distributed.rendezvous import first_line
from vico.distributed.store_words import read_word
from vico.distributed.topology import machine_id
from vico.distributed.world import World
from vico.errors import (
    DONE,
    EXIT_CODES,
    INTERNAL_ERROR,
    INTERRUPTED,
    RESUMABLE,
    PeerLostError,
    TrainingError,
    UserError,
    missing_package,
    one_line,
)
from vico.io import log

# A killed process closes its connections a moment before it has exited.
EXIT_SECONDS = 0.7
# After this time, EXIT_SECONDS included, the failed rank has published its cause.
CAUSE_SECONDS = 2.0
LINGER_SECONDS = 3.0
# A killed data worker breaks its connections a moment before its server reports its exit.
WORKER_EXIT_SECONDS = 1.0
KEY = "vico cause"
NO_FAILURES = (DONE, RESUMABLE, INTERRUPTED)
RESUME_HINT = "rerun the same command to resume from the latest checkpoint"
ENDED_WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) (?:is killed by signal|exited unexpectedly)"
)
# Why a data worker ends, by its exit code: a signal's is negative.
WORKER_CAUSES = {
    -signal.SIGKILL: "it comes from outside: from the kernel where memory ran out (then lower "
    "--num_workers, or give the job more), or from a person or program",
    -signal.SIGBUS: "/dev/shm ran out, or a feature file was truncated while it was read",
    1: "/dev/shm ran out (use --num_workers 0, or give a container more), or the lines above tell "
    "its error",
}
CRASH = "a crash of native code; --num_workers 0 shows the place in the rank itself"
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE)
UNKNOWN_CODE = 255  # multiprocessing's, where the server of the workers is gone
# gloo and NCCL report a lost peer by words in a RuntimeError only.
LOST_PEER_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "NCCL",
)
MODEL_REMEDY = "use --deepspeed zero3 or zero3_offload, more GPUs, or fewer ranks on this host"
HOST_REMEDY = "use fewer ranks on this host, or a host with more memory"
BATCH_REMEDY = "use --deepspeed zero3 or zero3_offload, or fewer ranks on this host"
STEP_REMEDY = (
    "lower --batch_size and raise --accum_iter, "
    "or use --max_tokens or --checkpoint_activations full"
)
# Against too little memory, by a word of the phase that the rank was in.
REMEDIES = {
    "loading": MODEL_REMEDY,
    "building": MODEL_REMEDY,
    "reading": HOST_REMEDY,
    "saving": HOST_REMEDY,
    "batch": BATCH_REMEDY,
}


@dataclass(frozen=True)
class Cause:
    """Why a run ended, as its rank publishes it."""

    host: str
    line: str
    code: int  # the exit code of every rank
    pid: int
    machine: str

    def __post_init__(self) -> None:
        if self.code in NO_FAILURES or self.code not in EXIT_CODES:
            raise ValueError(f"code {self.code}: ends no run that failed")


def report(world: World, error: Exception, debug: bool) -> int:
    """Print why this rank ends, where it is this rank's turn; returns the exit code.

    Not a collective: other ranks may be gone.
    """
    if isinstance(error, UserError):
        return _end_with_user_error(world, error, debug)
    error = _wait_for_worker_exit(error)
    if is_lost_peer(error) and not debug:
        return _on_peer_lost(world, error)
    cause = known_cause(error, world)
    if cause is None or debug:
        traceback.print_exception(error)
    if cause is None:
        return _end_with_bug(world, error)
    return _end_with_known_cause(world, error, cause)


# ---- this rank failed --------------------------------------------------------------------------


def _end_with_bug(world: World, error: Exception) -> int:
    problem = f"{type(error).__name__}: {one_line(first_line(error))}"
    line = f"rank {world.rank} failed with {problem}; its traceback is in its log"
    restart_limit.record_failure()
    _publish_cause(world, line, INTERNAL_ERROR)
    _linger(is_needed=world.is_main and world.size > 1)
    return INTERNAL_ERROR


def _end_with_user_error(world: World, error: UserError, debug: bool) -> int:
    """Of this rank alone, as far as it knows: where others have the same one, it is said once."""
    if not world.is_main:
        time.sleep(EXIT_SECONDS)  # rank 0 goes first
    restart_limit.record_failure()
    if _publish_cause(world, str(error), error.exit_code):
        if debug:
            traceback.print_exception(error)
        log.error(error.details)
    _linger(is_needed=world.is_main and world.size > 1)
    return error.exit_code


def _end_with_known_cause(world: World, error: Exception, cause: UserError) -> int:
    line = str(cause)
    restart_limit.record_failure()
    names_host_only = isinstance(error, OSError)  # then all ranks of the host have the same line
    if not names_host_only:
        log.error(one_line(line))
    is_new = _publish_cause(world, line, cause.exit_code)
    if names_host_only and is_new:
        log.error(one_line(line))
    _linger(is_needed=world.is_main and world.size > 1)
    return cause.exit_code


def _publish_cause(world: World, line: str, code: int) -> bool:
    """Publish the cause unless another rank was faster.

    Returns False where a rank of this host has published the same line, else True.
    """
    own = Cause(socket.gethostname(), one_line(line), code, os.getpid(), machine_id())
    if world.store is None:
        return True
    with suppress(RuntimeError):  # rank 0 is gone, and the store with it
        stored = world.store.compare_set(KEY, "", json.dumps(asdict(own)))
        first = read_word(Cause, stored)
        if first is None or (first.machine, first.pid) == (own.machine, own.pid):
            return True
        return (first.machine, first.line) != (own.machine, own.line)
    return True


def _linger(is_needed: bool) -> None:
    if is_needed:
        time.sleep(LINGER_SECONDS)


# ---- another rank was lost ---------------------------------------------------------------------


def is_lost_peer(error: Exception) -> bool:
    """Whether a collective failed because another rank is gone."""
    if isinstance(error, torch_dist.DistError):
        return True
    has_sign = any(sign in str(error) for sign in LOST_PEER_SIGNS)
    return isinstance(error, RuntimeError) and has_sign


def on_peer_exit(world: World) -> int:
    """For the watchdog: a rank has exited, and the main thread of this one waits or computes."""
    return _on_peer_lost(world, RuntimeError())


def _on_peer_lost(world: World, error: Exception) -> int:
    time.sleep(EXIT_SECONDS)
    exited = _exited_ranks(world)
    # Decided now: in a moment the ranks below this one may have ended by themselves.
    speaks_for_host = world.watchdog is None or world.watchdog.speaks_for_host()
    time.sleep(CAUSE_SECONDS - EXIT_SECONDS)
    reports = world.is_main
    cause = None
    try:
        cause = _read_cause(world)
    except RuntimeError:  # rank 0 is gone, and the store with it
        reports = speaks_for_host
    if reports and cause is None:
        log.error(one_line(_describe_loss(world, error, exited or _exited_ranks(world))))
    elif reports and cause is not None and cause.machine != machine_id():
        log.error(one_line(f"{cause.host}: {cause.line}"))
    _linger(is_needed=reports)
    return PeerLostError.exit_code if cause is None else cause.code


def _exited_ranks(world: World) -> list[str]:
    return [] if world.watchdog is None else world.watchdog.exited_ranks()


def _read_cause(world: World) -> Cause | None:
    """Raises RuntimeError where the store is gone."""
    assert world.store is not None
    if not world.store.check([KEY]):
        return None
    return read_word(Cause, world.store.get(KEY))


def _describe_loss(world: World, error: Exception, exited: list[str]) -> str:
    event = f"{', '.join(exited) or 'a peer rank'} exited"
    if not exited and "NCCL" in str(error):  # then it may be a wrong setting, and all ranks alive
        event += f", or NCCL failed ({first_line(error)})"
    return (
        f"{event} while {world.phase}, which ends this run; "
        f"see the lines above, or the log of that rank; {RESUME_HINT}"
    )


# ---- known causes ------------------------------------------------------------------------------


def _wait_for_worker_exit(error: Exception) -> Exception:
    """torch's error for a data worker that exited, where `error` is a connection that it broke.

    torch looks once whether a worker has exited, which can be too early. It may also raise its
    error by a signal.
    """
    if not isinstance(error, EOFError | ConnectionError):
        return error
    deadline = time.monotonic() + WORKER_EXIT_SECONDS
    try:
        while time.monotonic() < deadline:
            # Not active_children(): it forgets a worker that has exited.
            for worker in list(multiprocessing.process._children):  # type: ignore[attr-defined]
                if worker.exitcode:
                    ended = f"DataLoader worker (pid(s) {worker.pid}) exited unexpectedly"
                    return RuntimeError(ended)
            time.sleep(0.01)
    except RuntimeError as worker_error:
        return worker_error
    return error


def known_cause(error: Exception, world: World) -> UserError | None:
    """The message for an error that is not a bug of ViCo; None for any other."""
    if isinstance(error, ModuleNotFoundError):
        return missing_package(error)
    if match := ENDED_WORKER.search(str(error)):
        return _ended_worker([int(pid) for pid in match[1].split(",") if pid.strip()], world)
    if isinstance(error, OSError) and error.filename == SHARED_MEMORY:
        return _full_shared_memory(error)
    if isinstance(error, torch.OutOfMemoryError):
        peak_bytes = torch.cuda.max_memory_reserved()
        return _out_of_memory("GPU", peak_bytes, world)
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        peak_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return _out_of_memory("host", peak_bytes, world)
    return None


def _ended_worker(pids: list[int], world: World) -> TrainingError:
    """Names what was seen: the exit code or signal, of the worker or of its server."""
    codes = [worker.exitcode for worker in WORKERS if worker.pid in pids]
    code = next((code for code in codes if code), UNKNOWN_CODE)
    shown = ", ".join(map(str, pids))
    who = f"a data worker of rank {world.rank} on {socket.gethostname()} (process {shown})"
    if code == UNKNOWN_CODE:
        server, code = _ended_server()
        who = f"{server} and with it {who}" if server else who
    end = f"ended with code {code}" if code >= 0 else f"was ended by {_signal_name(-code)}"
    if code == UNKNOWN_CODE:
        end = "exited unexpectedly, and its exit code is not known"
    why = CRASH if code in CRASHES else WORKER_CAUSES.get(code, "")
    hint = f"{why}; " if why else ""
    return TrainingError(f"{who} {end} while {world.phase}; {hint}{RESUME_HINT}")


def _ended_server() -> tuple[str, int]:
    """(the server that data workers are forked from, its exit code), where it has ended."""
    pid = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    with suppress(ChildProcessError):
        # WNOWAIT: Python's own wait, which starts another server, still finds it.
        end = os.waitid(os.P_PID, pid or 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is not None:
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            return f"the server of the data workers (process {pid})", code
    return "", UNKNOWN_CODE


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _full_shared_memory(error: OSError) -> TrainingError:
    return TrainingError(
        f"{SHARED_MEMORY} of {socket.gethostname()} has no room for the batches of data workers "
        f"({error.strerror}); free some of it, give a container more (docker run --shm-size), "
        "or use --num_workers 0"
    )


def _out_of_memory(kind: str, peak_bytes: int, world: World) -> TrainingError:
    return TrainingError(
        f"rank {world.rank} on {socket.gethostname()} is out of {kind} memory while {world.phase} "
        f"(peak {peak_bytes / 2**30:.2f} GiB); {_memory_remedy(world.phase)}; "
        "`vico plan` shows what fits"
    )


def _memory_remedy(phase: str) -> str:
    if "micro-batch" not in phase:
        for word, remedy in REMEDIES.items():
            if word in phase:
                return remedy
    return STEP_REMEDY
