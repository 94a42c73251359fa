"""Slices of parameters in which hidden matrices stay whole, for optimizers that need these.

All hidden matrices of one shape are stacked, and each device gets an equal number of them. Where
the matrices can't be divided equally, matrices of zeros are added. All other parameters are cut as
by `islands.slices`. The functions also take trees of a masked optimizer's moments, which have
optax's MaskedNode for some parameters.

Shapes: n matrices of I inputs and O outputs, k of them for each device, S numbers in a slice.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxdp.model.matrices import dimensions, fans
from jaxdp.sync.islands import slices, unslice

Tree = Any


def deal(tree: Tree, params: Tree, count: int) -> Tree:
    """Cuts a tree into the slices of `count` devices.

    Args:
      tree: parameters, or arrays of their structure.
      params: the parameters, or their shapes.
      count: number of devices.

    Returns:
      A tree with a leaf [count, k, I, O] for each shape of hidden matrices, and [count, S] for each
      other parameter. For `dimensions` it looks like the parameters of a model with scanned layers.
    """
    flat, stacks = flatten_dict(tree), {}
    for shape, paths in _stacks(params).items():
        leaves = [flat.pop(path) for path in paths]
        stacks[_place(shape)] = leaves[0] if _is_masked(leaves[0]) else _cut(leaves, shape, count)
    return unflatten_dict(slices(flat, count) | stacks)


def _cut(leaves: list, shape: tuple[int, int], count: int) -> Any:
    """Stacks matrices, and cuts the stack: -> [count, k, I, O]."""
    lib: Any = np if isinstance(leaves[0], np.ndarray) else jnp
    stack = lib.concatenate([x.reshape(-1, *shape) for x in leaves])
    stack = lib.pad(stack, ((0, -len(stack) % count), (0, 0), (0, 0)))
    return stack.reshape(count, -1, *shape)


def collect(parts: Tree, like: Tree, params: Tree) -> Tree:
    """Undoes `deal`; like: the shapes before."""
    flat, shapes, matrices = flatten_dict(parts), flatten_dict(like), {}
    for shape, paths in _stacks(params).items():
        stack, first = flat.pop(_place(shape)), 0
        for path in paths:
            whole = shapes.pop(path)
            if not _is_masked(whole):
                end = first + whole.size // math.prod(shape)
                whole, first = stack.reshape(-1, *shape)[first:end].reshape(whole.shape), end
            matrices[path] = whole
    return unflatten_dict(unslice(flat, shapes) | matrices)


def _stacks(params: Tree) -> dict[tuple[int, int], list[tuple[str, ...]]]:
    """Returns the paths of all hidden matrices by their shape (I, O)."""
    found: dict[tuple[int, int], list[tuple[str, ...]]] = {}
    leaves = flatten_dict(params)
    for path, axes in flatten_dict(dimensions(params)).items():
        if axes is not None:
            found.setdefault(fans(leaves[path], axes), []).append(path)
    return found


def _place(shape: tuple[int, int]) -> tuple[str, ...]:
    """Returns the path of a stack of matrices, where `dimensions` takes it for one."""
    return "layers", "{}x{}".format(*shape), "kernel"


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def is_params(tree: Any) -> bool:
    """Whether a subtree of a state has the structure of parameters: nested dicts of arrays."""
    return isinstance(tree, dict) and all(
        is_params(x) or _is_masked(x) or hasattr(x, "shape") for x in tree.values()
    )
