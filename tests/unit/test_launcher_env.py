"""The rank variables: from srun and mpirun, and checked against each other."""

import pytest

from support.errors import refusal
from vico.distributed import launcher_env

# The batch script of a job of two nodes.
BATCH = {
    "SLURM_JOB_ID": "712",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_NUM_NODES": "2",
}
# Task 3 of 4 of an srun step of that job.
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
SALLOC_SHELL = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "2", "SLURM_JOB_NUM_NODES": "2"}
SHELL_ON_A_NODE = {**STEP, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}
SRUN_PTY = {**STEP, "SLURM_PTY_PORT": "40000"}
SINGLE_TASK = {**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
RANK = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "4",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


def added_variables(environment: dict[str, str]) -> dict[str, str]:
    """What set_rank_variables adds to this environment."""
    changed = dict(environment)
    launcher_env.set_rank_variables(changed)
    return {name: value for name, value in changed.items() if name not in environment}


def test_srun_task_is_a_rank() -> None:
    added = added_variables(STEP)
    port = added.pop("MASTER_PORT")
    assert added == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "gpu07",
    }
    assert 20000 <= int(port) < 30000
    assert port != added_variables({**STEP, "SLURM_JOB_ID": "713"})["MASTER_PORT"]
    assert "MASTER_ADDR" not in added_variables({**STEP, "MASTER_ADDR": "other"})
    uneven = {**STEP, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert added_variables(uneven)["LOCAL_WORLD_SIZE"] == "1"


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
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert added_variables({**STEP, "SLURM_STEP_NODELIST": nodes})["MASTER_ADDR"] == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SALLOC_SHELL,
        SHELL_ON_A_NODE,
        SRUN_PTY,
        SINGLE_TASK,
        BATCH,
        {**STEP, "RANK": "0"},  # torchrun in a task
    ],
)
def test_environment_without_new_rank(environment: dict[str, str]) -> None:
    assert added_variables(environment) == {}


def test_mpirun_process_is_a_rank() -> None:
    mpi = {
        "OMPI_COMM_WORLD_RANK": "1",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    }
    added = added_variables(mpi)
    assert added == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    message = refusal(launcher_env.check_world_size, None, {**mpi, **added})
    assert "MASTER_ADDR and MASTER_PORT must be set" in message


MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
AS_MPICH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        (MPICH, AS_MPICH),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2"}),
        ({name.replace("PMI_", "MV2_COMM_WORLD_"): v for name, v in MPICH.items()}, None),
        # mpirun in a job of SLURM, which starts one task of srun per node
        ({**STEP, **MPICH}, AS_MPICH),
    ],
)
def test_other_mpiruns(environment: dict[str, str], ranks: dict[str, str] | None) -> None:
    """MPICH's and Intel MPI's processes are ranks, and MVAPICH2's."""
    added = added_variables(environment)
    assert added == (ranks or {"RANK": "1", "WORLD_SIZE": "2"})


def test_srun_with_pmi_is_srun() -> None:
    """srun knows the host of rank 0, which PMI does not tell."""
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "4"}
    assert added_variables({**STEP, **pmi}) == added_variables(STEP)


def test_empty_variables_count_as_unset() -> None:
    changed = {"RANK": "", "WORLD_SIZE": "", "MASTER_PORT": "", "OTHER": ""}
    launcher_env.set_rank_variables(changed)
    assert changed == {"OTHER": ""}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (RANK, None),
        (RANK, 4),
        ({**STEP, **RANK}, None),
        ({**STEP, **RANK, "WORLD_SIZE": "16", "TORCHELASTIC_RUN_ID": "x"}, None),
        (SALLOC_SHELL, None),
        # A search over seeds: the user confirms that the tasks train separately.
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, 1),
        ({**BATCH, "SLURM_JOB_NUM_NODES": "1"}, None),
    ],
)
def test_consistent_environment(environment: dict[str, str], expected: int | None) -> None:
    launcher_env.check_world_size(expected, environment)


@pytest.mark.parametrize(
    ("environment", "expected", "message"),
    [
        (RANK, 8, "--expect_world_size 8: the launcher started 4 rank(s)"),
        ({}, 2, "--expect_world_size 2: the launcher started 1 rank(s)"),
        (
            {**STEP, **RANK, "WORLD_SIZE": "1"},
            None,
            "srun started 4 tasks and the world size is 1, so the tasks would train separately",
        ),
        (
            {**STEP, **RANK, "WORLD_SIZE": "8"},
            None,
            "WORLD_SIZE=8: srun started 4 task(s), so the other ranks would never join",
        ),
        (
            BATCH,
            None,
            "SLURM allocated 2 nodes and the world size is 1, so nodes would idle or train",
        ),
        ({**RANK, "RANK": "4"}, None, "RANK=4: must be below WORLD_SIZE=4"),
        ({"RANK": "0"}, None, "RANK=0: WORLD_SIZE is not set; the launcher sets both"),
        ({"RANK": "1"}, None, "RANK=1: WORLD_SIZE is not set; the launcher sets both"),
        ({"WORLD_SIZE": "2"}, None, "WORLD_SIZE=2: RANK is not set; the launcher sets both"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, None, "MASTER_ADDR and MASTER_PORT must be set: "),
        ({"MASTER_PORT": "abc"}, None, "MASTER_PORT=abc: must be a whole number"),
        ({**RANK, "MASTER_PORT": "65536"}, None, "MASTER_PORT=65536: must be a port number from 1"),
        ({"LOCAL_RANK": "x"}, None, "LOCAL_RANK=x: must be a whole number"),
        ({"LOCAL_WORLD_SIZE": "x"}, None, "LOCAL_WORLD_SIZE=x: must be a whole number"),
        ({"LOCAL_SIZE": "x"}, None, "LOCAL_SIZE=x: must be a whole number"),
        ({**RANK, "WORLD_SIZE": "9" * 5000}, None, "WORLD_SIZE=999"),
        ({**RANK, "WORLD_SIZE": "two"}, None, "WORLD_SIZE=two: must be a whole number"),
        ({**RANK, "MASTER_PORT": ""}, None, "MASTER_ADDR and MASTER_PORT must be set: rank 0's"),
        (
            {**RANK, "MASTER_ADDR": "no-such-host.invalid"},
            None,
            "MASTER_ADDR=no-such-host.invalid: ",
        ),
    ],
)
def test_contradictory_environment(
    environment: dict[str, str], expected: int | None, message: str
) -> None:
    assert refusal(launcher_env.check_world_size, expected, environment).startswith(message)


