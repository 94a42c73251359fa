"""Muon for the hidden matrices, and AdamW for all other parameters (Jordan et al. 2024)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

RMS = 0.2  # Makes Muon's updates as large as AdamW's, so both take the same learning rate.
NEWTON_SCHULZ_STEPS = 5
EPSILON = 1e-8


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

    It is `optax.contrib.scale_by_muon`, except that no matrix is transposed. XLA may sum a
    transposed matrix in another order in programs for one device than in those for several, and
    the results of fixed_order would depend on the number of devices.
    """

    def update(updates, state, params=None):
        del params
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        momentum = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
        updates = jax.tree.map(
            lambda x, axes: _orthogonalise(x, axes, state.ns_coeffs), momentum, dimensions(momentum)
        )
        return updates, MuonState(count, mu, state.ns_coeffs)

    return optax.GradientTransformation(scale_by_muon(beta=beta).init, update)


def _orthogonalise(x: jax.Array, axes: MuonDimensionNumbers, coefficients: jax.Array) -> jax.Array:
    """Makes all singular values of each matrix in x nearly 1, by Newton-Schulz iterations."""
    rows, columns = _fans(x, axes)
    matrices = x.reshape(-1, rows, columns)  # A hidden matrix's input axes are its first ones.
    a, b, c = coefficients.astype(x.dtype)

    def orthogonalise(x):
        x /= jnp.sqrt(jnp.sum(jnp.square(x))) + EPSILON
        for _ in range(NEWTON_SCHULZ_STEPS):
            if rows > columns:  # The smaller of the two products.
                gram = x.T @ x
                x = a * x + x @ (b * gram + c * gram @ gram)
            else:
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    return jax.vmap(orthogonalise)(matrices).reshape(x.shape)


def _scale_by_shape(updates, params=None):
    """Gives updates the root mean square of AdamW's, whatever their shape (Liu et al. 2025)."""
    del params

    def scaled(x, axes):
        return jnp.sqrt(max(_fans(x, axes))) * RMS * x

    return jax.tree.map(scaled, updates, dimensions(updates))


def _fans(x: jax.Array, axes: MuonDimensionNumbers) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a hidden matrix."""
    inputs, outputs = (
        math.prod(x.shape[i] for i in one) for one in (axes.reduction_axis, axes.output_axis)
    )
    return inputs, outputs


def dimensions(params):
    """Returns the input and output axes of each hidden matrix, and None for other parameters.

    Query, key and value kernels are [D, H, K], the attention's output kernel is [H, K, D]. Scanned
    layers add a leading layer axis, which is not part of the matrix.
    """

    def axes(path, leaf):
        if path[-1].key != "kernel" or path[-2].key == "head":
            return None
        front = int(path[0].key == "layers")
        every = tuple(range(front, leaf.ndim))
        inputs = 2 if path[-2].key == "out" else 1
        return MuonDimensionNumbers(every[:inputs], every[inputs:])

    return jax.tree.map_with_path(axes, params)


def _labels(params):
    """Returns which of the two optimizers updates each parameter."""
    return jax.tree.map(
        lambda axes: "adam" if axes is None else "muon",
        dimensions(params),
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )
