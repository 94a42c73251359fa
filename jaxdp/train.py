"""Trains a model, or resumes a run that was stopped.

    jaxdp train --config=FILE.py --workdir=DIR [--config.KEY=VALUE ...]

`python -m jaxdp.train` is the same. It trains on all devices of this machine, or of all machines
of a cluster (docs/clusters.md). One process drives all of a machine's devices; --processes=auto
starts one for each GPU. On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP it saves a checkpoint and stops after
the step under way; run it again with the same workdir to resume.

Exit status: 0 finished; 2 the config or the input is wrong; 75 stopped on request (by a signal)
with everything saved, run again to resume; anything else is a fault.
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxdp.common import cli, paths, stopping
from jaxdp.common.errors import STOPPED, ConfigError, Stopped
from jaxdp.common.stopping import StopRequest
from jaxdp.parallel import launcher
from jaxdp.parallel.identity import Identity, identify

JOINING = 10.0  # Seconds that a process which is asked to stop still waits for the others.
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
    "num_processes",
    None,
    "How often this command is started, on all machines together; 1 trains alone, whatever a "
    "scheduler's variables say.",
)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0 on.")


def main() -> int:
    """Trains with the config and workdir of the flags; returns the exit status."""
    launcher.end_with_launcher()
    request = StopRequest(say=_say)
    listener = stopping.Listener(request)
    config = cli.config_of_flag(CONFIG)
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give a new folder, or that of a run to resume")
    workdir = paths.local("--workdir", WORKDIR.value)
    identity = identify(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    gpus = launcher.visible_gpus() if PROCESSES.value != "1" else 0
    count = launcher.process_count(PROCESSES.value, gpus)
    if count == 1:
        return _train(config, workdir, identity, request)
    listener.close()  # From now on the launcher listens.
    return _start(config, count, gpus, identity)


def _say(line: str) -> None:
    """Prints a notice, in process 0 of several."""
    # Without the function, the module has not been imported yet: this may be another thread.
    number = getattr(sys.modules.get("jaxdp.parallel.processes"), "number", None)
    if number is None or number() == 0:
        cli.warn(line)


def _train(
    config: ConfigDict, workdir: Path, identity: Identity | None, request: StopRequest
) -> int:
    """Trains in this process, with the others of the run, if there are any."""
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.parallel import cpu, failures, gpu, processes
    from jaxdp.run import loop, preflight
    from jaxdp.step.setup import same_on_two_devices, validate

    cli.prepare_jax()
    with request.ends_within(JOINING, STOPPED):
        links = processes.connect(identity)
    with failures.shared(links):
        validate(config)
        cpu.prepare(config, two_devices=same_on_two_devices(config))
        gpu.prepare(config)
        preflight.check_devices()
        try:
            result = loop.train_valid(config, workdir, request)
        except Stopped:
            _say("stopped as asked, before the training began; run again to go on")
            return STOPPED
    return 0 if result.finished else STOPPED


def _start(config: ConfigDict, count: int, gpus: int, identity: Identity | None) -> int:
    """Trains in `count` processes that this one starts; refuses a wrong config before it does."""
    import jax

    from jaxdp.step.setup import batch_sizes, validate

    if identity and identity.scheduled:
        raise ConfigError(
            f"--processes={PROCESSES.value} can't go with a scheduler that has started several "
            f"processes ({identity.names[1]} is set): leave it out, and let the scheduler start "
            "one for each GPU, or give --num_processes=1 if this process is to be the only one"
        )
    validate(config)
    machines, machine = (identity.count, identity.id) if identity else (1, 0)
    devices = gpus or count * max(1, jax.config.values["jax_num_cpu_devices"])
    batch_sizes(config, machines * count, machines * devices)
    with launcher.local_coordinator() as (address, environ):
        if identity:
            address, environ = identity.address, {}
        return launcher.run(launcher.children(count, gpus, address, environ, machine, machines))


if __name__ == "__main__":
    status = cli.run(main, cli.check_config)
    # If the module was not imported, a flag was wrong, and there are no other processes yet.
    failures = sys.modules.get("jaxdp.parallel.failures")
    if failures and status not in (0, STOPPED):
        failures.exit_after_failure(status)
    sys.exit(status)
