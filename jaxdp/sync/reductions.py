"""How replicas are synchronised: pure functions of a pytree and an axis name.

`methods` combines them into the choices of sync.method. To add a method, write its function here
and its class there.

Sums and their weights are summed over devices, then divided once. Unlike a mean of means, this is
exact where devices hold different numbers of tokens.

`figures` is a dict of small sums that are synchronised along with the gradient: loss (this device's
sum, nats), tokens [N] (the device's own count at its own index, zero elsewhere), and more such.

Shapes: N devices, A micro-batches, b sequences per device, S numbers in a device's slice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from jaxdp.sync.buckets import BUCKET_BYTES, by_buckets
from jaxdp.sync.islands import Islands

Tree = Any
Figures = dict[str, jax.Array]


def per_device(x: jax.Array, axis_name: str) -> jax.Array:
    """Puts a [] value at this device's index of [N] zeros; psum then gives every device's value."""
    mine = jnp.arange(lax.axis_size(axis_name)) == lax.axis_index(axis_name)
    return jnp.where(mine, x, 0)


def divide(sums: Tree, figures: Figures) -> Tree:
    """Divides sums by the number of tokens; a batch without tokens, as in masked-LM, gives 0.

    It multiplies by 1 / weight, since XLA would turn a division into that in some programs only.
    """
    weight = figures["tokens"].sum()
    scale = 1 / jnp.where(weight > 0, weight, 1)
    return jax.tree.map(lambda x: x * scale, sums)


def gradient_mean(
    sums: Tree, figures: Figures, axis_name: str, dtype: str = "float32"
) -> tuple[Tree, Figures]:
    """Computes means over all devices' tokens from each device's sums, in one collective.

    Args:
      sums: a pytree of this device's sums over its tokens.
      figures: this device's figures.
      axis_name: name of the device axis.
      dtype: dtype in which sums are sent; "bfloat16" rounds each to 8 bits before the addition.

    Returns:
      The means, float32, and the figures summed over devices.
    """
    sent = jax.tree.map(lambda x: x.astype(dtype), sums)
    sent, figures = lax.pmean((sent, figures), axis_name)
    means = divide(jax.tree.map(lambda x, s: x.astype(s.dtype), sent, sums), figures)
    return means, jax.tree.map(lambda x: x * lax.axis_size(axis_name), figures)


def parameter_mean(
    tree: Tree, before: Tree, tokens: jax.Array, axis_name: str, islands: Islands
) -> Tree:
    """Averages the replicas' trees after local updates, θ' = Σ wᵢ θᵢ (Stich 2019).

    An island's weight wᵢ is its share of the tokens: 1 / K if all have the same number.

    Args:
      tree: this island's tree; integers in it count its updates, without skipped ones.
      before: the tree that all devices had after the last synchronisation.
      tokens: [N], each device's number of tokens since then.
      axis_name: name of the device axis.
      islands: the groups of devices that hold the same tree.
    """
    mine = share(tokens, axis_name, islands)
    # Updates since then are few, so exact as floats: one collective for everything.
    own = jax.tree.map(lambda x, b: x if _is_float(x) else (x - b).astype(mine.dtype), tree, before)
    means = islands.sum_between(jax.tree.map(lambda x: x * mine, own), axis_name)
    return jax.tree.map(
        lambda m, b: m if _is_float(b) else b + jnp.rint(m).astype(b.dtype), means, before
    )


def share(tokens: jax.Array, axis_name: str, islands: Islands) -> jax.Array:
    """Returns this device's island's share, [], of the tokens [N] of all devices."""
    tokens = tokens.reshape(islands.islands, islands.size).sum(1)
    total = tokens.sum()
    shares = jnp.where(total > 0, tokens / jnp.where(total > 0, total, 1), 1 / islands.islands)
    return shares[islands.number(axis_name)]


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def drift(params: Tree, mean: Tree, axis_name: str) -> jax.Array:
    """Returns how far replicas are apart: the root mean square of |θᵢ - θ̄| over devices, / |θ̄|."""
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, params, mean), squared=True)
    return jnp.sqrt(lax.pmean(apart, axis_name)) / optax.tree.norm(mean)


def outer_step(
    outer: optax.GradientTransformation, before: Tree, delta: Tree, state: Tree
) -> tuple[Tree, Tree]:
    """Makes DiLoCo's outer step (Douillard et al. 2023).

    Args:
      outer: the outer optimizer, Nesterov momentum.
      before: parameters after the last synchronisation.
      delta: the outer gradient: `before` minus the mean of the replicas' parameters now.
      state: state of the outer optimizer.

    Returns:
      The new parameters and the outer optimizer's new state.
    """
    updates, state = outer.update(delta, state, before)
    return optax.apply_updates(before, updates), state


def scatter_mean(
    cut: Tree, figures: Figures, axis_name: str, dtype: str = "float32"
) -> tuple[Tree, Figures]:
    """Computes `gradient_mean` of slices [N, S], but returns only this device's, [S]."""

    def send(joined):
        return lax.psum_scatter(joined.astype(dtype), axis_name).astype(joined.dtype)

    figures = lax.psum(figures, axis_name)
    return divide(by_buckets(send, cut), figures), figures


