"""DiLoCo that synchronises the model in parts, one after the other, while it computes on.

Shapes: N devices, F fragments, S numbers in a fragment of a leaf.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxdp.common.errors import ConfigError
from jaxdp.sync import compression, reductions
from jaxdp.sync.islands import slice_shapes, slices, unslice
from jaxdp.sync.local_methods import DiLoCo
from jaxdp.sync.reductions import Tree


class StreamingDiLoCo(DiLoCo):
    """diloco with sync.fragments or sync.delay: Streaming DiLoCo (Douillard et al. 2025).

    The model is in F fragments. Each is synchronised every H steps, one every H / F steps, which
    are a round here. So a link carries an F-th of the bytes at a time, F times as often. Fragment
    p's global parameters θₚ are replaced in its turn, at step t; a replica's own θₘ are not those
    of the others between rounds, and stay on their device as its optimizer's moments do:

        Δ  = mean over m of (θₚ - θₘ,ₚ(t - τ))      sent τ = sync.delay steps before it is needed
        θₚ = outer(θₚ, Δ)
        θₘ,ₚ(t) = θₚ + θₘ,ₚ(t) - θₘ,ₚ(t - τ)

    With 8 to 1 bits, the two exchanges of a sum have half of the delay each. What is evaluated,
    exported and sampled from are the global parameters.

    Our choices. The p-th fragment is the p-th of F equal slices of each array, where the paper
    takes whole layers: all fragments have the same bytes, however large the embedding is, and one
    compiled program serves all of them. A replica keeps the steps that it made while it waited (as
    in CoCoD-SGD, Shen et al. 2019), where the paper mixes its own and the global parameters by a
    factor. Replicas have equal weights, as in the paper, where `DiLoCo` counts their tokens.
    """

    per_device_params = True

    def __init__(self, config, axis_name, island_count=0):
        super().__init__(config, axis_name, island_count)
        self.fragments, self.delay = config.sync.fragments, config.sync.delay
        self.every = config.sync.every // self.fragments
        self.exchanges = self._exchange_count

    @classmethod
    def check(cls, config):
        c = config.sync
        if c.every % c.fragments:
            up = c.every // c.fragments * c.fragments + c.fragments
            raise ConfigError(
                f"sync.every={c.every} is not a multiple of sync.fragments={c.fragments}, of which "
                f"one is sent every sync.every / sync.fragments steps: use sync.every={up}, or "
                "another number of fragments"
            )
        if c.delay >= c.every // c.fragments:
            raise ConfigError(
                f"sync.delay={c.delay} is too long: with sync.every={c.every} and sync.fragments="
                f"{c.fragments} the next exchange comes {c.every // c.fragments} steps later: use "
                f"at most {c.every // c.fragments - 1}, or a larger sync.every"
            )
        super().check(config)

    def begin(self, state):
        return state.replace(params=state.local_params, local_params=())

    def exchange(self, number, before, after, sent):
        place = self._place(before)
        theta = cut(before.params, self.fragments, place)
        if number == 1:
            own = cut(after.params, self.fragments, place)
            sent = own, (), jax.tree.map(lambda x: x[place], before.residual)
        own, received, lost = sent
        moved = jax.tree.map(jnp.subtract, theta, own)
        mine = jnp.float32(1 / self._islands.islands)
        return own, *self._exchange(number, theta, moved, mine, received, lost)

    def synchronise(self, before, after, figures, sent):
        place, count = self._place(before), self.fragments
        own, received, lost = sent
        theta, outer, now = (
            cut(x, count, place) for x in (before.params, before.outer, after.params)
        )
        delta = self._outer_gradient(theta, received)
        mean = jax.tree.map(jnp.subtract, theta, delta)
        theta, outer = reductions.outer_step(self.outer, theta, delta, outer)
        going_on = theta
        if self.delay:
            going_on = jax.tree.map(lambda g, x, then: g + (x - then), theta, now, own)
        residual = jax.tree.map(
            lambda x, new: lax.dynamic_update_index_in_dim(x, new, place, 0), before.residual, lost
        )
        new = after.replace(
            params=put(before.params, theta, count, place),
            outer=put(before.outer, outer, count, place),
            local_params=put(after.params, going_on, count, place),
            residual=residual,
        )
        figures = self._islands.sum_small(figures, self.axis)
        return new, self._with_drift(figures, own, mean)

    def _place(self, before):
        """Returns which fragment is synchronised in the round that begins with a state, []."""
        return before.step // self.every % self.fragments

    def residual(self, params, islands):
        one = super().residual(slice_shapes(params, self.fragments), islands)
        return jax.tree.map(lambda x: jnp.stack([x] * self.fragments), one)

    def load_residual(self, saved, like, old, new):
        like = slice_shapes(like, self.fragments)
        parts = [
            compression.move_residual(jax.tree.map(lambda x, i=i: x[:, i], saved), like, old, new)
            for i in range(self.fragments)
        ]
        return jax.tree.map(lambda *x: np.stack(x, axis=1), *parts)

    def traffic(self, params, opt_state, device_count):
        part = slice_shapes(params, self.fragments)
        return self._traffic_of(params, part, device_count)


def cut(tree: Tree, count: int, number: jax.Array) -> Tree:
    """Returns a fragment of a tree: the `number`-th of `count` slices of each leaf, [S]."""
    return jax.tree.map(
        lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), slices(tree, count)
    )


def put(tree: Tree, part: Tree, count: int, number: jax.Array) -> Tree:
    """Returns a tree with another fragment, the `number`-th of `count`; see `cut`."""
    joined = jax.tree.map(
        lambda x, new: lax.dynamic_update_index_in_dim(x, new, number, 0), slices(tree, count), part
    )
    return unslice(joined, tree)
