"""Which of a run's processes this one is, by the flags or by the variables of a scheduler."""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from jaxdp.common.errors import ConfigError, shown

ADDRESS, COUNT, ID = "--coordinator_address", "--num_processes", "--process_id"
VARIABLE = "JAX_COORDINATOR_ADDRESS"  # The flag in an environment; JAX reads it, too.
LOCAL_IDS = "JAX_LOCAL_DEVICE_IDS"  # The GPUs of this process.
ALONE = f"{COUNT}=1 to train alone"
LOOK_FOR = 300  # Seconds in which JAX's detection may wait for process 0's machine.


class Scheduler(NamedTuple):
    """A program that starts several processes, and the variables by which it tells each who it is.

    Attributes:
      name: the program.
      size: how many there are.
      rank: the number of this process.
      local: its number among those of its machine, which is the number of its GPU.
      method: JAX's name for it; empty if JAX doesn't know it.
      needed: what JAX needs besides, to find the machine of process 0.
    """

    name: str
    size: str
    rank: str
    local: str
    method: str = ""
    needed: tuple[str, ...] = ()


# Open MPI is first: below SLURM its processes may have the variables of the step that started it.
SCHEDULERS = (
    Scheduler(
        "mpirun",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "ompi",
        ("OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ),
    Scheduler(
        "srun",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "slurm",
        ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_LOCALID"),
    ),
    Scheduler("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
    Scheduler("torchrun", "WORLD_SIZE", "RANK", "LOCAL_RANK"),
)


@dataclasses.dataclass(frozen=True)
class Identity:
    """One of several processes.

    Attributes:
      address: HOST:PORT of process 0.
      count: how many processes there are.
      id: the number of this one.
      local_device_ids: the numbers of its GPUs; None if JAX decides.
      names: the flags or variables that address, count and id are from.
    """

    address: str
    count: int
    id: int
    local_device_ids: Sequence[int] | None = None
    names: tuple[str, str, str] = (ADDRESS, COUNT, ID)

    @property
    def scheduled(self) -> bool:
        """Whether a scheduler has numbered the processes."""
        return self.names[2] != ID

    @property
    def where(self) -> str:
        """The address with the name of its flag or variables, for messages."""
        return f"{self.names[0]}={self.address}"


def identify(address: str | None, count: int | None, id: int | None) -> Identity | None:
    """Returns which of several processes this one is; None if it runs alone.

    Args:
      address: --coordinator_address, or None.
      count: --num_processes, or None; 1 is alone, whatever the environment says.
      id: --process_id, or None.

    Raises:
      ConfigError: flags or variables are incomplete, malformed, or don't go together.
    """
    if count is not None and count < 1:
        raise ConfigError(f"{COUNT}={count} is no number of processes: give 1 or more")
    if id is not None and count is not None and not 0 <= id < count:
        raise ConfigError(
            f"{ID}={id} is out of range: number the processes from 0 to num_processes - 1 = "
            f"{count - 1}"
        )
    name = ADDRESS if address is not None else VARIABLE
    if address is not None or count != 1:
        address = address if address is not None else os.environ.get(VARIABLE) or None
    if address is not None:
        host_and_port(address, name)
    if count == 1:
        return None
    if address is not None and count is not None and id is not None:
        return Identity(address, count, id, _local_ids(_scheduler()), (name, COUNT, ID))
    if count is not None or id is not None or (name == ADDRESS and not _scheduler()):
        given = {ADDRESS: address, COUNT: count, ID: id}
        missing = [flag for flag, value in given.items() if value is None]
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: give "
            f"{ADDRESS}, {COUNT} and {ID}, or none of them under a scheduler, or {ALONE}"
        )
    if scheduler := _scheduler():
        return _by_scheduler(scheduler, address, name)
    if address is not None:
        raise ConfigError(
            f"{VARIABLE}={shown(address)} is set, and nothing says how many processes there are: "
            f"give {COUNT} and {ID}, or {ALONE}"
        )
    return _by_jax()


def host_and_port(address: str, name: str) -> tuple[str, int]:
    """Splits HOST:PORT, or [IPv6]:PORT; raises a ConfigError that calls the address `name`."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s:/\[\]]+):([0-9]{1,5})", address)
    if not found or not 0 < int(found[2]) < 2**16:
        raise ConfigError(
            f"{name}={shown(address)} is not HOST:PORT: give a host and a port from 1 to 65535, "
            "such as node0:1234; an IPv6 address is written in brackets, [::1]:1234"
        )
    return found[1].strip("[]"), int(found[2])


def _scheduler() -> Scheduler | None:
    """Returns the scheduler that started this process together with others, if any."""
    for scheduler in SCHEDULERS:
        if scheduler.size in os.environ and _number(scheduler.size) > 1:
            return scheduler
    return None


def _by_scheduler(scheduler: Scheduler, address: str | None, name: str) -> Identity:
    """Reads a scheduler's variables; the address, too, if it is None and JAX can tell it."""
    count, says = _number(scheduler.size), f"{scheduler.size}={os.environ[scheduler.size]}"
    if not os.environ.get(scheduler.rank):
        raise _incomplete(says, f"{scheduler.rank} is not set")
    id = _number(scheduler.rank)
    if id >= count:
        raise ConfigError(
            f"{scheduler.rank}={id} is out of range, as {says}: unset what is left of another job, "
            f"or give {ALONE}"
        )
    local = _local_ids(scheduler)
    if address is None:
        address = _address(scheduler, says)
        name = f"the address by {scheduler.needed[0]} (another port: JAX_COORDINATOR_PORT)"
        host_and_port(address, name)
    names = name, scheduler.size, scheduler.rank
    return Identity(address, count, id, local, names)


def _address(scheduler: Scheduler, says: str) -> str:
    """Returns the address of process 0 that JAX makes of a scheduler's variables."""
    from jax._src.clusters import ClusterEnv  # It has no public name.

    if missing := [name for name in scheduler.needed if not os.environ.get(name)]:
        rest = f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not set"
        raise _incomplete(says, rest)
    if not scheduler.method:
        raise _incomplete(says, f"{scheduler.name} doesn't say where process 0 is")
    if "SLURM_NTASKS" in scheduler.needed and _number("SLURM_NTASKS") != _number(scheduler.size):
        raise ConfigError(
            f"SLURM_NTASKS={os.environ['SLURM_NTASKS']} and {says} differ: unset what is left of "
            f"another job, or give {ALONE}"
        )
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, scheduler.method, LOOK_FOR
        )
    except Exception as error:
        values = ", ".join(f"{name}={shown(os.environ[name])}" for name in scheduler.needed[:2])
        raise ConfigError(
            f"{values} can't be read ({shown(error, as_text=str)}): give {ADDRESS}=HOST:PORT of "
            f"process 0, or {ALONE}"
        ) from None
    host, _, port = (found[0] or "").rpartition(":")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _incomplete(says: str, what: str) -> ConfigError:
    return ConfigError(
        f"{says} says that this is one of several processes, and {what}: give "
        f"{ADDRESS}=HOST:PORT of process 0 (with {COUNT} and {ID} where the variables are left "
        f"from another job), or {ALONE}"
    )


def _by_jax() -> Identity | None:
    """Returns what JAX finds out on Kubernetes and TPU pods; None without a sign of either."""
    several = next(
        (
            x
            for x in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
            if "," in os.environ.get(x, "")
        ),
        "JOB_COMPLETION_INDEX" if "JOB_COMPLETION_INDEX" in os.environ else None,
    )
    if several is None:
        return None
    from jax._src.clusters import ClusterEnv

    reason = "JAX finds nothing that tells where process 0 is"
    try:
        address, count, id, local = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, LOOK_FOR
        )
    except Exception as error:  # The libraries requests and kubernetes raise their own.
        address, reason = None, shown(error, as_text=str)
    if address is None or count is None or id is None:
        raise ConfigError(
            f"{several}={shown(os.environ[several])} says that this is one of several processes, "
            f"and they can't be joined ({reason}): for a run of several processes give {ADDRESS}, "
            f"{COUNT} and {ID}, for runs of one process each (a sweep) {COUNT}=1"
        )
    return Identity(address, count, id, local, (several,) * 3) if count > 1 else None


def _local_ids(scheduler: Scheduler | None) -> list[int] | None:
    """Returns the GPU of a process that a scheduler started, as JAX does; None if JAX decides."""
    given = os.environ.get(LOCAL_IDS, "")
    if given and not re.fullmatch("[0-9]+(,[0-9]+)*", given):
        raise ConfigError(f"{LOCAL_IDS}={shown(given)} is no list of GPUs: give numbers, like 0,1")
    if given or scheduler is None or not os.environ.get(scheduler.local):
        return None
    return [_number(scheduler.local)]


def _number(name: str) -> int:
    """Returns the number in a variable, which may have spaces around it."""
    value = os.environ.get(name, "")
    if not re.fullmatch(r"\s*[0-9]{1,9}\s*", value):
        raise ConfigError(
            f"{name}={shown(value)} is no number: unset it if it is left from another job, or give "
            f"{ALONE}"
        )
    return int(value)
