"""The rank variables of this process, as a launcher or SLURM set them in the environment.

Torch is not loaded yet when this module is used. Contradictory variables are an error at once, not
a wait for ranks that never join.
"""

import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from vico.errors import UnreachableError, UserError, show

SINGLE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
LOOPBACK_ADDRESSES = ("127.0.0.1", "::1")
# Of a process that mpirun started: rank, size, local rank, local size.
_NAMES = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")
OPEN_MPI = tuple(f"OMPI_COMM_WORLD_{name}" for name in _NAMES)
MVAPICH = tuple(f"MV2_COMM_WORLD_{name}" for name in _NAMES)
PMI = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # of MPICH and Intel MPI
# Only the ranks of torchrun have the first, only those of DeepSpeed's launcher the second.
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "LOCAL_SIZE")
# SLURM sets it in a batch script and in srun's tasks, not in the shell of salloc.
TASK_VARIABLE = "SLURM_PROCID"
# The step that is the shell of salloc, on clusters that place this shell on a node.
INTERACTIVE_STEP = "4294967290"
RANK_VARIABLES = (*SINGLE_RANK, "MASTER_PORT", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")
MAX_PORT = 65535
MAX_DIGITS = 18  # of an integer variable: int() refuses thousands
# "on": ranks may share a GPU, over gloo, to try several ranks where there is one GPU.
SHARED_GPU_VARIABLE = "VICO_SHARED_GPU"
LAUNCH_HINT = (
    "use a script of launch/slurm/, or confirm the number of ranks with --expect_world_size"
)


def may_share_gpu(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(SHARED_GPU_VARIABLE) == "on"


def is_rank_0() -> bool:
    """Whether this process prints and writes. True before a launcher has set variables."""
    return os.environ.get("RANK", "0") == "0"


def is_on_one_host(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether all ranks are on this host, as far as the launcher's variables tell.

    The name localhost tells nothing: Kubernetes operators give it to rank 0 as its MASTER_ADDR, and
    its real name to the ranks of other hosts.
    """
    size = int_variable(environment, "WORLD_SIZE") or 1
    local_size = local_world_size(environment)
    if local_size is not None or size == 1:
        return size in (1, local_size)
    return environment.get("MASTER_ADDR") in LOOPBACK_ADDRESSES


def local_world_size(environment: Mapping[str, str] = os.environ) -> int | None:
    """The number of ranks on this host, according to the launcher; None where it does not say."""
    local_size = int_variable(environment, "LOCAL_WORLD_SIZE")
    return local_size or int_variable(environment, "LOCAL_SIZE")


def has_peers(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether other ranks may wait at the rendezvous for this one, and can be reached there.

    They do not where the launcher of all ranks ends them as soon as rank 0 has ended.
    """
    rank, size = environment.get("RANK", ""), environment.get("WORLD_SIZE", "")
    port = environment.get("MASTER_PORT", "")
    is_complete = rank.isdecimal() and size.isdecimal() and port.isdecimal()
    if not is_complete or int(size) < 2 or not environment.get("MASTER_ADDR"):
        return False
    has_launcher = any(name in environment for name in LAUNCHER_VARIABLES)
    return int(rank) != 0 or not has_launcher or local_world_size(environment) != int(size)


def launcher_name(environment: Mapping[str, str] = os.environ) -> str:
    """What started this process, as far as its variables tell."""
    for variable, name in (
        ("TORCHELASTIC_RUN_ID", "torchrun"),
        ("LOCAL_SIZE", "deepspeed"),
        (OPEN_MPI[0], "mpirun"),
        (MVAPICH[0], "mpirun"),
        (PMI[0], "mpirun"),
        ("SLURM_STEP_ID", "srun"),
    ):
        if variable in environment:
            return name
    return "another one" if "RANK" in environment else "none"


@dataclass(frozen=True)
class SlurmAllocation:
    """What SLURM started. None: unknown, or not started by SLURM."""

    nodes: int | None = None
    tasks: int | None = None


def host_name(environment: Mapping[str, str] = os.environ) -> str:
    """The name of this host in the cluster."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def int_variable(environment: Mapping[str, str], name: str) -> int | None:
    """The value of an integer variable; None where it is unset or empty. Raises UserError."""
    text = environment.get(name) or None
    if text is None:
        return None
    if not text.isdecimal() or len(text) > MAX_DIGITS:
        hint = "unset it, or let the launcher set it"
        raise UserError(f"{name}={show(text)[1:-1]}: must be a whole number; {hint}")
    return int(text)


def set_rank_variables(environment: MutableMapping[str, str] = os.environ) -> None:
    """Where no launcher set RANK, derive the rank variables from mpirun's or from srun's.

    A single task of srun, and an interactive shell in a SLURM job, stay without a rank. An empty
    variable counts as unset.
    """
    for name in RANK_VARIABLES:
        if environment.get(name) == "":
            del environment[name]
    if "RANK" in environment:
        return
    num_tasks = slurm_allocation(environment).tasks or 1
    is_task = num_tasks > 1 and "SLURM_STEP_ID" in environment
    # srun sets PMI's variables too. With another size they are of an mpirun, which starts one srun
    # task per node.
    has_own_size = int_variable(environment, "PMI_SIZE") not in (None, num_tasks)
    for variables in (OPEN_MPI, MVAPICH, PMI):
        is_rank = all(name in environment for name in variables[:2])
        if is_rank and (variables != PMI or has_own_size or not is_task):
            return _set_from_mpi(environment, variables)
    if is_task:
        _set_from_srun(environment)


def _set_from_mpi(environment: MutableMapping[str, str], variables: tuple[str, ...]) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    for name, variable in zip(names, variables, strict=True):
        if variable in environment:
            environment[name] = environment[variable]


def _set_from_srun(environment: MutableMapping[str, str]) -> None:
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    tasks_of_nodes = _task_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int_variable(environment, "SLURM_NODEID") or 0
    if node < len(tasks_of_nodes):
        environment["LOCAL_WORLD_SIZE"] = str(tasks_of_nodes[node])
    first_host = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    environment.setdefault("MASTER_ADDR", first_host)
    # Derived from job and step, so that two steps on one node use different ports.
    job = int_variable(environment, "SLURM_JOB_ID") or 0
    step = int_variable(environment, "SLURM_STEP_ID") or 0
    environment.setdefault("MASTER_PORT", str(20000 + (job + 1009 * step) % 10000))


def _task_counts(text: str) -> list[int]:
    """The number of tasks on each node, from SLURM's short form: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(repeats or 1)
    return counts


def _first_host(nodes: str) -> str:
    """The first host of SLURM's short form of a list: "node[03-05,9],gpu1" starts with node03."""
    match = re.match(r"([^,\[]+)(?:\[(\d+)[^]]*\]([^,\[]*))?", nodes)
    if match is None:
        return ""
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def slurm_allocation(environment: Mapping[str, str] = os.environ) -> SlurmAllocation:
    """What SLURM started around this process: an srun step, or the job in its batch script."""
    is_shell = (
        "SLURM_PTY_PORT" in environment or environment.get("SLURM_STEP_ID") == INTERACTIVE_STEP
    )
    if TASK_VARIABLE not in environment or is_shell:
        return SlurmAllocation()
    if "SLURM_STEP_ID" not in environment:
        return SlurmAllocation(nodes=int_variable(environment, "SLURM_JOB_NUM_NODES"))
    return SlurmAllocation(
        nodes=int_variable(environment, "SLURM_STEP_NUM_NODES"),
        tasks=int_variable(environment, "SLURM_STEP_NUM_TASKS"),
    )


def check_world_size(expected: int | None, environment: Mapping[str, str] = os.environ) -> None:
    """Compare the launcher's variables with each other, with SLURM and with --expect_world_size.

    Raises UserError where they contradict each other.
    """
    for name in RANK_VARIABLES:
        if name != "MASTER_ADDR":
            int_variable(environment, name)  # raises for a text
    size = int_variable(environment, "WORLD_SIZE") or 1
    rank = int_variable(environment, "RANK") or 0
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        raise UnreachableError(f"RANK={rank}: WORLD_SIZE is not set; the launcher sets both")
    if size > 1 and "RANK" not in environment:
        raise UnreachableError(f"WORLD_SIZE={size}: RANK is not set; the launcher sets both")
    if rank >= size:
        bound = f"must be below WORLD_SIZE={size}"
        raise UnreachableError(f"RANK={rank}: {bound}; the launcher sets both")
    if expected is None:
        _check_against_slurm(size, environment)
    elif size != expected:
        remedy = f"start {expected}, or change the flag"
        raise UserError(
            f"--expect_world_size {expected}: the launcher started {size} rank(s); {remedy}"
        )
    if size > 1 and not (environment.get("MASTER_ADDR") and environment.get("MASTER_PORT")):
        raise UnreachableError(
            "MASTER_ADDR and MASTER_PORT must be set: rank 0's host name and a free port on it"
        )
    _check_master_address(environment)


def _check_against_slurm(size: int, environment: Mapping[str, str]) -> None:
    allocation = slurm_allocation(environment)
    tasks, nodes = allocation.tasks, allocation.nodes or 1
    has_launcher = any(name in environment for name in LAUNCHER_VARIABLES)
    if "RANK" in environment and tasks is not None:
        if size < tasks:
            started = f"srun started {tasks} tasks and the world size is {size}"
            raise UserError(f"{started}, so the tasks would train separately; {LAUNCH_HINT}")
        if size > tasks and not has_launcher:
            started = f"srun started {tasks} task(s), so the other ranks would never join"
            raise UserError(f"WORLD_SIZE={size}: {started}; {LAUNCH_HINT}")
    if size < nodes:
        allocated = f"SLURM allocated {nodes} nodes and the world size is {size}"
        raise UserError(f"{allocated}, so nodes would idle or train separately; {LAUNCH_HINT}")


def _check_master_address(environment: Mapping[str, str]) -> None:
    """Torch would try to reach a host name that does not resolve for the whole timeout."""
    address, port = environment.get("MASTER_ADDR"), int_variable(environment, "MASTER_PORT")
    if port is not None and not 0 < port <= MAX_PORT:
        raise UnreachableError(f"MASTER_PORT={port}: must be a port number from 1 to {MAX_PORT}")
    if not address or "RANK" not in environment:  # then this process meets no other
        return
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or error
        remedy = "set it to the name of rank 0's host that all hosts can resolve"
        raise UnreachableError(
            f"MASTER_ADDR={address}: {socket.gethostname()} cannot resolve it ({why}); {remedy}"
        ) from None
