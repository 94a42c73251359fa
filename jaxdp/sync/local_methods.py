"""Sync methods whose replicas train alone for some steps: parameter_mean (local SGD) and diloco.

Where devices are grouped into islands, an island is one replica: its devices average gradients in
every step, and islands are synchronised as single devices otherwise are.

Shapes: N devices in K islands.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp.common.errors import ConfigError
from jaxdp.sync import compression, reductions
from jaxdp.sync.islands import slice_shapes
from jaxdp.sync.method import Sync
from jaxdp.sync.traffic import Collective, num_bytes


class ParameterMean(Sync):
    """parameter_mean: local SGD (Stich 2019); the optimizer's moments are averaged, too.

    Averaged moments keep the replicas' states equal between rounds, so a checkpoint holds one
    replica's state and fits any number of devices (Yu et al. 2019 also average the momentum). With
    SGD and `every` = 1 it equals gradient_mean, as SGD's update is linear in the gradient.
    """

    same_on_any_devices = False
    starts_late = True
    has_islands = True
    dtypes: tuple[str, ...] = ("float32",)

    def __init__(self, config, axis_name, island_count=0):
        super().__init__(config, axis_name, island_count)
        self.every = config.sync.every

    @classmethod
    def check(cls, config):
        every = config.sync.every
        dues = {"eval_every": config.eval_every, "checkpoint.every": config.checkpoint.every}
        for key, value in (dues | {"sync.after": config.sync.after}).items():
            if value % every:
                raise ConfigError(
                    f"{key}={value} is not a multiple of sync.every={every}, the steps between "
                    f"synchronisations: use {value // every * every + every}, or another sync.every"
                )

    @classmethod
    def check_devices(cls, config, device_count):
        count = config.sync.islands
        if count > 0 and device_count % count:
            raise ConfigError(
                f"sync.islands={count} can't be {device_count} devices in equal groups: use a "
                "divisor of their number, or 0 to make each device an island"
            )

    def mean(self, sums, figures, residual):
        sums, figures = self._islands.sum_inside((sums, figures), self.axis)
        return reductions.divide(sums, figures), figures, residual

    def synchronise(self, before, after, figures):
        figures = self._islands.sum_small(figures, self.axis)
        figures["grad_norm"] /= self._islands.islands
        mean, new = self._average(before, after, figures["tokens"].sum(0))
        apart = reductions.drift(after.params, mean, self.axis)
        figures["drift"] = jnp.full(len(figures["loss"]), apart)
        return new, figures

    def _average(self, before, after, tokens):
        """Returns the mean parameters of the replicas, and the state that all go on with."""
        mean = reductions.parameter_mean(
            {"params": after.params, "opt_state": after.opt_state},
            {"params": before.params, "opt_state": before.opt_state},
            *(tokens, self.axis, self._islands),
        )
        return mean["params"], after.replace(**mean)

    def traffic(self, params, opt_state, device_count):
        return self._traffic(params, (params, opt_state), device_count)

    def _traffic(self, params, averaged, device_count):
        """Returns the collectives of a round in which islands average some trees."""
        islands = self.islands(device_count)
        between = num_bytes(averaged) // islands.size
        found = [Collective("all-reduce", between, self.every, islands.islands)]
        if islands.size > 1:
            size, own = islands.size, num_bytes(averaged)
            inside = Collective("all-reduce", num_bytes(params), 1, size, inside=True)
            joined = Collective("all-gather", own, self.every, size, inside=True)
            found = [inside, *found, joined]
        return found


class DiLoCo(ParameterMean):
    """diloco: DiLoCo (Douillard et al. 2023); each device keeps its inner optimizer's moments."""

    per_device_opt_state = True
    has_outer = True
    starts_late = False
    dtypes = ("float32", "int8", "int4")

    def __init__(self, config, axis_name, island_count=0):
        super().__init__(config, axis_name, island_count)
        c = config.sync
        self.outer = optax.sgd(c.outer_learning_rate, c.outer_momentum, nesterov=True)

    def init(self, tx, params):
        return tx.init(params), self.outer.init(params)

    def save(self, own, like, params):
        return own

    def saved_shapes(self, like, count):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), like)

    def load(self, saved, params, old, new):
        """Returns the saved moments; for other devices or islands, their mean for each device."""

        def spread(x):
            mean = x.mean(0) if jnp.issubdtype(x.dtype, jnp.floating) else x[0]
            return np.broadcast_to(mean, (new.devices, *mean.shape))

        return saved if old == new else jax.tree.map(spread, saved)

    def residual(self, params, islands):
        own = slice_shapes(params, islands.size)
        return super().residual(own, islands)

    def traffic(self, params, opt_state, device_count):
        found = self._traffic(params, params, device_count)
        if not self.bits:
            return found
        islands = self.islands(device_count)
        own = slice_shapes(params, islands.size)
        sent = compression.traffic(own, self.bits, islands.islands, self.every)
        return [*sent, *(c for c in found if c.inside)]

    def _average(self, before, after, tokens):
        islands, axis = self._islands, self.axis
        if not self.bits:
            mean = reductions.parameter_mean(after.params, before.params, tokens, axis, islands)
            delta = jax.tree.map(jnp.subtract, before.params, mean)
        else:
            mine = reductions.share(tokens, axis, islands)
            moved = jax.tree.map(lambda b, x: (b - x) * mine, before.params, after.params)
            own, residual = compression.compressed_sum(
                *(islands.own_slice(moved, axis), after.residual, axis, self.bits),
                *(islands.islands, islands.between),
            )
            delta = islands.join(own, before.params, axis)
            mean = jax.tree.map(jnp.subtract, before.params, delta)
            after = after.replace(residual=residual)
        params, outer = reductions.outer_step(self.outer, before.params, delta, before.outer)
        return mean, after.replace(params=params, outer=outer)
