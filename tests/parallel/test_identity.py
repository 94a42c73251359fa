import os

import pytest

from jaxdp.common.errors import ConfigError
from jaxdp.parallel.identity import Identity, host_and_port, identify
from support.bad_input import assert_clear

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_NODELIST": "node[07-09],other",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI_5 = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}
OPEN_MPI_4 = OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
INDEXED_JOB = {"JOB_COMPLETION_INDEX": "3"}
POD = {"TPU_WORKER_HOSTNAMES": "a,b"}
ADDRESS = {"JAX_COORDINATOR_ADDRESS": "node0:1234"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Sets variables, where there are none of a scheduler's."""
    for name in list(os.environ):
        prefixes = ("SLURM_", "OMPI_", "PMI_", "MPI_", "TPU_", "JAX_COORDINATOR", "KUBERNETES_")
        others = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "JOB_COMPLETION_INDEX")
        if name.startswith(prefixes) or name in others:
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # In a batch script, without srun.
        {"JAX_COORDINATOR_ADDRESS": ""},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
    ],
)
def test_a_process_without_others_is_alone(environment, variables):
    environment(variables)
    assert identify(None, None, None) is None


@pytest.mark.parametrize(
    "variables",
    [
        SLURM,
        {"SLURM_STEP_NUM_TASKS": ""},
        OPEN_MPI_5,
        INDEXED_JOB,
        POD,
        ADDRESS,
        {"WORLD_SIZE": "x"},
    ],
)
def test_num_processes_1_is_alone_whatever_the_environment_says(environment, variables):
    environment(variables)
    for id in (None, 0):
        assert identify(None, 1, id) is None
    assert identify("host:1", 1, 0) is None


def test_three_flags_say_it_all(environment):
    assert identify("host:1", 4, 2) == Identity("host:1", 4, 2)
    environment(INDEXED_JOB | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert identify("host:1", 4, 2) == Identity("host:1", 4, 2)
    environment(ADDRESS)
    assert identify(None, 4, 2).address == "node0:1234"
    environment(SLURM)  # As JAX has it, a task's GPU is the one with its number on this machine.
    assert identify("host:1", 4, 2).local_device_ids == [1]


@pytest.mark.parametrize(
    ("variables", "address", "count", "id", "local"),
    [
        (SLURM, f"node07:{4711 % 4096 + 61440}", 4, 3, [1]),
        (SLURM | {"JAX_COORDINATOR_PORT": "77"}, "node07:77", 4, 3, [1]),
        (SLURM | {"SLURM_PROCID": " 3 "}, f"node07:{4711 % 4096 + 61440}", 4, 3, [1]),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, f"node07:{4711 % 4096 + 61440}", 4, 3, None),
        (OPEN_MPI_4, f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 2, 1, [0]),
        (
            OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp6://[fe80::b9b:ac5d,::1]:43370"},
            "[fe80::b9b:ac5d]:61441",
            2,
            1,
            [0],
        ),
        (OPEN_MPI_4 | SLURM, f"10.96.0.1:{1531576320 // 4096 % 4096 + 61440}", 2, 1, [0]),
    ],
)
def test_schedulers_say_it_all(environment, variables, address, count, id, local):
    environment(variables)
    found = identify(None, None, None)
    assert (found.address, found.count, found.id) == (address, count, id)
    assert found.local_device_ids == local and found.scheduled


