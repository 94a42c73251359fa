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

from jaxdp.common.choices import LEVELS, NEEDS_FULL_MATRICES
from jaxdp.common.errors import ConfigError
from jaxdp.sync import compression, reductions
from jaxdp.sync.dealing import collect, deal, is_params
from jaxdp.sync.fragments import StreamingDiLoCo
from jaxdp.sync.islands import slices, unslice
from jaxdp.sync.local_methods import DiLoCo, ParameterMean
from jaxdp.sync.method import Sync
from jaxdp.sync.muloco import MuLoCo
from jaxdp.sync.reductions import Tree
from jaxdp.sync.traffic import Collective, num_bytes


class Sharded(Sync):
    """sharded: ZeRO stage 1 (Rajbhandari et al. 2020).

    A device's slice is an Nth of each array. With Muon, which needs whole matrices, it is whole
    matrices, an Nth of those of each shape (see `dealing`).
    """

    per_device_opt_state = True
    per_device_ema = True

    def __init__(self, config, axis_name, island_count=0):
        super().__init__(config, axis_name, island_count)
        self._whole_matrices = config.optimizer.name in NEEDS_FULL_MATRICES

    @classmethod
    def check(cls, config):
        if config.optimizer.name in NEEDS_FULL_MATRICES and config.sync.dtype in LEVELS:
            raise ConfigError(
                f"sync.dtype={config.sync.dtype!r} does not go with sync.method='sharded' and "
                f"optimizer.name={config.optimizer.name!r}: use 'float32' or 'bfloat16', or "
                "sync.method='gradient_mean'"
            )

    def init(self, tx, params):
        return tx.init(self.ema_slice(params)), ()

    def mean(self, sums, figures, residual):
        cut = self._cut(sums, sums, lax.axis_size(self.axis))
        flat = jax.tree.map(lambda x: x.reshape(len(x), -1), cut)
        if not self.levels:
            own, figures = reductions.scatter_mean(flat, figures, self.axis, self.config.dtype)
            return (
                jax.tree.map(lambda x, all_: x.reshape(all_.shape[1:]), own, cut),
                figures,
                residual,
            )
        figures = lax.psum(figures, self.axis)
        count = lax.axis_size(self.axis)
        shares = reductions.divide(flat, figures)
        own, sent = compression.scatter_sum(shares, residual["sent"], self.axis, self.levels, count)
        own = jax.tree.map(self._without_padding, own, sums)
        return own, figures, residual | {"sent": sent}

    def _without_padding(self, own, whole):
        """Sets what pads the last slices to 0, which is no number of 2 bits or 1; own: [S]."""
        places = lax.axis_index(self.axis) * own.size + jnp.arange(own.size)
        return jnp.where(places < whole.size, own, 0)

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
        if not self.levels:
            mine = optax.apply_updates(mine, updates)
            return self.join_slices(mine, state.params), state.residual
        lost, count = state.residual["summed"], lax.axis_size(self.axis)
        whole, summed = compression.gather(updates, lost, self.axis, self.levels, count)
        params = jax.tree.map(jnp.add, state.params, unslice(whole, state.params))
        return params, state.residual | {"summed": summed}

    def ema_slice(self, params):
        cut = self._cut(params, params, lax.axis_size(self.axis))
        return jax.tree.map(lambda x: x[lax.axis_index(self.axis)], cut)

    def join_slices(self, part, like):
        parts = reductions.all_gather(jax.tree.map(jnp.ravel, part), self.axis)
        return self._join(parts, like, like)

    def save(self, own, like, params):
        wholes, structure = jax.tree.flatten(like, is_leaf=is_params)
        parts = jax.tree.leaves(own, is_leaf=is_params)
        return jax.tree.unflatten(
            structure,
            [
                self._join(part, whole, params) if is_params(whole) else part[0]
                for part, whole in zip(parts, wholes, strict=True)
            ],
        )

    def load(self, saved, params, old, new):
        def spread(x):
            if is_params(x):
                return self._cut(x, params, new.devices)
            return np.broadcast_to(x, (new.devices, *x.shape))

        return jax.tree.map(spread, saved, is_leaf=is_params)

    def _cut(self, tree, params, count):
        """Cuts parameters, or what has their structure, into the devices' slices, [count, ...]."""
        return deal(tree, params, count) if self._whole_matrices else slices(tree, count)

    def _join(self, parts, like, params):
        """Undoes `_cut`; like: the shapes before."""
        return collect(parts, like, params) if self._whole_matrices else unslice(parts, like)

    def traffic(self, params, opt_state, device_count):
        if self.levels:
            return super().traffic(params, opt_state, device_count)
        cut = jax.eval_shape(lambda x: self._cut(x, x, device_count), params)
        padded = sum(x.size for x in jax.tree.leaves(cut))
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
    c, method = config.sync, class_of(config)
    if c.dtype not in method.dtypes:
        raise ConfigError(
            f"sync.dtype={c.dtype!r} is nothing that sync.method={c.method!r} sends, which is "
            f"{_or(method.dtypes)}: use one of these, or sync.method="
            f"{_or(repr(name) for name, x in METHODS.items() if c.dtype in x.dtypes)}"
        )
    for key, off, allowed in (
        ("after", 0, "starts_late"),
        ("islands", 0, "has_islands"),
        ("fragments", 1, "has_fragments"),
        ("delay", 0, "has_fragments"),
    ):
        if c[key] != off and not getattr(method, allowed):
            able = _or(repr(name) for name, x in METHODS.items() if getattr(x, allowed))
            raise ConfigError(
                f"sync.{key}={c[key]} has no meaning with sync.method={c.method!r}: set it to "
                f"{off}, or use {able}"
            )
    method.check(config)


def class_of(config: ConfigDict) -> type[Sync]:
    """Returns the class of a config's sync method."""
    method, c = METHODS[config.sync.method], config.sync
    if method is DiLoCo and (c.fragments > 1 or c.delay):
        return StreamingDiLoCo
    if method is DiLoCo and config.optimizer.name == "muon":
        return MuLoCo
    return method


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
    return class_of(config)(config, axis_name, process_count if count < 0 else count)


def traffic(
    config: ConfigDict, params: Tree, opt_state: Tree, count: int, process_count: int = 1
) -> list[Collective]:
    """Returns `Sync.traffic` of a config's method; only the trees' shapes and dtypes are used."""
    return make(config, "", process_count).traffic(params, opt_state, count)
