"""What ended a run that no UserError ended: a lost rank, no more memory, a killed data worker, or a mistake of ours.

Such an end comes to one rank alone, while the others wait for it. It says its cause at once and leaves it in the store;
the others read it there instead of adding a line about the exchange that broke off.
"""

import json
import os
import re
import resource
import socket
import sys
import time
import traceback
from contextlib import suppress

import torch
import torch.distributed as torch_dist

from vico.data.dataloader import SHARED_MEMORY
from vico.distributed.rendezvous import first_line
from vico.distributed.world import World
from vico.errors import INTERNAL_ERROR, PeerLostError, TrainingError, UserError, one_line

SECONDS_FOR_THE_CAUSE = 2.0  # the rank that failed speaks before those that lost it
SECONDS_TO_END = 0.7  # of a killed process, which lets go of its connections first
SECONDS_FOR_THE_LAST = 3.0  # more than the first that knew have waited
SECONDS_FOR_A_SIGNAL = 1.0
KEY = "vico cause"
WORKER = re.compile(
    r"DataLoader worker \(pid\(?s?\)? ?([\d, ]+)\) (?:is killed by signal: ([^.]*)|exited unexpectedly)"
)
# What to do against too little memory, by the phase that a rank says it is in.
REMEDIES = {
    "loading": "use --deepspeed zero3 or zero3_offload, more GPUs, or fewer ranks on this host",
    "building": "use --deepspeed zero3 or zero3_offload, more GPUs, or fewer ranks on this host",
    "reading": "use fewer ranks on this host, or a host with more memory",
    "saving": "use fewer ranks on this host, or a host with more memory",
    "batch": "use --deepspeed zero3 or zero3_offload, or fewer ranks on this host",
}
STEP_REMEDY = "lower --batch_size and raise --accum_iter, or use --max_tokens or --checkpoint_activations full"


def end(world: World, problem: Exception, debug: bool) -> int:
    """Say what ended this rank, or leave it to the rank that knows; returns the exit code. Called on this rank alone."""
    problem = _of_a_worker(problem)
    if is_lost_peer(problem) and not debug:
        return _on_peer_lost(world, problem)
    fault = _known(problem, world)
    if fault is None or debug:
        traceback.print_exception(problem)
    if fault is None:
        _publish_cause(
            world,
            f"rank {world.rank} ended with {type(problem).__name__}: {one_line(first_line(problem))}; its traceback is in its log",
            INTERNAL_ERROR,
        )
        _linger(world.is_main and world.size > 1)
        return INTERNAL_ERROR
    of_host = isinstance(problem, OSError)  # its line names no rank: once for a host is enough
    if not of_host:
        _say(str(fault))
    if _publish_cause(world, str(fault), fault.exit_code) and of_host:
        _say(str(fault))
    _linger(world.is_main and world.size > 1)
    return fault.exit_code


def _linger(so: bool) -> None:
    """Rank 0, with whom the store goes, and who has spoken without it: some learn of a loss only when those that knew have ended."""
    if so:
        time.sleep(SECONDS_FOR_THE_LAST)


def _of_a_worker(problem: Exception) -> Exception:
    """Who takes data from a worker that is being killed can meet its silence before the news, which torch raises by a signal."""
    if isinstance(problem, EOFError | ConnectionError):
        try:
            time.sleep(SECONDS_FOR_A_SIGNAL)
        except RuntimeError as news:
            return news
    return problem


def _known(problem: Exception, world: World) -> UserError | None:
    """The line for what is not ours to mend."""
    text = str(problem)
    if found := WORKER.search(text):
        pids, signal_name = found[1], found[2]
        how = f"was killed ({signal_name.strip()})" if signal_name else "ended unexpectedly"
        return TrainingError(
            f"a data worker of rank {world.rank} on {socket.gethostname()} (process {pids}) {how} while {world.phase}; the kernel does that "
            "when memory or /dev/shm runs out: lower --num_workers, or give the job more of it; or when a feature file is cut off meanwhile"
        )
    if isinstance(problem, OSError) and problem.filename == SHARED_MEMORY:
        return TrainingError(
            f"{SHARED_MEMORY} of {socket.gethostname()} has no room for what data workers and their rank share ({problem.strerror}); free "
            "some of it, give a container more (docker run --shm-size), or use --num_workers 0"
        )
    if isinstance(problem, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text:
        where = "GPU" if isinstance(problem, torch.OutOfMemoryError) else "host"
        knob = next(
            (
                advice
                for word, advice in REMEDIES.items()
                if word in world.phase and "micro-batch" not in world.phase
            ),
            STEP_REMEDY,
        )
        return TrainingError(
            f"rank {world.rank} on {socket.gethostname()} is out of {where} memory while {world.phase} (peak {_peak(where)}); {knob}; "
            "`vico plan` says what fits"
        )
    return None


def _peak(where: str) -> str:
    used = (
        torch.cuda.max_memory_reserved()
        if where == "GPU"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    return f"{used / 2**30:.2f} GiB"


def is_lost_peer(problem: Exception) -> bool:
    """Whether an exchange failed because another rank has gone: gloo and NCCL say so in words only."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "remote process exited",
        "NCCL",
    )
    return isinstance(problem, torch_dist.DistError) or (
        isinstance(problem, RuntimeError) and any(sign in str(problem) for sign in signs)
    )


def _on_peer_lost(world: World, problem: Exception) -> int:
    """Another rank has ended. Rank 0 says so, or why; where it has gone, and the store with it, the first that is left on each host."""
    time.sleep(SECONDS_TO_END)
    gone, first_here = [], True
    if world.watchdog is not None:
        gone, first_here = world.watchdog.gone(), world.watchdog.is_first_here()
    time.sleep(SECONDS_FOR_THE_CAUSE - SECONDS_TO_END)
    speaks, cause = world.is_main, None
    try:
        assert world.store is not None
        if world.store.check([KEY]):
            cause = json.loads(world.store.get(KEY))
    except RuntimeError:
        speaks = first_here
    if cause is not None:
        if (
            speaks and cause["host"] != socket.gethostname()
        ):  # there it stands in another log, or on another terminal
            _say(f"{cause['host']}: {cause['line']}")
        _linger(speaks)
        return int(cause["code"])
    if speaks:
        if not gone and world.watchdog is not None:
            gone = world.watchdog.gone()
        who = f"{', '.join(gone)} has ended" if gone else "another rank has ended"
        if not gone and "NCCL" in str(problem):  # which can be its setting, and no rank's end
            who += f", or NCCL failed ({one_line(first_line(problem))})"
        _say(
            f"{who} while {world.phase}, and this run with it; a line above, or the log of that rank, may say why; "
            "the same command goes on at the last checkpoint"
        )
    _linger(speaks)
    return PeerLostError.exit_code


def _publish_cause(world: World, line: str, code: int) -> bool:
    """For the others to read, where none was faster; whether another of this host has not said the very same."""
    ours = {"host": socket.gethostname(), "line": line, "code": code, "pid": os.getpid()}
    with suppress(RuntimeError):  # the keeper of the store has gone
        if world.store is not None:
            first = json.loads(world.store.compare_set(KEY, "", json.dumps(ours)))
            return first["pid"] == ours["pid"] or (first["host"], first["line"]) != (
                ours["host"],
                ours["line"],
            )
    return True


def _say(line: str) -> None:
    print(f"vico: error: {one_line(line)}", file=sys.stderr, flush=True)
