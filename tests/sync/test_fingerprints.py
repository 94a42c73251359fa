import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.common.errors import RunError
from jaxdp.parallel.replicas import Replicas
from jaxdp.sync.fingerprints import ReplicaCheck, fingerprints
from support.steps import corrupt, flip_lowest_bit

TREE = {"a": np.arange(12.0, dtype=np.float32).reshape(3, 4), "b": {"c": np.ones(5, np.int32)}}


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_equal_replicas_pass(devices):
    replicas = Replicas(jax.local_devices()[:devices])
    ReplicaCheck(replicas)(replicas.replicate(TREE), 3)


@pytest.mark.parametrize("path", ["a", "b/c"])
def test_one_flipped_bit_is_found_and_named(path):
    replicas = Replicas(jax.local_devices()[:4])
    tree = corrupt(TREE, path, 2, replicas, flip_lowest_bit)
    message = rf"after step 7 device 2 of 0\.\.3 holds another state than most, first in {path}:"
    with pytest.raises(RunError, match=message):
        ReplicaCheck(replicas)(tree, 7)


def test_swapped_elements_are_found():
    """A plain sum would not change."""
    replicas = Replicas(jax.local_devices()[:4])
    tree = corrupt(TREE, "a", 0, replicas, lambda x: x[::-1].copy())
    with pytest.raises(RunError, match="device 0 of"):
        ReplicaCheck(replicas)(tree, 1)


def test_every_bit_and_place_counts():
    base = np.random.default_rng(0).normal(size=50).astype(np.float32)
    variants = [base, base[::-1].copy(), np.roll(base, 1)]
    for bit in range(32):
        changed = base.copy()
        changed.view(np.uint32)[17] ^= np.uint32(1 << bit)
        variants.append(changed)
    found = {int(jax.jit(fingerprints)({"x": v})[0]) for v in variants}
    assert len(found) == len(variants)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8"])
def test_any_dtype_of_a_state(dtype):
    x = jnp.arange(6).astype(dtype)
    assert fingerprints([x])[0] != fingerprints([x.at[3].set(0)])[0]
