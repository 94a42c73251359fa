"""How replicas agree: pure functions over a pytree and an axis name.

`methods` puts them together to the choices of sync.method. To add one, write its function here and
its class there.

Sums come undivided and with their weights: they are summed over devices and then divided, once,
which is exact also where devices hold different numbers of tokens, as a mean of means is not.

`figures` is a dict of small sums that travel along: loss (this device's sum, nats), tokens [N] (the
device's own count at its own index, zero elsewhere), and more of either kind.

Shapes: N devices, A micro-batches, b sequences per device, S numbers in a device's slice.
"""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

Tree = Any
Figures = dict[str, jax.Array]


def per_device(x: jax.Array, axis_name: str) -> jax.Array:
    """[] -> [N], zero but for this device's own place: summed over devices, everyone's values."""
    mine = jnp.arange(lax.axis_size(axis_name)) == lax.axis_index(axis_name)
    return jnp.where(mine, x, 0)


def divide(sums: Tree, figures: Figures) -> Tree:
    """Sums over tokens -> means; 0 where there was no token, as masked-LM batches can have it.

    It multiplies by 1 / weight, which XLA would do of itself in some programs and not in others.
    """
    weight = figures["tokens"].sum()
    scale = 1 / jnp.where(weight > 0, weight, 1)
    return jax.tree.map(lambda x: x * scale, sums)


def gradient_mean(
    sums: Tree, figures: Figures, axis_name: str, dtype: str = "float32"
) -> tuple[Tree, Figures]:
    """The mean over all tokens of all devices, from each device's sums, in one collective.

    Args:
      sums: a pytree of this device's sums over its tokens.
      figures: this device's.
      axis_name: of the devices.
      dtype: in which the sums are sent; "bfloat16" rounds each to 8 bits before they are added.

    Returns:
      The means, float32, and the figures summed over devices.
    """
    sent = jax.tree.map(lambda x: x.astype(dtype), sums)
    sent, figures = lax.pmean((sent, figures), axis_name)
    means = divide(jax.tree.map(lambda x, s: x.astype(s.dtype), sent, sums), figures)
    return means, jax.tree.map(lambda x: x * lax.axis_size(axis_name), figures)


def parameter_mean(tree: Tree, before: Tree, tokens: jax.Array, axis_name: str) -> Tree:
    """θ' = Σ wᵢ θᵢ, the recipe's average after independent local updates (Stich 2019).

    The weights wᵢ are the devices' shares of the tokens: 1 / N where all have the same number.

    Args:
      tree: this device's; integers count its updates, of which it may have skipped some.
      before: the tree that all devices had when they agreed last.
      tokens: [N], of each device since the replicas agreed last.
      axis_name: of the devices.
    """
    total = tokens.sum()
    shares = jnp.where(total > 0, tokens / jnp.where(total > 0, total, 1), 1 / len(tokens))
    mine = shares[lax.axis_index(axis_name)]
    # Counts since then are small: exact as floats, so that all goes in one collective.
    own = jax.tree.map(lambda x, b: x if _is_float(x) else (x - b).astype(mine.dtype), tree, before)
    means = lax.psum(jax.tree.map(lambda x: x * mine, own), axis_name)
    return jax.tree.map(
        lambda m, b: m if _is_float(b) else b + jnp.rint(m).astype(b.dtype), means, before
    )


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def drift(params: Tree, mean: Tree, axis_name: str) -> jax.Array:
    """How far replicas have come apart: root mean square of |θᵢ - θ̄| over devices, / |θ̄|."""
    apart = optax.tree.norm(jax.tree.map(jnp.subtract, params, mean), squared=True)
    return jnp.sqrt(lax.pmean(apart, axis_name)) / optax.tree.norm(mean)


def outer_step(
    outer: optax.GradientTransformation, before: Tree, mean: Tree, state: Tree
) -> tuple[Tree, Tree]:
    """DiLoCo's outer step (Douillard et al. 2023): the mean way back is the gradient.

    Args:
      outer: the outer optimizer, Nesterov momentum.
      before: parameters when the replicas agreed last.
      mean: of their parameters now.
      state: of the outer optimizer.

    Returns:
      The new parameters and the outer optimizer's new state.
    """
    delta = jax.tree.map(jnp.subtract, before, mean)
    updates, state = outer.update(delta, state, before)
    return optax.apply_updates(before, updates), state


def slices(tree: Tree, count: int) -> Tree:
    """Each leaf flattened, padded with zeros and cut into equal parts: [...] -> [count, s]."""

    def cut(x):
        pad = np.pad if isinstance(x, np.ndarray) else jnp.pad
        return pad(x.reshape(-1), (0, -x.size % count)).reshape(count, -1)

    return jax.tree.map(cut, tree)