def all_gather(mine: Tree, axis_name: str) -> Tree:
    """Returns all devices' slices, [N, S], from this device's, [S]."""
    # A device's part is limited, so that the buckets are as in `scatter_mean`.
    limit = BUCKET_BYTES // lax.axis_size(axis_name)
    return by_buckets(lambda x: lax.all_gather(x, axis_name), mine, limit=limit)


def pairwise_sum(tree: Tree) -> Tree:
    """Sums over the first axis, of length 2^k: neighbours, then neighbouring sums, and so on."""
    while len(jax.tree.leaves(tree)[0]) > 1:
        tree = jax.tree.map(lambda x: x[0::2] + x[1::2], tree)
    return jax.tree.map(lambda x: x[0], tree)


def doubling_sum(tree: Tree, axis_name: str) -> Tree:
    """Sums over a power of two of devices in the order of `pairwise_sum`, by recursive doubling.

    In round d each device adds the sum of the device whose number differs in bit d. As a + b =
    b + a also in floating point, after log2(N) rounds all devices hold the same sum.
    """
    count, distance = lax.axis_size(axis_name), 1
    flat, unravel = ravel_pytree(tree)  # One collective a round, not one for each leaf.
    while distance < count:
        other = lax.ppermute(flat, axis_name, [(i, i ^ distance) for i in range(count)])
        flat = lax.optimization_barrier(flat + other)
        distance *= 2
    return unravel(flat)


def accumulate(
    value_and_grad: Callable, params: Tree, batch: Tree, count: int, last_apart: bool = False
) -> Tree:
    """Sums what a function returns over `count` micro-batches, one at a time.

    In training it returns ((loss_sum, weight_sum), gradients), in evaluation only the first part.

    With `last_apart` the last micro-batch comes after the loop over the others, not in it: so its
    sums can be sent while its backward pass still runs (as in PyTorch's DDP, Li et al. 2020).
    """
    if count == 1:
        return value_and_grad(params, batch)
    micros = _cut(batch, count)

    def add(params, total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro))

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    looped = jax.tree.map(lambda x: x[:-1], micros) if last_apart else micros
    total, _ = lax.scan(lambda total, micro: (add(params, total, micro), None), zero, looped)
    if not last_apart:
        return total
    # Not before the loop has ended, so that only one micro-batch has activations at a time.
    total, params, micros = lax.optimization_barrier((total, params, micros))
    return add(params, total, jax.tree.map(lambda x: x[-1], micros))


def accumulate_in_order(value_and_grad: Callable, params: Tree, batch: Tree, count: int) -> Tree:
    """Sums like `accumulate`, but in the order of `pairwise_sum` and by the same program.

    The code around the loop and the number of its iterations depend on the number of devices; the
    bits of a part must not. So XLA may neither fuse across the loop's border nor unroll or remove
    the loop: its length is hidden from XLA, and a single part gets an empty place beside it.
    """
    micros = _cut(batch, count)
    places = max(count, 2)
    micros = jax.tree.map(lambda x: jnp.resize(x, (places, *x.shape[1:])), micros)

    def part(i):
        micro = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), micros)
        return lax.optimization_barrier(value_and_grad(params, lax.optimization_barrier(micro)))

    def put(carry):
        i, parts = carry
        new = part(i)
        parts = jax.tree.map(lambda xs, x: lax.dynamic_update_index_in_dim(xs, x, i, 0), parts, new)
        return i + 1, parts

    shapes = jax.eval_shape(part, 0)
    parts = jax.tree.map(lambda x: jnp.zeros((places, *x.shape), x.dtype), shapes)
    # Token ids are never negative, so length is always count; XLA can't know that.
    data = jax.tree.leaves(batch)[0].reshape(-1)[0]
    length = count - (data < -(2**30)).astype(jnp.int32)
    _, parts = lax.while_loop(lambda carry: carry[0] < length, put, (jnp.int32(0), parts))
    parts = jax.tree.map(lambda x: x[:count], parts)
    return lax.optimization_barrier(pairwise_sum(parts))


def ordered_norm(tree: Tree) -> jax.Array:
    """Computes the global norm, [], in an order of additions that the compiler can't change."""
    squares = lax.optimization_barrier(jnp.square(ravel_pytree(tree)[0]))
    squares = jnp.pad(squares, (0, (1 << (squares.size - 1).bit_length()) - squares.size))
    while squares.size > 1:
        half = squares.size // 2
        squares = squares[:half] + squares[half:]
    return jnp.sqrt(squares[0])


def _cut(batch: Tree, count: int) -> Tree:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
