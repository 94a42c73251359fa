"""What every sync method is made of: the hooks of a training step, with gradient_mean's answers.

Shapes: N devices, b sequences per device.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import lax
from ml_collections import ConfigDict

from jaxdp.common.choices import LEVELS, MAX_INT32
from jaxdp.sync import compression, reductions
from jaxdp.sync.islands import Islands
from jaxdp.sync.reductions import Figures, Tree
from jaxdp.sync.traffic import Collective, num_bytes


class Sync:
    """gradient_mean: all devices make the same update, with the mean gradient.

    A step is accumulate -> mean -> norm -> update; a round is `every` steps, then synchronise.
    Between rounds the state is equal on all devices, except for opt_state with
    `per_device_opt_state`, ema with `per_device_ema` and local_params with `per_device_params`:
    these are [N, ...], one entry per device.
    """

    per_device_opt_state = False  # Each device has its own optimizer state.
    per_device_ema = False  # Each device has its own slice of the parameters' EMA.
    per_device_params = False  # Between rounds, each device has its own parameters, too.
    has_outer = False  # An outer optimizer has state, so other methods can't resume from it.
    same_on_any_devices = True  # On other numbers of devices only rounding differs.
    starts_late = False  # Can begin after sync.after steps of gradient_mean.
    has_islands = False  # Devices may be grouped into islands, by sync.islands.
    has_fragments = False  # Can synchronise the model in parts, and late.
    # Values of sync.dtype that it can send.
    dtypes: tuple[str, ...] = ("float32", "bfloat16", *LEVELS)
    every = 1  # Optimizer steps in a round.
    delay = 0  # The last of them, which are made while the devices synchronise ...
    exchanges = 0  # ... in so many exchanges, one after the other.

    def __init__(self, config: ConfigDict, axis_name: str, island_count: int = 0):
        """Takes a valid config, the name of the device axis, and the number of islands.

        With 0 islands, each device is one.
        """
        self.config, self.axis, self.island_count = config.sync, axis_name, island_count
        self.levels = LEVELS.get(config.sync.dtype, 0)  # Of compressed numbers; 0: not compressed.
        self.ema_decay = config.ema.decay
        self.grad_accum_steps = config.grad_accum_steps

    def islands(self, device_count: int) -> Islands:
        """Returns the groups of devices that are synchronised in every step."""
        return Islands(device_count, self.island_count or device_count)

    @property
    def _islands(self) -> Islands:
        return self.islands(lax.axis_size(self.axis))

    @property
    def _sends_gradients(self) -> bool:
        """Whether devices send each other gradients in every step."""
        return lax.axis_size(self.axis) > 1

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises ConfigError if other keys of a config don't go with this method."""

    @classmethod
    def check_devices(cls, config: ConfigDict, device_count: int) -> None:
        """Raises ConfigError if this number of devices can't share the batch by this method."""

    @classmethod
    def batch_unit(cls, config: ConfigDict, device_count: int) -> int:
        """Returns the number that a device's count of sequences has to be a multiple of."""
        del device_count
        return config.grad_accum_steps

    @classmethod
    def max_devices(cls, config: ConfigDict) -> int:
        """Returns the largest number of devices that a config allows."""
        del config
        return MAX_INT32

    def init(self, tx: optax.GradientTransformation, params: Tree) -> tuple[Tree, Tree]:
        """Returns this device's opt_state, and the outer optimizer's state or ()."""
        return tx.init(params), ()

    def residual(self, params: Tree, islands: Islands) -> Tree:
        """Returns what a device's compressed sums have lost before the first: zeros, or {}."""
        return compression.empty_residual(params, islands.islands) if self.levels else {}

    def accumulate(self, value_and_grad: Callable, params: Tree, batch: Tree) -> Tree:
        """Returns ((loss_sum, weight_sum), gradient_sums) over this device's batch."""
        count, apart = self.grad_accum_steps, self._sends_gradients
        return reductions.accumulate(value_and_grad, params, batch, count, last_apart=apart)

    def mean(self, sums: Tree, figures: Figures, residual: Tree) -> tuple[Tree, Figures, Tree]:
        """Returns the gradient from its sums, the figures, and the new residual.

        Figures that are not summed over all devices here are in `synchronise`.
        """
        if not self.levels:
            sent = reductions.gradient_mean(sums, figures, self.axis, self.config.dtype)
            return *sent, residual
        figures = lax.psum(figures, self.axis)
        # Before they are sent, as what is lost must not depend on a batch's number of tokens.
        shares = reductions.divide(sums, figures)
        count = lax.axis_size(self.axis)
        mean, residual = compression.compressed_sum(shares, residual, self.axis, self.levels, count)
        return mean, figures, residual

    def norm(self, grads: Tree) -> jax.Array:
        """Returns the global norm of the gradient, []."""
        return optax.tree.norm(grads)

    def update(self, state: Any, grads: Tree) -> Any:
        """Returns the state after an optimizer step with this gradient."""
        return state.apply_gradients(grads=grads)

    def begin(self, state: Any) -> Any:
        """Begins a round: returns the state that this device makes its steps from."""
        return state

    def exchange(self, number: int, before: Any, after: Any, sent: Any) -> Any:
        """Makes one of the `exchanges`, whose result isn't needed before some more steps are made.

        Args:
          number: from 1 to `exchanges`.
          before: the state at the start of the round.
          after: the state now.
          sent: what the exchange before returned; () in the first.
        """
        raise NotImplementedError

    def synchronise(
        self, before: Any, after: Any, figures: Figures, sent: Any
    ) -> tuple[Any, Figures]:
        """Ends a round: returns its synchronised state, and its figures summed over devices.

        `before` and `after` are the states at its start and end, figures are [steps, ...] each,
        `sent` is what the last `exchange` returned, () without one.
        """
        del before, sent
        return after, figures

    def ema_slice(self, params: Tree) -> Tree:
        """Returns the slice of the parameters whose EMA this device keeps: here all of them."""
        return params

    def join_slices(self, part: Tree, like: Tree) -> Tree:
        """Puts the devices' slices together, the inverse of `ema_slice`; like: parameter shapes."""
        del like
        return part

    def save(self, own: Tree, like: Tree, params: Tree) -> Tree:
        """Converts per-device opt_state or ema, [N, ...], to what a checkpoint holds.

        `like` has the shapes on a single device, unsliced; params: the parameters, or their shapes.
        """
        raise NotImplementedError

    def saved_shapes(self, like: Tree, count: int) -> Tree:
        """Returns the shapes of what `save` returns on `count` devices; like: see `save`."""
        del count
        return like

    def load(self, saved: Tree, params: Tree, old: Islands, new: Islands) -> Tree:
        """Converts what `save` returned on some devices to [N, ...] for others."""
        raise NotImplementedError

    def load_residual(self, saved: Tree, like: Tree, old: Islands, new: Islands) -> Tree:
        """Converts residuals saved on some devices for other devices; see `move_residual`."""
        return compression.move_residual(saved, like, old, new)

    def traffic(self, params: Tree, opt_state: Tree, device_count: int) -> list[Collective]:
        """Returns the collectives of a round that grow with the model; trees are one device's."""
        del opt_state
        if self.levels:
            return compression.traffic(params, self.levels, device_count)
        return [Collective("all-reduce", num_bytes(params, self.config.dtype))]
