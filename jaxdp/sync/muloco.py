"""DiLoCo with Muon inside, where what isn't a hidden matrix is updated with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxdp.model.matrices import is_hidden
from jaxdp.sync.local_methods import DiLoCo
from jaxdp.sync.reductions import Tree


class MuLoCo(DiLoCo):
    """diloco with Muon: MuLoCo (Thérien et al. 2025), but for what isn't a hidden matrix.

    Hidden matrices are synchronised as by `DiLoCo`, with Muon as the inner optimizer. Embeddings,
    norms, biases and an untied head have AdamW. During a round of H steps each replica m updates
    them, too, and sums their gradients gₘ. At the round's end these updates are undone, and all
    devices make the same H updates, each 1 / √H as large as usual, with

        ḡ = (1 / H) Σ wₘ Σ gₘ(t)   summed over replicas m and the round's steps t.

    This is our choice: in the paper a replica's updates are kept, and their mean is sent, which has
    as many numbers as ḡ. If replicas see few tokens, that loses much: a token that only one of K
    replicas meets moves its embedding a K-th as far as with gradient_mean, where AdamW divides by
    the size of the mean gradient. The mean over H steps is up to √H times smaller than those it is
    of, hence 1 / √H. With H = 1 these parameters are trained as by gradient_mean.

    During a round, their outer momentum, which nothing else needs, holds the sums.
    """

    def begin(self, state):
        return self._with_sums(state, jax.tree.map(jnp.zeros_like, state.params))

    def update(self, state, grads):
        sums = jax.tree.map(jnp.add, optax.tree.get(state.outer, "trace"), grads)
        return self._with_sums(super().update(state, grads), sums)

    def load(self, saved, params, old, new):
        loaded = super().load(saved, params, old, new)
        # AdamW's moments are equal on all devices, unless fragments or an older version wrote them.
        first = jax.tree.map(lambda x: np.broadcast_to(x[0], x.shape), loaded)
        return _join(loaded, first)

    def _with_sums(self, state, sums):
        momentum = _merge(optax.tree.get(state.outer, "trace"), sums)
        return state.replace(outer=optax.tree.set(state.outer, trace=momentum))

    def _moved(self, before, after, steps):
        means = jax.tree.map(lambda x: x / steps, optax.tree.get(after.outer, "trace"))
        return _merge(super()._moved(before, after, steps), means)

    def _go_on(self, before, after, delta, steps):
        mean, new = super()._go_on(before, after, delta, steps)

        def update(_, carry):
            params, opt_state = carry
            updates, moments = after.tx.update(delta, opt_state, params)
            smaller = jax.tree.map(lambda x: x * steps**-0.5, updates)
            made = optax.apply_updates(params, smaller)
            return _merge(params, made), _join(opt_state, moments)

        others, moments = lax.fori_loop(0, steps, update, (before.params, before.opt_state))
        new = new.replace(
            params=_merge(new.params, others), opt_state=_join(after.opt_state, moments)
        )
        # The drift that is reported is that of hidden matrices.
        mean = _merge(mean, after.params)
        return mean, self._with_sums(new, jax.tree.map(jnp.zeros_like, delta))


def _merge(hidden: Tree, others: Tree) -> Tree:
    """Returns hidden matrices of the first tree of parameters, and all others of the second."""
    return jax.tree.map(lambda x, y, one: x if one else y, hidden, others, is_hidden(hidden))


def _join(hidden: optax.OptState, others: optax.OptState) -> optax.OptState:
    """Returns moments of hidden matrices of the first state, and all others of the second."""
    moments = {"muon": hidden.inner_states["muon"], "adam": others.inner_states["adam"]}
    return hidden._replace(inner_states=moments)
