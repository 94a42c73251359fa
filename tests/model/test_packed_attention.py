"""The GPU's kernels run as JAX operations here; benchmarks/gpu.py runs them on a GPU."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdp.model import attention
from jaxdp.model.attention import attend
from jaxdp.model.packed_attention import packed_attention
from jaxdp.model.target import Target, compiling_for
from jaxdp.parallel.replicas import Replicas

kernels = functools.partial(packed_attention, interpret=True)


def arrays(rows, length, heads, groups, width, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(rows, length, n, width) for n in (heads, groups, groups, heads)]
    return [2 * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def results(function, causal, query, key, value, weights, segments):
    """Returns the output, and the gradients of its weighted sum."""

    def loss(query, key, value):
        out = function(query, key, value, segments=segments, causal=causal)
        return (out * weights).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *grads


def runs(*lengths):
    """Numbers the documents of a sequence."""
    return np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)


# Kernels go by blocks of 64 and 128 tokens: documents of one token, of a block, of more than one;
# 200 tokens and a width of 24 are no multiples; two heads share keys.
DOCUMENTS = np.array([runs(1, 1, 62, 64, 1, 71), runs(30, 150, 20)])
PACKED = arrays(2, 200, 2, 1, 24)
# 1 is padding: there is some, none, and nothing else.
PADDING = np.array([[0] * 70 + [1] * 58, [0] * 128, [1] * 128], np.int32)
PADDED = arrays(3, 128, 2, 2, 16)


@pytest.mark.parametrize(
    ("causal", "given", "segments"),
    [(True, PACKED, DOCUMENTS), (False, PADDED, PADDING)],
    ids=["packed", "padded"],
)
def test_it_is_masked_attention_and_so_are_its_gradients(causal, given, segments):
    ours = results(kernels, causal, *given, segments)
    masked = results(attend, causal, *given, segments)
    # Sums of up to 150 float32 numbers of size 1, rounded to 6e-8 each, in another order.
    for one, other in zip(ours, masked, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_no_token_sees_another_document():
    """By gradient: of a loss that reads every second document only."""
    query, key, value, weights = PACKED
    read = np.broadcast_to((DOCUMENTS % 2 == 0)[..., None, None], weights.shape)
    _, *gradients = results(kernels, True, query, key, value, weights * read, DOCUMENTS)
    for gradient in map(np.asarray, gradients):
        inside = read[:, :, : gradient.shape[2]]
        assert (gradient[~inside] == 0).all()
        assert (gradient[inside] != 0).any()


def test_scores_of_any_size_are_no_harm():
    query, key, value, weights = PADDED
    for found in results(kernels, False, 1e4 * query, key, value, weights, PADDING):
        assert np.isfinite(found).all()


def test_documents_on_two_gpus(monkeypatch):
    """What `attend` passes to the kernels is right, in bfloat16 and under pmap."""
    stand_in = mock.Mock(wraps=kernels)
    monkeypatch.setattr(attention, "packed_attention", stand_in)
    given, segments = arrays(2, 128, 2, 1, 16, "bfloat16"), DOCUMENTS[:, :128]
    exact = results(attend, True, *(x.astype("float32") for x in given), segments)
    assert not stand_in.called
    replicas = Replicas(jax.local_devices()[:2])
    with compiling_for(Target("gpu", 9.0)):
        step = replicas.pmap(lambda _, parts: results(attend, True, *parts), out_axes=0)
        found = step(0, replicas.shard([*given, segments]))
    assert stand_in.called
    for one, other in zip(found, map(np.asarray, exact), strict=True):
        assert one.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(one, "float32").reshape(other.shape) - other)
        # bfloat16 rounds to 2^-9 = 0.002; weights, results and gradients are rounded once each.
        assert error < 0.01 * np.linalg.norm(other)