def test_a_port_of_each_step() -> None:
    """It follows from job and step; 20000 to 29999."""
    for job, step, port in ((712, 2, 22730), (0, 0, 20000), (9999, 0, 29999), (8992, 1, 20001)):
        environment = {**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        assert added_variables(environment)["MASTER_PORT"] == str(port)


@pytest.mark.parametrize(
    ("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("16", [16]), ("1,12(x2)", [1, 12, 12])]
)
def test_tasks_of_nodes(text: str, counts: list[int]) -> None:
    assert launcher_env._task_counts(text) == counts
    for node in range(len(counts) + 1):
        environment = {**STEP, "SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)}
        found = added_variables(environment).get("LOCAL_WORLD_SIZE")
        assert found == (str(counts[node]) if node < len(counts) else None)


def test_ranks_that_may_wait_for_this_one() -> None:
    """Not of a world of one, without an address, or where a launcher ends all with rank 0."""
    for changes, expected in (
        ({}, True),
        ({"RANK": "3"}, True),
        ({"WORLD_SIZE": "1"}, False),
        ({"WORLD_SIZE": "2"}, True),
        ({"MASTER_ADDR": ""}, False),
        ({"MASTER_PORT": "x"}, False),
        ({"RANK": "-1"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4"}, False),
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, True),
        ({"LOCAL_SIZE": "4"}, False),
        ({"LOCAL_SIZE": "4", "RANK": "1"}, True),
        ({"LOCAL_WORLD_SIZE": "4"}, True),
    ):
        assert launcher_env.has_peers({**RANK, **changes}) == expected, changes
    assert not launcher_env.has_peers({})


def test_names_of_launchers_and_hosts() -> None:
    """A launcher inside an srun task is the launcher."""
    for variable, name in (
        ("TORCHELASTIC_RUN_ID", "torchrun"),
        ("LOCAL_SIZE", "deepspeed"),
        ("OMPI_COMM_WORLD_RANK", "mpirun"),
        ("MV2_COMM_WORLD_RANK", "mpirun"),
        ("PMI_RANK", "mpirun"),
    ):
        assert launcher_env.launcher_name({"SLURM_STEP_ID": "1", variable: "x"}) == name
    assert launcher_env.launcher_name({"SLURM_STEP_ID": "1"}) == "srun"
    assert launcher_env.launcher_name({"RANK": "0"}) == "another one"
    assert launcher_env.launcher_name({}) == "none"
    assert launcher_env.host_name({"SLURMD_NODENAME": "gpu7"}) == "gpu7"
    assert launcher_env.host_name({}) == launcher_env.socket.gethostname()


def test_numbers_of_variables() -> None:
    """Of 18 digits at most; torchrun's local size counts before DeepSpeed's."""
    read = launcher_env.int_variable
    assert [read({"N": text}, "N") for text in ("0", "007", "9" * 18, "")] == [
        0,
        7,
        10**18 - 1,
        None,
    ]
    assert read({}, "N") is None
    message = refusal(read, {"N": "9" * 19}, "N")
    assert message.startswith("N=999") and message.endswith(
        ": must be a whole number; unset it, or let the launcher set it"
    )
    sizes = {"LOCAL_WORLD_SIZE": "2", "LOCAL_SIZE": "3"}
    assert launcher_env.local_world_size(sizes) == 2
    assert launcher_env.local_world_size({"LOCAL_SIZE": "3"}) == 3
    assert launcher_env.local_world_size({}) is None


@pytest.mark.parametrize(
    "changes",
    [{"RANK": "3"}, {"MASTER_PORT": "65535"}, {"MASTER_PORT": "1"}, {"MASTER_ADDR": "127.0.0.1"}],
)
def test_the_edges_of_what_is_consistent(changes: dict[str, str]) -> None:
    launcher_env.check_world_size(None, {**RANK, **changes})
    message = refusal(launcher_env.check_world_size, None, {**RANK, "MASTER_PORT": "0"})
    assert message == "MASTER_PORT=0: must be a port number from 1 to 65535"
