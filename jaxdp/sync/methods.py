"""The choices of sync.method: what replicas do in a step, and when they are synchronised.

`Sync` is the default, gradient_mean; each other method is a subclass that overrides some hooks.
A method's attributes and checks say what it allows and needs; nothing else does.

Shapes: N devices, b sequences per device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from jaxdp.common.choices import MOST, WHOLE_MATRICES
from jaxdp.common.errors import ConfigError
from jaxdp.sync import reductions
from jaxdp.sync.reductions import Figures, Tree
from jaxdp.sync.traffic import Collective, num_bytes


class Sync:
    """gradient_mean: all devices make the same update, with the mean gradient.

    A step is accumulate -> mean -> norm -> update; a round is `every` steps, then agree. Between
    rounds the state is equal on all devices, except for opt_state with `own_opt_state` and ema with
    `own_ema`: these are [N, ...], one entry per device.
    """

    own_opt_state = False  # Each device has its own optimizer state.
    own_ema = False  # Each device has its own slice of the parameters' EMA.
    has_outer = False  # An outer optimizer has state, so other methods can't resume from it.
    elementwise_only = False  # Each device updates slices of arrays, so no optimizer sees a matrix.
    same_on_any_devices = True  # On other numbers of devices only rounding differs.
    starts_late = False  # Can begin after sync.after steps of gradient_mean.
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # Values of sync.dtype that it can send.
    every = 1  # Optimizer steps in a round.

    def __init__(self, config: ConfigDict, axis_name: str):
        """Takes a valid config and the name of the device axis."""
        self.config, self.axis = config.sync, axis_name
        self.ema_decay = config.ema.decay
        self.grad_accum_steps = config.grad_accum_steps

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises ConfigError if other keys of a config don't go with this method."""
        c = config.sync
        if cls.elementwise_only and config.optimizer.name in WHOLE_MATRICES:
            raise ConfigError(
                f"optimizer.name={config.optimizer.name!r} needs whole matrices, and "
                f"sync.method={c.method!r} gives each device a slice of them: change one of the two"
            )
        if c.dtype not in cls.dtypes:
            able = [name for name, method in METHODS.items() if c.dtype in method.dtypes]
            raise ConfigError(
                f"sync.dtype={c.dtype!r} is for gradients, and sync.method={c.method!r} sends "
                f"{' or '.join(cls.dtypes)}: use sync.method={' or '.join(map(repr, able))}"
            )
        if c.after and not cls.starts_late:
            able = [name for name, method in METHODS.items() if method.starts_late]
            raise ConfigError(
                f"sync.after={c.after} has no meaning with sync.method={c.method!r}: set it to 0, "
                f"or use {' or '.join(map(repr, able))}"
            )

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
        return MOST

    def init(self, tx: optax.GradientTransformation, params: Tree) -> tuple[Tree, Tree]:
        """Returns this device's opt_state, and the outer optimizer's state or ()."""
        return tx.init(params), ()

    def accumulate(self, value_and_grad: Callable, params: Tree, batch: Tree) -> Tree:
        """Returns ((loss_sum, weight_sum), gradient_sums) over this device's batch."""
        return reductions.accumulate(value_and_grad, params, batch, self.grad_accum_steps)

    def mean(self, sums: Tree, figures: Figures) -> tuple[Tree, Figures]:
        """Returns the gradient from its sums, and the figures: summed here or else in `agree`."""
        return reductions.gradient_mean(sums, figures, self.axis, self.config.dtype)

    def norm(self, grads: Tree) -> jax.Array:
        """Returns the global norm of the gradient, []."""
        return optax.tree.norm(grads)

    def update(self, state: Any, grads: Tree) -> Any:
        """Returns the state after an optimizer step with this gradient."""
        return state.apply_gradients(grads=grads)

    def agree(self, before: Any, after: Any, figures: Figures) -> tuple[Any, Figures]:
        """Ends a round: returns its synchronised state, and its figures summed over devices.

        `before` and `after` are the states at its start and end, figures are [steps, ...] each.
        """
        del before
        return after, figures

    def part(self, params: Tree) -> Tree:
        """Returns the slice of the parameters whose EMA this device keeps: here all of them."""
        return params

    def whole(self, part: Tree, like: Tree) -> Tree:
        """Puts the devices' slices together, the inverse of `part`; like: parameter shapes."""
        del like
        return part

    def save(self, own: Tree, like: Tree) -> Tree:
        """Converts per-device opt_state or ema, [N, ...], to what a checkpoint holds.

        `like` has the shapes on a single device, unsliced.
        """
        raise NotImplementedError

    def saved_shapes(self, like: Tree, count: int) -> Tree:
        """Returns the shapes of what `save` returns on `count` devices; like: see `save`."""
        del count
        return like

    def load(self, saved: Tree, count: int) -> Tree:
        """Converts what `save` returned back to [count, ...], for `count` devices."""
        raise NotImplementedError

    def traffic(self, params: Tree, opt_state: Tree, device_count: int) -> list[Collective]:
        """Returns the collectives of a round that grow with the model; trees are one device's."""
        del opt_state, device_count
        return [Collective("all-reduce", num_bytes(params, self.config.dtype))]


