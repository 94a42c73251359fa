"""Programs as XLA compiles them for this machine's devices, or for GPUs that it doesn't have.

Only shapes are used: nothing is allocated and nothing runs.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from jax.sharding import SingleDeviceSharding
from ml_collections import ConfigDict

from jaxdp.data.batch import evaluation_shapes, training_shapes
from jaxdp.estimate.gpus import GPUS, Gpu, absent_devices, compiling_absent
from jaxdp.model.transformer import parameter_shapes
from jaxdp.parallel import gpu
from jaxdp.parallel.replicas import Replicas
from jaxdp.step.program import Sizes, pmapped, pmapped_evaluation, sizes_of
from jaxdp.step.setup import Setup, make_setup
from jaxdp.step.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Machine:
    """The devices that a program is compiled for.

    Attributes:
      devices: N of them, of all processes.
      gpu: their kind, if they are absent; None if they are this machine's.
      hosts: machines that they are in, each with one process.
    """

    devices: tuple[jax.Device, ...]
    gpu: Gpu | None = None
    hosts: int = 1

    @contextlib.contextmanager
    def compiling(self) -> Iterator[None]:
        """Makes functions traced in this context programs for these devices."""
        with compiling_absent(self.gpu) if self.gpu else contextlib.nullcontext():
            yield

    def options(self, config: ConfigDict) -> dict[str, str] | None:
        """Returns the compiler's options that a run with this config has on absent devices."""
        return gpu.wanted(config) if self.gpu else None


def local_machine(count: int) -> Machine:
    """Returns the first `count` of this machine's devices."""
    return Machine(tuple(jax.local_devices()[:count]))


def absent_machine(name: str, count: int, hosts: int = 1) -> Machine:
    """Returns GPUs that this machine doesn't have; raises ConfigError without their compiler.

    Args:
      name: a key of `gpus.GPUS`.
      count: their number, over all hosts.
      hosts: machines, each with one process; divides count.
    """
    return Machine(tuple(absent_devices(GPUS[name], count, hosts)), GPUS[name], hosts)


class Compiled(NamedTuple):
    """A compiled program.

    Attributes:
      text: its HLO, with instructions in the order in which they run.
      sizes: bytes that a device needs to run it.
    """

    text: str
    sizes: Sizes

    @property
    def memory(self) -> int:
        """All memory that a device needs to run the program, in bytes."""
        return self.sizes.total


def compile_step(config: ConfigDict, vocab: int, machine: Machine) -> Compiled:
    """Compiles the training step of a config: a round's steps, on all devices of a machine.

    Args:
      config: a valid config.
      vocab: size of the tokenizer's vocabulary.
      machine: the devices; their number must be able to split the config's batch.
    """

    def lower(setup: Setup, replicas: Replicas) -> Any:
        state = abstract_state(setup)
        batch = replicas.shapes(training_shapes(config, setup.method.every, setup.sizes.per_device))
        return pmapped(setup, replicas, state).lower(state, batch)

    return _compile(config, vocab, machine, lower)


def compile_evaluation(config: ConfigDict, vocab: int, machine: Machine) -> Compiled:
    """Compiles an evaluation step, as a run makes it between training steps; see `compile_step`."""

    def lower(setup: Setup, replicas: Replicas) -> Any:
        batch = replicas.shapes(evaluation_shapes(config, setup.sizes.per_device))
        return pmapped_evaluation(setup, replicas).lower(parameter_shapes(setup.model), batch)

    return _compile(config, vocab, machine, lower)


def compile_function(function: Callable, *arguments: Any, machine: Machine) -> Compiled:
    """Compiles a function for the first device of a machine.

    Args:
      function: a pure function.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`s; only shapes and dtypes are used.
      machine: see `local_machine` and `absent_machine`.
    """
    sharding = SingleDeviceSharding(machine.devices[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
    )
    with machine.compiling():
        return _compiled(jax.jit(function).lower(*shapes))


def _compile(config: ConfigDict, vocab: int, machine: Machine, lower: Callable) -> Compiled:
    replicas = Replicas(machine.devices)
    with machine.compiling():
        # The id of the mask token changes no shape.
        count, hosts = replicas.device_count, machine.hosts
        setup = make_setup(config, vocab, count, process_count=hosts, mask_id=0)
        return _compiled(lower(setup, replicas), machine.options(config))


def _compiled(lowered: Any, options: dict[str, str] | None = None) -> Compiled:
    program = lowered.compile(options)
    return Compiled(program.as_text(), sizes_of(program))
