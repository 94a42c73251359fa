"""Trains a model, or resumes a run that was stopped.

    jaxdp train --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]

`python -m jaxdp.train` is the same. It trains on all devices of this machine, or of all machines
of a cluster (docs/clusters.md). On Ctrl-C or SIGTERM it saves a checkpoint and stops; run it again
with the same workdir to resume.

Exit status: 0 finished; 2 the config or the input is wrong; 75 stopped on request (SIGTERM or
SIGINT) with everything saved, run again to resume; anything else is a fault.
"""

import os
import sys
import threading

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for everything that the run writes.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, if there are several processes."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes in the run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0 on.")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again.


def main() -> int:
    """Trains with the config and workdir of the flags; returns the exit status."""
    config = cli.config_of_flag(CONFIG)
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give a new folder, or that of a run to resume")
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
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
    result = loop.train_valid(config, os.path.expanduser(WORKDIR.value), stop_requested=stop.is_set)
    return 0 if result.finished else STOPPED


if __name__ == "__main__":
    status = cli.run(main, cli.check_config)
    # If the module was not imported, a flag was wrong, and there are no other processes yet.
    processes = sys.modules.get("jaxdp.parallel.processes")
    if processes and status not in (0, STOPPED):
        processes.exit_after_failure(status)
    sys.exit(status)
