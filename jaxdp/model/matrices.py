"""Which of a model's parameters are hidden matrices."""

import math
from typing import Any

import jax
from optax.contrib import MuonDimensionNumbers


def dimensions(params: Any) -> Any:
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


def is_hidden(params: Any) -> Any:
    """Returns whether each parameter is a hidden matrix."""
    return jax.tree.map(
        lambda axes: axes is not None,
        dimensions(params),
        is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
    )


def fans(x: Any, axes: MuonDimensionNumbers) -> tuple[int, int]:
    """Returns the numbers of inputs and outputs of a hidden matrix, an array or its shape."""
    inputs, outputs = (
        math.prod(x.shape[i] for i in one) for one in (axes.reduction_axis, axes.output_axis)
    )
    return inputs, outputs
