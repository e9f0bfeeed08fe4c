from __future__ import annotations

import pytest

from kfac_dist.environment import LaunchEnvironment, check_world, detect_environment, first_host

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job",
}
BATCH = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "6", "SLURM_NODELIST": "node[07-09]"}
SLURM = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "node[08-09],gpu1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0"}
ALONE = LaunchEnvironment(0, 1, 0, 1, None, None, "single")
UNDER_TORCHRUN = LaunchEnvironment(3, 4, 1, 2, "10.0.0.1", 29500, "torchrun")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, ALONE),
        (TORCHRUN, UNDER_TORCHRUN),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, LaunchEnvironment(0, 1, 0, None, None, None, "torchrun")),
        (SLURM, LaunchEnvironment(5, 6, 1, 2, "node08", 15000 + 4567, "slurm")),
        (
            {**SLURM, "MASTER_ADDR": "here", "MASTER_PORT": "7"},
            LaunchEnvironment(5, 6, 1, 2, "here", 7, "slurm"),
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "7"}, LaunchEnvironment(5, 7, 1, 2, "node08", 15000 + 4567, "slurm")),
        (OPEN_MPI, LaunchEnvironment(1, 2, 1, 2, None, None, "openmpi")),
        (MPICH, LaunchEnvironment(1, 3, 0, None, None, None, "mpich")),
    ],
)
def test_each_launcher(variables, expected):
    assert detect_environment(variables) == expected


def test_the_innermost_launcher_wins():
    assert detect_environment({**SLURM, **TORCHRUN}) == UNDER_TORCHRUN
    assert detect_environment({**SLURM, **OPEN_MPI}).launcher == "openmpi"
    assert detect_environment({**SLURM, **MPICH}).launcher == "mpich"
    # srun --mpi=pmi2 is SLURM, too
    assert detect_environment({**SLURM, "PMI_RANK": "5", "PMI_SIZE": "6"}).launcher == "slurm"
    assert detect_environment({**OPEN_MPI, **TORCHRUN}).launcher == "torchrun"


@pytest.mark.parametrize(
    "variables",
    [
        {**BATCH, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # a batch script is no step, though it has rank variables
        {**SLURM, "SLURM_JOB_NAME": "bash"},
        {**SLURM, "SLURM_JOB_NAME": "interactive"},
        {"WORLD_SIZE": "4"},
    ],
)
def test_what_is_no_launch_is_one_process(variables):
    assert detect_environment(variables) == ALONE


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node3", "node3"),
        ("node3,node4", "node3"),
        ("node[3-5,7]", "node3"),
        ("node[7,3-5],other", "node7"),
        ("node[003-005]", "node003"),
        ("rack[1-2]n[3-4]-ib", "rack1n3-ib"),
        ("gpu-a.cluster.org,gpu-b", "gpu-a.cluster.org"),
    ],
)
def test_first_host_of_a_node_list(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize("nodelist", ["", "node[3-5", ",node", "node3]"])
def test_malformed_node_list(nodelist):
    with pytest.raises(ValueError, match="is no SLURM node list"):
        first_host(nodelist)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**TORCHRUN, "RANK": "three"}, "RANK='three' must be an integer"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "MASTER_PORT='' must be an integer"),
        ({"TORCHELASTIC_RUN_ID": "job"}, "RANK is missing"),
        ({**SLURM, "SLURM_NTASKS": "6x"}, "SLURM_NTASKS='6x' must be an integer"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(3)"}, r"SLURM_STEP_TASKS_PER_NODE='2\(3\)' must be"),
        ({**SLURM, "SLURM_NODEID": "3"}, "SLURM_NODEID=3 must be below the 3 nodes"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "?"}, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_RANK": "0", "MPI_LOCALRANKID": "0"}, "PMI_SIZE is missing"),
        ({**MPICH, "PMI_RANK": "3"}, "mpich: rank 3 of 3 is impossible"),
    ],
)
def test_malformed_variables_are_named(variables, message):
    with pytest.raises(ValueError, match=message):
        detect_environment(variables)


@pytest.mark.parametrize(
    ("variables", "devices"),
    [
        (TORCHRUN, "devices=2, num_nodes=2"),
        (SLURM, "devices=2, num_nodes=3"),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4,2", "SLURM_NODEID": "0"}, "devices=4, num_nodes=2"),
        (OPEN_MPI, "devices=2, num_nodes=1"),
        (MPICH, "devices=<processes per node>, num_nodes=<nodes>"),
    ],
)
def test_processes_that_are_not_connected_are_an_error_with_the_numbers_to_use(variables, devices):
    launched = detect_environment(variables)
    wanted = (
        f"{launched.launcher} started {launched.size} processes, but this one is connected to 0 others: .* {devices}!"
    )
    with pytest.raises(ValueError, match=wanted):
        check_world(launched, 1, "give {devices}!")
    check_world(launched, launched.size, "nothing")
    check_world(launched, launched.size + 1, "nothing")


def test_one_process_is_enough_for_itself():
    check_world(detect_environment({}), 1, "nothing")
