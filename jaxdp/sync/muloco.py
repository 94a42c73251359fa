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
    them, too, so that its hidden matrices are trained beside parameters that follow, and sums their
    gradients gₘ. At the round's end these updates are undone, and all devices make the same H
    updates, each 1 / √H as large as usual, with

        ḡ = (1 / H) Σ wₘ Σ gₘ(t)   summed over replicas m and the round's steps t.

    This is our choice: in the paper a replica's updates are kept, and their mean is sent, which has
    the same size as ḡ. If replicas see few tokens, that loses much: a token that only one of K
    replicas meets moves its embedding a K-th as far as with gradient_mean, because AdamW divides by
    the size of the gradient that it is given. If gradients are mostly noise, their mean over H
    steps is √H times smaller than each, hence 1 / √H, also of the weight decay. gₘ is clipped by
    the norm of replica m's own gradient, and is 0 in a step that it skips. With H = 1 and no
    clipping these parameters are trained as by gradient_mean.

    With few bits, gradients and changes are rounded in different blocks, each with a scale of its
    own, except for the block at the border between them.
    """

    def begin(self, state):
        # Only hidden matrices have outer momentum. Its place for the other parameters holds the
        # sums of their gradients; what an older version left there is cleared.
        return self._with_sums(state, jax.tree.map(jnp.zeros_like, state.params))

    def update(self, state, grads):
        sums = jax.tree.map(jnp.add, optax.tree.get(state.outer, "trace"), grads)
        return self._with_sums(super().update(state, grads), sums)

    def load(self, saved, params, old, new):
        loaded = super().load(saved, params, old, new)
        # AdamW's moments are equal on all devices, unless an older version wrote them.
        first = jax.tree.map(lambda x: np.broadcast_to(x[0], x.shape), loaded)
        return _join(loaded, first)

    def _with_sums(self, state, sums):
        momentum = _merge(optax.tree.get(state.outer, "trace"), sums)
        return state.replace(outer=optax.tree.set(state.outer, trace=momentum))

    def _with_drift(self, figures, params, mean):
        def hidden(tree):
            return _merge(tree, jax.tree.map(jnp.zeros_like, tree))

        return super()._with_drift(figures, hidden(params), hidden(mean))

    def _moved(self, before, after, figures):
        steps = len(figures["loss"])
        means = jax.tree.map(lambda x: x / steps, optax.tree.get(after.outer, "trace"))
        return _merge(super()._moved(before, after, figures), means)

    def _exchange(self, number, like, moved, mine, received, residual):
        residual = {name: _split(x) for name, x in residual.items()}
        received, residual = super()._exchange(
            number, _split(like), _split(moved), mine, received, residual
        )
        return received, {name: _unsplit(*x) for name, x in residual.items()}

    def _outer_gradient(self, like, received):
        return _unsplit(*super()._outer_gradient(_split(like), received))

    def _go_on(self, before, after, delta, figures):
        mean, new = super()._go_on(before, after, delta, figures)
        steps = len(figures["loss"])

        def update(_, carry):
            params, opt_state = carry
            updates, moments = after.tx.update(delta, opt_state, params)
            smaller = jax.tree.map(lambda x: x * steps**-0.5, updates)
            made = optax.apply_updates(params, smaller)
            return _merge(params, made), _join(opt_state, moments)

        others = lax.fori_loop(0, steps, update, (before.params, before.opt_state))
        # Where every island skipped every step there was no gradient: nothing is updated, and what
        # earlier rounds had lost is still to be sent.
        skipped = (figures["skipped"] == self._islands.islands).all()
        others, moments, lost = jax.tree.map(
            lambda x, y: jnp.where(skipped, x, y),
            (before.params, after.opt_state, before.residual),
            (*others, after.residual),
        )
        new = new.replace(
            params=_merge(new.params, others),
            opt_state=_join(after.opt_state, moments),
            residual={name: _merge(x, lost[name]) for name, x in new.residual.items()},
        )
        # Each device has summed other gradients, and between rounds all must hold the same state.
        return mean, self._with_sums(new, jax.tree.map(jnp.zeros_like, delta))


def _merge(hidden: Tree, others: Tree) -> Tree:
    """Returns hidden matrices of the first tree of parameters, and all others of the second."""
    return jax.tree.map(lambda x, y, one: x if one else y, hidden, others, is_hidden(hidden))


def _split(params: Tree) -> tuple[Tree, Tree]:
    """Returns hidden matrices and all others, each with None in place of the rest."""
    hidden = is_hidden(params)
    return (
        jax.tree.map(lambda x, one: x if one else None, params, hidden),
        jax.tree.map(lambda x, one: None if one else x, params, hidden),
    )


def _unsplit(hidden: Tree, others: Tree) -> Tree:
    """Undoes `_split`."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, hidden, others, is_leaf=lambda x: x is None
    )


def _join(hidden: optax.OptState, others: optax.OptState) -> optax.OptState:
    """Returns moments of hidden matrices of the first state, and all others of the second."""
    moments = {"muon": hidden.inner_states["muon"], "adam": others.inner_states["adam"]}
    return hidden._replace(inner_states=moments)
