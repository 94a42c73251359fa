"""The choices of sync.method: what replicas do in a step and when they agree.

`Sync` is the default, gradient_mean; each other method is a subclass that changes some hooks. What
a method allows and needs stands in its attributes and checks, and nowhere else.

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

    A step is accumulate -> mean -> norm -> update, a round is `every` steps and then agree. What
    the state holds is equal on all devices between rounds, but for opt_state where a subclass says
    `own_opt_state`: it is then [N, ...], each device's own.
    """

    own_opt_state = False  # Each device has its own optimizer state.
    own_ema = False  # Each device has its own slice of the parameters' average.
    has_outer = False  # An outer optimizer has a state, too: other methods can't go on from it.
    elementwise_only = False  # Each device updates slices of arrays, never a whole matrix.
    same_on_any_devices = True  # Another number of devices changes no more than rounding.
    starts_late = False  # Can begin after sync.after steps of gradient_mean.
    dtypes: tuple[str, ...] = ("float32", "bfloat16")  # Values of sync.dtype that it can send.
    every = 1  # Optimizer steps in a round.

    def __init__(self, config: ConfigDict, axis_name: str):
        """Takes a valid config and the name of the devices' axis."""
        self.config, self.axis = config.sync, axis_name
        self.ema_decay = config.ema.decay
        self.grad_accum_steps = config.grad_accum_steps

    @classmethod
    def check(cls, config: ConfigDict) -> None:
        """Raises ConfigError where the other keys of a config don't go with this method."""
        c = config.sync
        if cls.elementwise_only and config.optimizer.name in WHOLE_MATRICES:
            raise ConfigError(
                f"optimizer.name={config.optimizer.name!r} needs whole matrices, of which "
                f"sync.method={c.method!r} gives each device a slice: use another of the two"
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
        """Raises ConfigError where so many devices can't share the batch by this method."""

    @classmethod
    def batch_unit(cls, config: ConfigDict, device_count: int) -> int:
        """Sequences of a device, of which its part of the batch has to be a multiple."""
        del device_count
        return config.grad_accum_steps

    @classmethod
    def max_devices(cls, config: ConfigDict) -> int:
        """The largest number of devices that a config allows."""
        del config
        return MOST

    def init(self, tx: optax.GradientTransformation, params: Tree) -> tuple[Tree, Tree]:
        """This device's opt_state, and the state of an outer optimizer."""
        return tx.init(params), ()

    def accumulate(self, value_and_grad: Callable, params: Tree, batch: Tree) -> Tree:
        """((loss_sum, weight_sum), gradient_sums) of this device's batch."""
        return reductions.accumulate(value_and_grad, params, batch, self.grad_accum_steps)

    def mean(self, sums: Tree, figures: Figures) -> tuple[Tree, Figures]:
        """Gradient sums -> the gradient to use, and the figures, summed over devices or not yet."""
        return reductions.gradient_mean(sums, figures, self.axis, self.config.dtype)

    def norm(self, grads: Tree) -> jax.Array:
        """Global norm of the gradient, []."""
        return optax.tree.norm(grads)

    def update(self, state: Any, grads: Tree) -> Any:
        """The state after an optimizer step."""
        return state.apply_gradients(grads=grads)

    def agree(self, before: Any, after: Any, figures: Figures) -> tuple[Any, Figures]:
        """Ends a round: states at its begin and end, figures [steps, ...], now to be summed."""
        del before
        return after, figures

    def part(self, params: Tree) -> Tree:
        """The slice of the parameters whose average this device keeps; here all of them."""
        return params

    def whole(self, part: Tree, like: Tree) -> Tree:
        """The inverse of `part`; `like`: shapes of the parameters."""
        del like
        return part

    def save(self, own: Tree, like: Tree) -> Tree:
        """Own opt_state or average [N, ...] -> what a checkpoint holds; `like`: that of one."""
        raise NotImplementedError

    def saved_shapes(self, like: Tree, count: int) -> Tree:
        """What `save` made of that of `count` devices."""
        del count
        return like

    def load(self, saved: Tree, count: int) -> Tree:
        """The inverse of `save`, for `count` devices."""
        raise NotImplementedError

    def traffic(self, params: Tree, opt_state: Tree, device_count: int) -> list[Collective]:
        """The collectives of a round that grow with the model; shapes are those of one device."""
        del opt_state, device_count
        return [Collective("all-reduce", num_bytes(params, self.config.dtype))]


class Sharded(Sync):
    """sharded: ZeRO stage 1 (Rajbhandari et al. 2020), for optimizers that are elementwise."""

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
    """fixed_order: gradient_mean by a tree of sums that no device count changes.

    The tree has a leaf for each of sync.virtual_replicas parts of the batch, a power of two.
    """

    dtypes = ("float32",)

    @classmethod
    def check(cls, config):
        super().check(config)
        parts = config.sync.virtual_replicas
        if parts & (parts - 1):
            raise ConfigError(
                f"sync.virtual_replicas={parts} is no power of two: use 8, or another"
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
                f"sync.virtual_replicas={parts} can't be split equally over {device_count} "
                f"devices, or global_batch_size={total} not over them: both have to be multiples"
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
        figures = lax.psum(figures, self.axis)  # Whole numbers, and each device's own.
        sums, figures["loss"] = reductions.doubling_sum((sums, loss), self.axis)
        return lax.optimization_barrier(reductions.divide(sums, figures)), figures

    def norm(self, grads):
        return reductions.ordered_norm(grads)

    def traffic(self, params, opt_state, device_count):
        swap = Collective("collective-permute", num_bytes(params))
        return [swap] * (device_count.bit_length() - 1)


class ParameterMean(Sync):
    """parameter_mean: local SGD (Stich 2019); the optimizer's moments are averaged likewise.

    Averaged moments keep the replicas' states equal between rounds, so that a checkpoint is one
    replica's and fits any number of devices (Yu et al. 2019 average the momentum, too). With SGD
    and `every` = 1 it is gradient_mean, as everything is linear.
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
                    f"{key}={value} is no multiple of sync.every={every}, and replicas agree only "
                    f"then: use {value // every * every + every}, or another sync.every"
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
    """diloco: Douillard et al. 2023. Each device keeps the moments of its inner optimizer."""

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
        """On another number of devices all go on with the mean of the saved moments."""

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
    """`Sync.traffic` of a config's method; only shapes and dtypes of the trees are looked at."""
    return METHODS[config.sync.method](config, "").traffic(params, opt_state, count)