@pytest.mark.parametrize(
    "variables",
    [
        OPEN_MPI_5,
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
        {"WORLD_SIZE": "2", "RANK": "1"},
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    ],
)
def test_where_a_scheduler_leaves_out_the_address_it_is_enough_to_give(environment, variables):
    environment(variables)
    with pytest.raises(ConfigError, match="give --coordinator_address=HOST:PORT"):
        identify(None, None, None)
    found = identify("host:1", None, None)
    assert (found.address, found.count, found.id) == ("host:1", 2, 1)
    environment(ADDRESS)
    assert identify(None, None, None).address == "node0:1234"


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("host:1", None, None), "--num_processes and --process_id are missing"),
        ((None, 2, 0), "--coordinator_address is missing"),
        (("host:1", 2, None), "--process_id is missing"),
        (("host:1", 2, 2), "--process_id=2 is out of range"),
        (("host:1", 2, -1), "--process_id=-1 is out of range"),
        (("host:1", 1, 1), "--process_id=1 is out of range"),
        (("host:1", 0, 0), "--num_processes=0"),
        (("localhost", 2, 0), "--coordinator_address='localhost'"),
        (("", 2, 0), "--coordinator_address=''"),
        (("host:http", 2, 0), "--coordinator_address='host:http'"),
        (("host:99999", 2, 0), "--coordinator_address='host:99999'"),
        (("http://host:1", 2, 0), "--coordinator_address='http://host:1'"),
        (("::1:1234", 2, 0), "in brackets"),
        ((" host:1", 2, 0), "--coordinator_address=' host:1'"),
    ],
)
def test_wrong_flags_are_refused(flags, named):
    with pytest.raises(ConfigError) as error:
        identify(*flags)
    assert named in str(error.value)
    assert_clear(str(error.value))


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS=''"),
        ({"SLURM_STEP_NUM_TASKS": "2(x2)"}, "SLURM_STEP_NUM_TASKS='2(x2)'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID is not set"),
        (SLURM | {"SLURM_PROCID": "4"}, "SLURM_PROCID=4"),
        (SLURM | {"SLURM_PROCID": "one"}, "SLURM_PROCID='one'"),
        (SLURM | {"SLURM_LOCALID": "?"}, "SLURM_LOCALID='?'"),
        (SLURM | {"SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST is not set"),
        (SLURM | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x'"),
        (SLURM | {"SLURM_NTASKS": "8"}, "SLURM_NTASKS=8"),
        (SLURM | {"JAX_COORDINATOR_PORT": "x"}, "JAX_COORDINATOR_PORT"),
        (SLURM | {"JAX_LOCAL_DEVICE_IDS": "all"}, "JAX_LOCAL_DEVICE_IDS='all'"),
        (OPEN_MPI_5, "OMPI_MCA_orte_hnp_uri is not set"),
        (OPEN_MPI_5 | {"OMPI_MCA_orte_hnp_uri": "what"}, "OMPI_MCA_orte_hnp_uri='what'"),
        (OPEN_MPI_5 | {"OMPI_COMM_WORLD_RANK": ""}, "OMPI_COMM_WORLD_RANK is not set"),
        (INDEXED_JOB, "JOB_COMPLETION_INDEX='3'"),
        ({"JOB_COMPLETION_INDEX": ""}, "JOB_COMPLETION_INDEX=''"),
        (POD, "TPU_WORKER_HOSTNAMES='a,b'"),
        (ADDRESS, "JAX_COORDINATOR_ADDRESS='node0:1234'"),
        ({"JAX_COORDINATOR_ADDRESS": "node0"}, "JAX_COORDINATOR_ADDRESS='node0'"),
    ],
)
def test_wrong_variables_are_refused_with_a_way_to_train_alone(environment, variables, named):
    environment(variables)
    with pytest.raises(ConfigError) as error:
        identify(None, None, None)
    assert named in str(error.value)
    assert_clear(str(error.value))
    if "is not HOST:PORT" not in str(error.value) and "LOCAL_DEVICE_IDS" not in named:
        assert "--num_processes=1" in str(error.value)


def test_addresses():
    assert host_and_port("node-0.a_b.c:1", "it") == ("node-0.a_b.c", 1)
    assert host_and_port("[::1]:65535", "it") == ("::1", 65535)
    assert host_and_port("[fe80::1%eth0]:2", "it") == ("fe80::1%eth0", 2)
