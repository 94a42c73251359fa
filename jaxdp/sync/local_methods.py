"""Sync methods whose replicas train alone for some steps: parameter_mean (local SGD) and diloco.

Where devices are grouped into islands, an island is one replica: its devices average gradients in
every step, and islands are synchronised as single devices otherwise are.

Shapes: N devices in K islands.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdp.common.choices import LEVELS, MAX_INT32
from jaxdp.common.errors import ConfigError
from jaxdp.sync import compression, reductions
from jaxdp.sync.compression import Exchange
from jaxdp.sync.islands import slice_shapes, slices, unslice
from jaxdp.sync.method import Sync
from jaxdp.sync.traffic import Collective, num_bytes

# Bytes of a compressed bucket: one holds everything, as no backward pass waits to be sent, and XLA
# starts it early.
ONE_BUCKET = MAX_INT32


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

    @property
    def _sends_gradients(self):
        return self._islands.size > 1

    @classmethod
    def check(cls, config):
        every, name = config.sync.every // config.sync.fragments, "sync.every"
        if config.sync.fragments > 1:
            name = "sync.every / sync.fragments"
        dues = {"eval_every": config.eval_every, "checkpoint.every": config.checkpoint.every}
        for key, value in (dues | {"sync.after": config.sync.after}).items():
            if value % every:
                raise ConfigError(
                    f"{key}={value} is not a multiple of {name}={every}, the steps between "
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

    def synchronise(self, before, after, figures, sent):
        figures = self._islands.sum_small(figures, self.axis)
        mean, new = self._average(before, after, figures)
        return new, self._with_drift(figures, after.params, mean)

    def _with_drift(self, figures, params, mean):
        """Returns the figures of a round with the distance of its replicas from their mean."""
        apart = reductions.drift(params, mean, self.axis)
        return figures | {
            "grad_norm": figures["grad_norm"] / self._islands.islands,
            "drift": jnp.full(len(figures["loss"]), apart),
        }

    def _average(self, before, after, figures):
        """Returns the mean parameters of the islands, and the state that all go on with.

        figures: the round's, [steps, ...], summed over the islands.
        """
        mean = reductions.parameter_mean(
            {"params": after.params, "opt_state": after.opt_state},
            {"params": before.params, "opt_state": before.opt_state},
            *(figures["tokens"].sum(0), self.axis, self._islands),
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
    """diloco: DiLoCo (Douillard et al. 2023); each device keeps its inner optimizer's moments.

    From the parameters θ that all had at first, replica m comes to θₘ in H steps. Then

        Δ = Σ wₘ (θ - θₘ)
        v = μ v + Δ
        θ = θ - η (Δ + μ v)

    with η = sync.outer_learning_rate and μ = sync.outer_momentum: the mean change is the gradient
    of an outer optimizer with Nesterov momentum. Our choice: wₘ is the replica's share of the
    tokens, where the paper has 1 / K for K replicas, which it is if all have the same number.
    With Muon as the inner optimizer, it is `muloco.MuLoCo`.
    """

    per_device_opt_state = True
    has_outer = True
    starts_late = False
    has_fragments = True
    dtypes = ("float32", *LEVELS)

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
        return self._traffic_of(params, params, device_count)

    def _traffic_of(self, params, exchanged, device_count):
        """Returns the collectives of a round in which islands exchange a part of `params`."""
        found = self._traffic(params, exchanged, device_count)
        if not self.levels:
            return found
        islands = self.islands(device_count)
        own = slice_shapes(exchanged, islands.size)
        sent = compression.traffic(own, self.levels, islands.islands, self.every, ONE_BUCKET)
        return [*sent, *(c for c in found if c.inside)]

    def _average(self, before, after, figures):
        mine = reductions.share(figures["tokens"].sum(0), self.axis, self._islands)
        moved = self._moved(before, after, figures)
        received, residual = (), after.residual
        for number in range(1, 1 + self._exchange_count):
            received, residual = self._exchange(
                number, before.params, moved, mine, received, residual
            )
        delta = self._outer_gradient(before.params, received)
        after = after.replace(residual=residual)
        return self._go_on(before, after, delta, figures)

    def _moved(self, before, after, figures):
        """Returns what this device's island adds to the outer gradient after a round."""
        del figures
        return jax.tree.map(jnp.subtract, before.params, after.params)

    def _go_on(self, before, after, delta, figures):
        """Returns the mean parameters of the islands, and the state that all go on with."""
        del figures
        mean = jax.tree.map(jnp.subtract, before.params, delta)
        params, outer = reductions.outer_step(self.outer, before.params, delta, before.outer)
        return mean, after.replace(params=params, outer=outer)

    @property
    def _exchange_count(self):
        return 2 if self.levels else 1

    def _exchange(self, number, like, moved, mine, received, residual):
        """Makes one of the exchanges between islands, one after the other.

        Args:
          number: from 1 to `_exchange_count`.
          like: shapes of what is exchanged.
          moved: this island's part of the outer gradient; only the first exchange needs it.
          mine: [], this island's weight.
          received: what the exchange before has received; () in the first.
          residual: what earlier exchanges have lost, if they are compressed.

        Returns:
          What is received, and the new residual.
        """
        islands, axis = self._islands, self.axis
        if number == 1:
            moved = jax.tree.map(lambda x: x * mine, moved)
        if not self.levels:
            return islands.sum_between(moved, axis), residual
        if number == 1:
            cut = slices(islands.own_slice(moved, axis), islands.islands)
            received, lost = self._compressed.send_slices(cut, residual["sent"])
            return received, residual | {"sent": lost}
        parts = self._compressed.sum_slices(received, self._parts(like))
        received, lost = self._compressed.send_sums(parts, residual["summed"])
        return received, residual | {"summed": lost}

    def _outer_gradient(self, like, received):
        """Returns the sum over islands from what the last exchange received; like: its shapes."""
        islands = self._islands
        if not self.levels:
            return received
        whole = self._compressed.whole_sums(received, self._parts(like))
        own = unslice(whole, slice_shapes(like, islands.size))
        return islands.join(own, like, self.axis)

    @property
    def _compressed(self):
        islands = self._islands
        return Exchange(self.axis, self.levels, islands.islands, islands.between, ONE_BUCKET)

    def _parts(self, params):
        """Returns the shapes of what a device sums of its island's slice of parameters."""
        return slice_shapes(slice_shapes(params, self._islands.size), self._islands.islands)