class Sharded(Sync):
    """sharded: ZeRO stage 1 (Rajbhandari et al. 2020), for elementwise optimizers."""

    own_opt_state = True
    own_ema = True
    elementwise_only = True

    def init(self, tx, params):
        return tx.init(self.part(params)), ()

    def mean(self, sums, figures):
        return reductions.scatter_mean(sums, figures, self.axis, self.config.dtype)

    def norm(self, grads):
        return jnp.sqrt(lax.psum(optax.tree.norm(grads, squared=True), self.axis))

    def update(self, state, grads):
        mine = self.part(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, mine)
        params = reductions.all_gather(optax.apply_updates(mine, updates), state.params, self.axis)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    def part(self, params):
        cut = reductions.slices(params, lax.axis_size(self.axis))
        return jax.tree.map(lambda x: x[lax.axis_index(self.axis)], cut)

    def whole(self, part, like):
        return reductions.all_gather(part, like, self.axis)

    def save(self, own, like):
        return reductions.unslice(own, like)

    def load(self, saved, count):
        return jax.tree.map(
            lambda x: reductions.slices(x, count) if x.ndim else np.broadcast_to(x, count), saved
        )

    def traffic(self, params, opt_state, device_count):
        padded = sum(-(-x.size // device_count) * device_count for x in jax.tree.leaves(params))
        size = jnp.dtype(self.config.dtype).itemsize
        return [Collective("reduce-scatter", size * padded), Collective("all-gather", 4 * padded)]


class FixedOrder(Sync):
    """fixed_order: gradient_mean with the same order of additions on any number of devices.

    Gradients are added in a binary tree, with a leaf for each of sync.virtual_replicas parts of the
    batch, a power of two.
    """

    dtypes = ("float32",)

    @classmethod
    def check(cls, config):
        super().check(config)
        parts = config.sync.virtual_replicas
        if parts & (parts - 1):
            raise ConfigError(
                f"sync.virtual_replicas={parts} is not a power of two: use 8 or 16, for example"
            )
        if config.grad_accum_steps != 1:
            raise ConfigError(
                f"grad_accum_steps={config.grad_accum_steps} has no meaning with "
                "sync.method='fixed_order': leave it at 1 and raise sync.virtual_replicas"
            )

    @classmethod
    def check_devices(cls, config, device_count):
        parts, total = config.sync.virtual_replicas, config.global_batch_size
        if parts % device_count or total % parts:
            raise ConfigError(
                f"sync.virtual_replicas={parts} has to be a multiple of the {device_count} "
                f"devices, and global_batch_size={total} a multiple of it: change one of them"
            )

    @classmethod
    def batch_unit(cls, config, device_count):
        return config.sync.virtual_replicas // device_count

    @classmethod
    def max_devices(cls, config):
        return config.sync.virtual_replicas

    def accumulate(self, value_and_grad, params, batch):
        count = self.config.virtual_replicas // lax.axis_size(self.axis)
        return reductions.accumulate_in_order(value_and_grad, params, batch, count)

    def mean(self, sums, figures):
        loss = figures.pop("loss")
        figures = lax.psum(figures, self.axis)  # Exact: integers, or 0 on all devices but one.
        sums, figures["loss"] = reductions.doubling_sum((sums, loss), self.axis)
        return lax.optimization_barrier(reductions.divide(sums, figures)), figures

    def norm(self, grads):
        return reductions.ordered_norm(grads)

    def traffic(self, params, opt_state, device_count):
        swap = Collective("collective-permute", num_bytes(params))
        return [swap] * (device_count.bit_length() - 1)


class ParameterMean(Sync):
    """parameter_mean: local SGD (Stich 2019); the optimizer's moments are averaged, too.

    Averaged moments keep the replicas' states equal between rounds, so a checkpoint holds one
    replica's state and fits any number of devices (Yu et al. 2019 also average the momentum). With
    SGD and `every` = 1 it equals gradient_mean, as SGD's update is linear in the gradient.
    """

    same_on_any_devices = False
    starts_late = True
    dtypes = ("float32",)

    def __init__(self, config, axis_name):
        super().__init__(config, axis_name)
        self.every = config.sync.every

    @classmethod
    def check(cls, config):
        super().check(config)
        every = config.sync.every
        dues = {"eval_every": config.eval_every, "checkpoint.every": config.checkpoint.every}
        for key, value in (dues | {"sync.after": config.sync.after}).items():
            if value % every:
                raise ConfigError(
                    f"{key}={value} is not a multiple of sync.every={every}, the steps between "
                    f"synchronisations: use {value // every * every + every}, or another sync.every"
                )

    def mean(self, sums, figures):
        return reductions.divide(sums, figures), figures

    def agree(self, before, after, figures):
        figures = lax.psum(figures, self.axis)
        figures["grad_norm"] /= lax.axis_size(self.axis)
        tokens = figures["tokens"].sum(0)
        mean = reductions.parameter_mean(
            self._averaged(after), self._averaged(before), tokens, self.axis
        )
        apart = reductions.drift(after.params, mean["params"], self.axis)
        figures["drift"] = jnp.full(len(figures["loss"]), apart)
        return self._merge(before, after.replace(**mean)), figures

    def traffic(self, params, opt_state, device_count):
        return [Collective("all-reduce", num_bytes((params, opt_state)), self.every)]

    def _averaged(self, state):
        return {"params": state.params, "opt_state": state.opt_state}

    def _merge(self, before, mean):
        del before
        return mean


class DiLoCo(ParameterMean):
    """diloco: DiLoCo (Douillard et al. 2023); each device keeps its inner optimizer's moments."""

    own_opt_state = True
    has_outer = True
    starts_late = False

    def __init__(self, config, axis_name):
        super().__init__(config, axis_name)
        c = config.sync
        self.outer = optax.sgd(c.outer_learning_rate, c.outer_momentum, nesterov=True)

    def init(self, tx, params):
        return tx.init(params), self.outer.init(params)

    def save(self, own, like):
        return own

    def saved_shapes(self, like, count):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), like)

    def load(self, saved, count):
        """Returns the saved moments; on another number of devices, their mean for each device."""

        def spread(x):
            mean = x.mean(0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]
            return np.broadcast_to(mean, (count, *mean.shape))

        return saved if len(jax.tree.leaves(saved)[0]) == count else jax.tree.map(spread, saved)

    def traffic(self, params, opt_state, device_count):
        return [Collective("all-reduce", num_bytes(params), self.every)]

    def _averaged(self, state):
        return {"params": state.params}

    def _merge(self, before, mean):
        params, outer = reductions.outer_step(self.outer, before.params, mean.params, before.outer)
        return mean.replace(params=params, outer=outer)


METHODS: dict[str, type[Sync]] = {
    "gradient_mean": Sync,
    "sharded": Sharded,
    "fixed_order": FixedOrder,
    "parameter_mean": ParameterMean,
    "diloco": DiLoCo,
}


def traffic(config: ConfigDict, params: Tree, opt_state: Tree, count: int) -> list[Collective]:
    """Returns `Sync.traffic` of a config's method; only the trees' shapes and dtypes are used."""
    return METHODS[config.sync.method](config, "").traffic(params, opt_state, count)
