"""Does a training step fit in a device's memory, and with how many sequences?"""

from collections.abc import Callable

from jaxdp.common.errors import ConfigError
from jaxdp.common.files import num_bytes
from jaxdp.common.terminal import in_bytes
from jaxdp.data.batch import training_shapes
from jaxdp.step.setup import Setup
from jaxdp.step.state import State, abstract_state, per_device_shapes

MAX_TRIES = 6  # Programs compiled in search of the largest batch.


def state_shapes(setup: Setup) -> State:
    """Returns the shapes of the state that one device holds."""
    return per_device_shapes(abstract_state(setup), setup.method)


def least_bytes(setup: Setup) -> int:
    """Returns the bytes per device that a step needs in any case: the state and the batch.

    What is needed beside them, the compiler decides; see `compiled.compile_step`.
    """
    batch = training_shapes(setup.config, setup.method.every, setup.sizes.per_device)
    return num_bytes(state_shapes(setup)) + num_bytes(batch)


def check_fits(setup: Setup, needed: int, room: int) -> None:
    """Refuses a compiled step that needs more memory than a device has.

    Args:
      setup: the run's setup.
      needed: bytes per device, as compiled.
      room: bytes that programs can have there.

    Raises:
      ConfigError: it doesn't fit.
    """
    if needed > room:
        config = setup.config
        raise ConfigError(
            f"global_batch_size={config.global_batch_size} is too large: with "
            f"{setup.sizes.micro} sequences at once the compiled step takes {in_bytes(needed)} on "
            f"a device, which has {in_bytes(room)}: {way_out(setup)}"
        )


def way_out(setup: Setup) -> str:
    """Returns what to change in the config of a step that doesn't fit."""
    config, sizes = setup.config, setup.sizes
    ways = []
    if sizes.micro > 1:
        ways.append(f"raise grad_accum_steps (now {config.grad_accum_steps})")
    if not config.model.remat:
        ways.append("set model.remat=True")
    if config.loss_chunks == 1:
        ways.append("raise loss_chunks")
    return ", ".join([*ways, "or take a smaller model"] if ways else ["take a smaller model"])


def largest_batch(
    needed: Callable[[int], int], room: int, first: int, least: int, most: int
) -> tuple[int, int]:
    """Finds the largest batch that fits, compiling about three of them.

    A step's memory grows about linearly: two sizes give a line, whose result is compiled, too, to
    check it.

    Args:
      needed: number of sequences -> bytes that the compiled step needs.
      room: bytes that it can have.
      first: the size to begin with.
      least: bytes that are needed without any sequence, or a little less.
      most: the largest size to try.

    Returns:
      The largest size that fits as compiled, and its bytes; (0, 0) if 1 doesn't fit.
    """
    if least > room:
        return 0, 0
    known = {first: needed(first)}
    while len(known) < MAX_TRIES:
        fits = max((size for size, x in known.items() if x <= room), default=0)
        over = min((size for size, x in known.items() if x > room), default=most + 1)
        # The two sizes nearest to the limit; at first, one and the empty batch.
        near = sorted(known, key=lambda size: abs(known[size] - room))[:2]
        (a, x), (b, y) = (*((size, known[size]) for size in near), (0, least))[:2]
        slope = (x - y) / (a - b)
        guess = int(a + (room - x) / slope) if slope > 0 else most
        guess = min(max(guess, fits, 1), over - 1)
        if guess <= fits + fits // 100:  # Not worth another compilation.
            break
        known[guess] = needed(guess)
    fits = max((size for size, x in known.items() if x <= room), default=0)
    return fits, known.get(fits, 0)
