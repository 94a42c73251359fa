import jax
import numpy as np
import optax
import pytest

from jaxdp.model.matrices import dimensions
from jaxdp.sync.dealing import collect, deal


def params(scan_layers):
    """Matrices of 4 x 6, some with two axes of outputs, others of 6 x 4, and vectors."""
    shapes = {"up": (4, 6), "query": (4, 3, 2), "key": (4, 2, 3), "down": (6, 4)}
    front = (5,) if scan_layers else ()
    block = {name: {"kernel": (*front, *shape)} for name, shape in shapes.items()}
    tree = {"layers" if scan_layers else "layer_0": block | {"norm": {"scale": (*front, 4)}}}
    tree |= {"layer_1": {"up": {"kernel": (4, 6)}}, "embed": {"embedding": (5, 4)}}
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_matrices_are_dealt_whole_and_come_back(count, scan_layers):
    tree = params(scan_layers)
    dealt = deal(tree, tree, count)
    assert all(len(x) == count for x in jax.tree.leaves(dealt))
    stack = dealt["layers"]["4x6"]["kernel"]
    matrices = stack.reshape(-1, 4, 6)
    assert len(matrices) % count == 0
    assert any((x == tree["layer_1"]["up"]["kernel"]).all() for x in matrices)
    jax.tree.map(np.testing.assert_array_equal, collect(dealt, tree, tree), tree)
    # An optimizer that updates a device's part takes a stack for matrices of scanned layers.
    mine = dimensions(jax.tree.map(lambda x: x[0], dealt))
    assert mine["layers"]["4x6"]["kernel"] == ((1,), (2,)) and mine["embed"]["embedding"] is None


@pytest.mark.parametrize("hidden", [False, True])
def test_moments_of_some_parameters_are_dealt_as_all_are(hidden):
    """Masked: an optimizer's for hidden matrices, and that for the others."""
    tree = params(False)
    labels = jax.tree.map(
        lambda axes: (axes is None) != hidden,
        dimensions(tree),
        is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"),
    )
    moments = optax.masked(optax.trace(0.9), labels)
    expected = moments.init(tree).inner_state.trace
    dealt = deal(expected, tree, 2)
    assert isinstance(dealt["layers"]["4x6"]["kernel"], optax.MaskedNode) != hidden
    assert isinstance(dealt["embed"]["embedding"], optax.MaskedNode) == hidden
    found = collect(dealt, expected, tree)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
