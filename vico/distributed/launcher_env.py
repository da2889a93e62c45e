"""What the launcher and SLURM say of this process, in its environment: who it is among the ranks, and who else should be there.

Read before torch is loaded, so that words which contradict each other are answered at once, and not after a wait for
ranks that never come.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from vico.errors import UnreachableError, UserError

SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
LAUNCHER_VARIABLES = (
    "TORCHELASTIC_RUN_ID",
    "LOCAL_SIZE",
)  # in the environment of torchrun's ranks, of DeepSpeed's
BATCH_SCRIPT = "SLURM_PROCID"  # SLURM names it there and in steps, not in the shell of salloc
INTERACTIVE_STEP = "4294967290"  # the step of that shell, where the cluster puts it on a node
HINT = "use a script of launch/slurm/, or say the number of ranks by --expect_world_size"


@dataclass(frozen=True)
class SlurmAllocation:
    """What SLURM started; None where nothing follows from it."""

    nodes: int | None = None
    tasks: int | None = None


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """This host as the cluster calls it."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def int_variable(environment: Mapping[str, str], name: str) -> int | None:
    """The whole number of a variable. Raises UserError for anything else."""
    text = environment.get(name) or None
    if text is not None and not text.isdecimal():
        raise UserError(
            f"{name}={text}: must be a whole number; unset it, or let the launcher set it"
        )
    return None if text is None else int(text)


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where no launcher named a rank, take it from an srun step of several tasks or from mpirun, else be alone.

    A shell that a person got from SLURM is a task of its own step too, and stays alone.
    """
    if "RANK" in environment:
        return
    if "OMPI_COMM_WORLD_SIZE" in environment:
        of_mpi = {
            "RANK": "RANK",
            "WORLD_SIZE": "SIZE",
            "LOCAL_RANK": "LOCAL_RANK",
            "LOCAL_WORLD_SIZE": "LOCAL_SIZE",
        }
        environment.update(
            {ours: environment[f"OMPI_COMM_WORLD_{theirs}"] for ours, theirs in of_mpi.items()}
        )
    elif (slurm_allocation(environment).tasks or 1) > 1 and "SLURM_STEP_ID" in environment:
        environment.update(
            {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"]}
        )
        environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
        on_nodes = _counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        node = int_variable(environment, "SLURM_NODEID") or 0
        if node < len(on_nodes):
            environment["LOCAL_WORLD_SIZE"] = str(on_nodes[node])
        environment.setdefault(
            "MASTER_ADDR", _first_host(environment.get("SLURM_STEP_NODELIST", ""))
        )
        job, step = (
            int_variable(environment, name) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")
        )
        environment.setdefault("MASTER_PORT", str(20000 + (job + 1009 * step) % 10000))


def _counts(text: str) -> list[int]:
    """Tasks of each node from SLURM's short form: 2(x3),1 is 2, 2, 2, 1."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _first_host(nodes: str) -> str:
    """The first of SLURM's short form of a list: node[03-05,9],gpu1 begins with node03."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else ""


def slurm_allocation(environment: Mapping[str, str] = os.environ) -> SlurmAllocation:
    """What of a SLURM job this process belongs to: a step of srun, or the whole job in its batch script."""
    if (
        BATCH_SCRIPT not in environment
        or "SLURM_PTY_PORT" in environment
        or environment.get("SLURM_STEP_ID") == INTERACTIVE_STEP
    ):
        return SlurmAllocation()
    if "SLURM_STEP_ID" in environment:
        return SlurmAllocation(
            int_variable(environment, "SLURM_STEP_NUM_NODES"),
            int_variable(environment, "SLURM_STEP_NUM_TASKS"),
        )
    return SlurmAllocation(nodes=int_variable(environment, "SLURM_JOB_NUM_NODES"))


def check_world_size(expected: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Raises UserError where the world that this process is told of cannot be the one it was given."""
    size = int_variable(environment, "WORLD_SIZE") or 1
    rank = int_variable(environment, "RANK") or 0
    if rank >= size:
        raise UnreachableError(
            f"RANK={rank}: must be below WORLD_SIZE={size}; the launcher sets both"
        )
    if expected is not None and size != expected:
        raise UserError(
            f"--expect_world_size {expected}: the launcher made a world of {size} rank(s); start as many, or change the flag"
        )
    there = slurm_allocation(environment)
    if expected is None and "RANK" in environment:
        _check_tasks(size, there, launched=any(name in environment for name in LAUNCHER_VARIABLES))
    if expected is None and size < (there.nodes or 1):
        raise UserError(
            f"SLURM gave {there.nodes} nodes and this world has {size} rank(s), so nodes would be idle or train apart; {HINT}"
        )
    if size > 1:
        _check_master_address(environment)


def _check_tasks(size: int, there: SlurmAllocation, launched: bool) -> None:
    if there.tasks is not None and size < there.tasks:
        raise UserError(
            f"srun started {there.tasks} tasks and this world has {size} rank(s), so they would train apart; {HINT}"
        )
    if there.tasks is not None and size > there.tasks and not launched:
        raise UserError(
            f"WORLD_SIZE={size}: srun started {there.tasks} task(s), and the others would never come; {HINT}"
        )


def _check_master_address(environment: Mapping[str, str]) -> None:
    """An address that no host knows would be a wait for the whole timeout."""
    address, port = environment.get("MASTER_ADDR"), int_variable(environment, "MASTER_PORT")
    if not address or port is None:
        raise UnreachableError(
            "MASTER_ADDR and MASTER_PORT must say where the ranks meet: the first host's name, and a free port of it"
        )
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as problem:
        why = getattr(problem, "strerror", None) or problem
        raise UnreachableError(
            f"MASTER_ADDR={address}: {socket.gethostname()} cannot find that host ({why}); it must be rank 0's host, by a name all know"
        ) from None