def unslice(parts: Tree, like: Tree) -> Tree:
    """The inverse of `slices`; numbers of which each device has its own copy come as [count]."""
    return jax.tree.map(
        lambda x, shape: x.reshape(-1)[: shape.size].reshape(shape.shape), parts, like
    )


def scatter_mean(
    sums: Tree, figures: Figures, axis_name: str, dtype: str = "float32"
) -> tuple[Tree, Figures]:
    """`gradient_mean`, of which each device gets its own slice only: [s] of each leaf."""
    cut = slices(sums, lax.axis_size(axis_name))
    leaves, treedef = jax.tree.flatten(cut)
    sent = jnp.concatenate(leaves, axis=1).astype(dtype)
    mine = lax.psum_scatter(sent, axis_name).astype(leaves[0].dtype)
    figures = lax.psum(figures, axis_name)
    return divide(jax.tree.unflatten(treedef, _split(mine, leaves)), figures), figures


def all_gather(mine: Tree, like: Tree, axis_name: str) -> Tree:
    """Puts together what each device has a slice of, in one collective."""
    leaves, treedef = jax.tree.flatten(mine)
    every = lax.all_gather(jnp.concatenate(leaves), axis_name)
    return unslice(jax.tree.unflatten(treedef, _split(every, leaves)), like)


def _split(joined: jax.Array, leaves: list[jax.Array]) -> list[jax.Array]:
    ends = [0]
    for leaf in leaves:
        ends.append(ends[-1] + leaf.shape[-1])
    return [joined[..., a:b] for a, b in itertools.pairwise(ends)]


def pairwise_sum(tree: Tree) -> Tree:
    """[n, ...] -> [...], n a power of two: neighbours are added, then neighbouring sums, ..."""
    while len(jax.tree.leaves(tree)[0]) > 1:
        tree = jax.tree.map(lambda x: x[0::2] + x[1::2], tree)
    return jax.tree.map(lambda x: x[0], tree)


def doubling_sum(tree: Tree, axis_name: str) -> Tree:
    """Sum over a power of two of devices in the order of `pairwise_sum`, by recursive doubling.

    Round d adds what the device whose number differs in bit d has, so that after log2(N) rounds
    all hold the same tree of sums; a + b = b + a also in floating point.
    """
    count, distance = lax.axis_size(axis_name), 1
    flat, unravel = ravel_pytree(tree)  # One collective a round, not one for each leaf.
    while distance < count:
        other = lax.ppermute(flat, axis_name, [(i, i ^ distance) for i in range(count)])
        flat = lax.optimization_barrier(flat + other)
        distance *= 2
    return unravel(flat)


def accumulate(value_and_grad: Callable, params: Tree, batch: Tree, count: int) -> Tree:
    """Sums of ((loss_sum, weight_sum), gradients) over `count` micro-batches, one at a time."""
    if count == 1:
        return value_and_grad(params, batch)
    micros = _cut(batch, count)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro)), None

    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], micros))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add, zero, micros)[0]


def accumulate_in_order(value_and_grad: Callable, params: Tree, batch: Tree, count: int) -> Tree:
    """Like `accumulate`, but in the order of `pairwise_sum`, every part by the same program.

    Nothing may be fused across the loop's border, nor may the loop be unrolled or emptied: what is
    around it, and how often it runs, depends on the number of devices. So its length is hidden from
    XLA, and a single part has an empty place beside it, or it would not depend on the loop at all.
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
    # Never negative, which only we know.
    data = jax.tree.leaves(batch)[0].reshape(-1)[0]
    length = count - (data < -(2**30)).astype(jnp.int32)
    _, parts = lax.while_loop(lambda carry: carry[0] < length, put, (jnp.int32(0), parts))
    parts = jax.tree.map(lambda x: x[:count], parts)
    return lax.optimization_barrier(pairwise_sum(parts))


def ordered_norm(tree: Tree) -> jax.Array:
    """Global norm, []: a sum by halves, of which no compiler can choose the order."""
    squares = lax.optimization_barrier(jnp.square(ravel_pytree(tree)[0]))
    squares = jnp.pad(squares, (0, (1 << (squares.size - 1).bit_length()) - squares.size))
    while squares.size > 1:
        half = squares.size // 2
        squares = squares[:half] + squares[half:]
    return jnp.sqrt(squares[0])


def _cut(batch: Tree, count: int) -> Tree:
    return jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), batch)
