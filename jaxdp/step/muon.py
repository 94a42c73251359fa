"""Muon for the hidden matrices, and AdamW for all other parameters (Jordan et al. 2024).

Shapes: n matrices of I inputs and O outputs, s the smaller of I and O.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from jax import lax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from jaxdp.model.matrices import dimensions, fans, is_hidden

RMS = 0.2  # Makes Muon's updates as large as AdamW's, so both take the same learning rate.
EPSILON = 1e-8
# (a, b, c) of odd polynomials a x + b x^3 + c x^5. Applied one after the other, they bring singular
# values from 0.01 to 1 to 0.73 to 1.27: the best that three can do, by the method of the Polar
# Express (Amsel et al. 2025, arXiv 2505.16932).
POLYNOMIALS = ((8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526))
BATCH_BYTES = 2**26  # Of matrices that are orthogonalised at a time; more would only cost memory.


def muon(
    schedule: optax.Schedule, b1: float, b2: float, weight_decay: float, decay_mask: Callable
) -> optax.GradientTransformation:
    """Returns Muon with AdamW for what is no hidden matrix; both decay what the mask says.

    `optax.contrib.muon` gives AdamW no mask, so it can't decay embeddings without norm scales.

    Args:
      schedule: step -> learning rate, for both.
      b1: momentum, of Nesterov's kind, for both.
      b2: AdamW's decay of second moments.
      weight_decay: decoupled weight decay.
      decay_mask: parameters -> which of them decay.
    """

    def decayed(updates, params):
        def add(update, param, decays):
            return update + weight_decay * param if decays else update

        return jax.tree.map(add, updates, params, decay_mask(params))

    hidden = optax.chain(
        orthogonalised_momentum(b1),
        optax.stateless(_scale_by_shape),
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.scale_by_learning_rate(schedule),
    )
    # `optax.add_decayed_weights` with a mask has a state, which older checkpoints lack here.
    others = optax.chain(
        optax.scale_by_adam(b1, b2, nesterov=True),
        optax.stateless(decayed),
        optax.scale_by_learning_rate(schedule),
    )
    return optax.partition({"muon": hidden, "adam": others}, _labels)


def orthogonalised_momentum(beta: float) -> optax.GradientTransformation:
    """Maps the gradient of hidden matrices to their orthogonalised Nesterov momentum.

    It is `optax.contrib.scale_by_muon` but for the iterations, and its state is the same: ns_coeffs
    are in it only because older checkpoints hold them.
    """

    def update(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        updates = _orthogonalise_all(momentum)
        return updates, MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon(beta=beta).init, update)


def _orthogonalise_all(tree):
    """Orthogonalises all hidden matrices, in batches of one shape.

    One product of many small matrices takes less time than many products.
    """
    leaves, treedef = jax.tree.flatten(tree)
    axes = jax.tree.leaves(dimensions(tree), is_leaf=lambda x: isinstance(x, MuonDimensionNumbers))
    # A hidden matrix's input axes are its first ones.
    matrices = [x.reshape(-1, *fans(x, one)) for x, one in zip(leaves, axes, strict=True)]
    for batch in _batches(matrices):
        joined = orthogonalise(jnp.concatenate([matrices[i] for i in batch]))
        ends = list(itertools.accumulate(len(matrices[i]) for i in batch))[:-1]
        for i, x in zip(batch, jnp.split(joined, ends), strict=True):
            leaves[i] = x.reshape(leaves[i].shape)
    return jax.tree.unflatten(treedef, leaves)


def _batches(matrices: Sequence[jax.Array]) -> list[list[int]]:
    """Returns the numbers of arrays [n, I, O] with the same I and O, of about BATCH_BYTES."""
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for number, x in enumerate(matrices):
        batches = found.setdefault(x.shape[1:], [[]])
        if batches[-1] and sum(matrices[i].nbytes for i in batches[-1]) >= BATCH_BYTES:
            batches.append([])
        batches[-1].append(number)
    return list(itertools.chain(*found.values()))


def orthogonalise(x: jax.Array) -> jax.Array:
    """Brings all singular values of matrices near 1, and keeps their singular vectors.

    With X = U S V^T, it computes U p(S) V^T for the composition p of `POLYNOMIALS`, from powers of
    the Gram matrix X X^T or X^T X, whichever is smaller. Before, S is divided by the eighth root of
    the sum of its eighth powers (its Schatten norm for 8), which is at least the largest singular
    value, and at most 1.9 times it for 128 equal ones; the usual Frobenius norm is 11 times it.
    These values are from 0.73 to 1.27 in the end, but for those that were below 0.01: they grow up
    to 78 times.

    XLA adds in another order where it has other numbers of threads or devices, which fixed_order
    must not depend on: in sums over whole matrices, and in products of a matrix that is transposed
    in the same operation. So there are none of these here.

    Args:
      x: [n, I, O] float32.

    Returns:
      [n, I, O] float32. A matrix of zeros stays one.
    """
    tall = x.shape[1] > x.shape[2]
    if tall:
        gram = lax.optimization_barrier(jnp.swapaxes(x, 1, 2)) @ x  # [n, s, s]
    else:
        gram = jnp.einsum("nij,nkj->nik", x, x)
    # Divided by X's Frobenius norm, so that powers of small numbers don't underflow.
    size = jnp.sqrt(jnp.trace(gram, axis1=1, axis2=2))[:, None, None] + EPSILON
    gram /= jnp.square(size)
    square = gram @ gram
    rows = jnp.square(square) @ jnp.ones((gram.shape[-1], 1), gram.dtype)
    norm = jnp.sqrt(jnp.sqrt(jnp.sum(rows, 1, keepdims=True))) + EPSILON
    gram, square = gram / norm, square / jnp.square(norm)

    def polynomial(coefficients, gram, square):
        a, b, c = coefficients
        return a * jnp.eye(gram.shape[-1], dtype=gram.dtype) + b * gram + c * square

    factor = polynomial(POLYNOMIALS[0], gram, square)
    total = factor / (jnp.sqrt(norm) * size)
    for coefficients in POLYNOMIALS[1:]:
        gram = factor @ (factor @ gram)  # The Gram matrix of X after the last factor.
        factor = polynomial(coefficients, gram, gram @ gram)
        total = factor @ total
    return x @ total if tall else total @ x


def _scale_by_shape(updates, params=None):
    """Gives updates the root mean square of AdamW's, whatever their shape (Liu et al. 2025)."""
    del params

    def scaled(x, axes):
        return jnp.sqrt(max(fans(x, axes))) * RMS * x

    return jax.tree.map(scaled, updates, dimensions(updates))


def _labels(params):
    """Returns which of the two optimizers updates each parameter."""
    return jax.tree.map(lambda hidden: "muon" if hidden else "adam", is_hidden(params))
