"""Trains a model, or resumes a run that was stopped.

    jaxdp train --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]

`python -m jaxdp.train` is the same. It trains on all devices of this machine, or of all machines
of a cluster (docs/clusters.md). One process drives all of a machine's devices; --processes=auto
starts one for each GPU. On Ctrl-C or SIGTERM it saves a checkpoint and stops; run it again with the
same workdir to resume.

Exit status: 0 finished; 2 the config or the input is wrong; 75 stopped on request (SIGTERM or
SIGINT) with everything saved, run again to resume; anything else is a fault.
"""

import sys
import threading
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxdp.common import cli, paths
from jaxdp.common.errors import STOPPED, ConfigError
from jaxdp.parallel import launcher

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
PROCESSES = flags.DEFINE_string(
    "processes",
    "1",
    "Number of processes to start on this machine, which share its GPUs or CPU cores; auto is one "
    "for each GPU.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, if there are several machines."
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How often this command is started, on all machines together."
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def main() -> int:
    """Trains with the config and workdir of the flags; returns the exit status."""
    launcher.end_with_launcher()
    config = cli.config_of_flag(CONFIG)
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give a new folder, or that of a run to resume")
    workdir = paths.local("--workdir", WORKDIR.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.parallel import processes

    processes.check_identity(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    gpus = launcher.visible_gpus() if PROCESSES.value != "1" else 0
    count = launcher.process_count(PROCESSES.value, gpus)
    return _train(config, workdir) if count == 1 else _start(config, count, gpus)


def _train(config: ConfigDict, workdir: Path) -> int:
    """Trains in this process."""
    from jaxdp.parallel import cpu, gpu, processes
    from jaxdp.run import loop, preflight
    from jaxdp.step.setup import same_on_two_devices, validate

    cli.prepare_jax()
    processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    validate(config)
    cpu.prepare(config, two_devices=same_on_two_devices(config))
    gpu.prepare(config)
    preflight.check_devices()
    stop = threading.Event()
    cli.on_stop_signal(stop.set)
    result = loop.train_valid(config, workdir, stop_requested=stop.is_set)
    return 0 if result.finished else STOPPED


def _start(config: ConfigDict, count: int, gpus: int) -> int:
    """Trains in `count` processes that this one starts; refuses a wrong config before it does."""
    import jax

    from jaxdp.parallel import processes
    from jaxdp.step.setup import batch_sizes, validate

    if COORDINATOR.value is None and (name := processes.scheduled_by()):
        raise ConfigError(
            f"--processes={PROCESSES.value} can't go with a scheduler that has started several "
            f"processes ({name} is set): leave it out, and let the scheduler start one for each GPU"
        )
    validate(config)
    machines, machine = NUM_PROCESSES.value or 1, PROCESS_ID.value or 0
    devices = gpus or count * max(1, jax.config.values["jax_num_cpu_devices"])
    batch_sizes(config, machines * count, machines * devices)
    with launcher.local_coordinator() as (address, environ):
        if COORDINATOR.value is not None:
            address, environ = COORDINATOR.value, {}
        return launcher.run(launcher.children(count, gpus, address, environ, machine, machines))


if __name__ == "__main__":
    status = cli.run(main, cli.check_config)
    # If the module was not imported, a flag was wrong, and there are no other processes yet.
    processes = sys.modules.get("jaxdp.parallel.processes")
    if processes and status not in (0, STOPPED):
        processes.exit_after_failure(status)
    sys.exit(status)
