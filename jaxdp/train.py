"""Trains a model, or goes on with a run that was stopped.

    jaxdp train --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]

`python -m jaxdp.train` is the same. It trains on all devices of this machine, and of all processes
where there are several (docs/clusters.md). Stopped by Ctrl-C or SIGTERM it saves; run again with
the same workdir, it goes on.

Exit status: 0 finished; 2 the config or the input is wrong; 75 stopped on request (SIGTERM or
SIGINT) with everything saved, run again to go on; anything else is a fault.
"""

import os
import sys
import threading

from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
WORKDIR = flags.DEFINE_string("workdir", None, "Folder for all that the run writes.")
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, for several."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes the run has.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again.


def main() -> int:
    """Trains as the flags say; returns the exit status."""
    config = cli.given_config(CONFIG)
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give a folder for the run, new or to go on with")
    # Not above: JAX takes seconds to import, and --help and mistakes in flags do without.
    from jaxdp.parallel import cpu, processes
    from jaxdp.run import loop, preflight
    from jaxdp.step.setup import same_on_two_devices, validate

    cli.prepare_jax()
    processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    validate(config)
    cpu.prepare(config, two_devices=same_on_two_devices(config))
    preflight.check_devices()
    stop = threading.Event()
    cli.on_stop_signal(stop.set)
    result = loop.train_valid(config, os.path.expanduser(WORKDIR.value), stop_requested=stop.is_set)
    return 0 if result.finished else STOPPED


if __name__ == "__main__":
    status = cli.run(main, cli.check_config)
    # Where it was not imported, a flag was wrong, and there are no other processes yet.
    processes = sys.modules.get("jaxdp.parallel.processes")
    if processes and status not in (0, STOPPED):
        processes.end(status)
    sys.exit(status)
