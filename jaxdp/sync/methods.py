"""The choices of sync.method: what replicas do in a step, and when they are synchronised.

`Sync`, in `method`, is the default, gradient_mean; each other method is a subclass that overrides
some hooks. A method's attributes and checks say what it allows and needs; nothing else does.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from ml_collections import ConfigDict

from jaxdp.common.choices import NEEDS_FULL_MATRICES
from jaxdp.common.errors import ConfigError
from jaxdp.sync import compression, reductions
from jaxdp.sync.islands import slice_shapes, slices, unslice
from jaxdp.sync.local_methods import DiLoCo, ParameterMean
from jaxdp.sync.method import Sync
from jaxdp.sync.reductions import Tree
from jaxdp.sync.traffic import Collective, num_bytes


class Sharded(Sync):
    """sharded: ZeRO stage 1 (Rajbhandari et al. 2020), for elementwise optimizers."""

    per_device_opt_state = True
    per_device_ema = True
    elementwise_only = True

    def init(self, tx, params):
        return tx.init(self.ema_slice(params)), ()

    def mean(self, sums, figures, residual):
        if not self.bits:
            found = reductions.scatter_mean(sums, figures, self.axis, self.config.dtype)
            return *found, residual
        figures = lax.psum(figures, self.axis)
        cut = slices(reductions.divide(sums, figures), lax.axis_size(self.axis))
        own, sent = compression.scatter_sum(cut, residual["sent"], self.axis, self.bits)
        return own, figures, residual | {"sent": sent}

    def norm(self, grads):
        return jnp.sqrt(lax.psum(optax.tree.norm(grads, squared=True), self.axis))

    def update(self, state, grads):
        mine = self.ema_slice(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, mine)
        params, residual = self._gather(state, mine, updates)
        return state.replace(
            step=state.step + 1, params=params, opt_state=opt_state, residual=residual
        )

    def _gather(self, state, mine, updates):
        """Returns the updated parameters of all devices' slices, and the new residual."""
        if not self.bits:
            mine = optax.apply_updates(mine, updates)
            return reductions.all_gather(mine, state.params, self.axis), state.residual
        lost, count = state.residual["summed"], lax.axis_size(self.axis)
        whole, summed = compression.gather(updates, lost, self.axis, self.bits, count)
        params = jax.tree.map(jnp.add, state.params, unslice(whole, state.params))
        return params, state.residual | {"summed": summed}

    def ema_slice(self, params):
        cut = slices(params, lax.axis_size(self.axis))
        return jax.tree.map(lambda x: x[lax.axis_index(self.axis)], cut)

    def join_slices(self, part, like):
        return reductions.all_gather(part, like, self.axis)

    def save(self, own, like):
        return unslice(own, like)

    def load(self, saved, old, new):
        count = new.devices
        return jax.tree.map(
            lambda x: slices(x, count) if x.ndim else np.broadcast_to(x, count), saved
        )

    def traffic(self, params, opt_state, device_count):
        if self.bits:
            return super().traffic(params, opt_state, device_count)
        own = jax.tree.leaves(slice_shapes(params, device_count))
        padded = device_count * sum(x.size for x in own)
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

    def mean(self, sums, figures, residual):
        loss = figures.pop("loss")
        figures = lax.psum(figures, self.axis)  # Exact: integers, or 0 on all devices but one.
        sums, figures["loss"] = reductions.doubling_sum((sums, loss), self.axis)
        grads = lax.optimization_barrier(reductions.divide(sums, figures))
        return grads, figures, residual

    def norm(self, grads):
        return reductions.ordered_norm(grads)

    def traffic(self, params, opt_state, device_count):
        swap = Collective("collective-permute", num_bytes(params))
        return [swap] * (device_count.bit_length() - 1)


METHODS: dict[str, type[Sync]] = {
    "gradient_mean": Sync,
    "sharded": Sharded,
    "fixed_order": FixedOrder,
    "parameter_mean": ParameterMean,
    "diloco": DiLoCo,
}


def check(config: ConfigDict) -> None:
    """Raises ConfigError if keys of a config don't go with its sync.method."""
    c, method = config.sync, METHODS[config.sync.method]
    if method.elementwise_only and config.optimizer.name in NEEDS_FULL_MATRICES:
        raise ConfigError(
            f"optimizer.name={config.optimizer.name!r} needs whole matrices, and "
            f"sync.method={c.method!r} gives each device a slice of them: change one of the two"
        )
    if c.dtype not in method.dtypes:
        raise ConfigError(
            f"sync.dtype={c.dtype!r} is nothing that sync.method={c.method!r} sends, which is "
            f"{_or(method.dtypes)}: use one of these, or sync.method="
            f"{_or(repr(name) for name, x in METHODS.items() if c.dtype in x.dtypes)}"
        )
    for key, value, allowed in (
        ("sync.after", c.after, "starts_late"),
        ("sync.islands", c.islands, "has_islands"),
    ):
        if value and not getattr(method, allowed):
            able = _or(repr(name) for name, x in METHODS.items() if getattr(x, allowed))
            raise ConfigError(
                f"{key}={value} has no meaning with sync.method={c.method!r}: set it to 0, or use "
                f"{able}"
            )
    method.check(config)


def _or(names: Iterable[str]) -> str:
    return " or ".join(names)


def make(config: ConfigDict, axis_name: str, process_count: int) -> Sync:
    """Returns the sync method of a valid config.

    Args:
      config: a valid config.
      axis_name: name of the device axis.
      process_count: number of processes, which are the islands with sync.islands=-1.
    """
    count = config.sync.islands
    return METHODS[config.sync.method](config, axis_name, process_count if count < 0 else count)


def traffic(
    config: ConfigDict, params: Tree, opt_state: Tree, count: int, process_count: int = 1
) -> list[Collective]:
    """Returns `Sync.traffic` of a config's method; only the trees' shapes and dtypes are used."""
    return make(config, "", process_count).traffic(params, opt_state, count)
