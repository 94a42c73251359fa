import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from jaxdp.model.attention import attend, kernel
from jaxdp.model.rotary import Rotary, rotate
from jaxdp.model.target import Target, compiling_for


def arrays(length, heads, groups, dtype="float32"):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, length, n, 8) for n in (heads, groups, groups, heads)]
    return [2 * jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


def results(function, query, key, value, weights):
    """Returns the function's output, and the gradients of its weighted sum."""

    def loss(query, key, value):
        out = function(query, key, value)
        return (out * weights).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(query, key, value)
    return out, *grads


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "groups"), [(7, 4, 4), (128, 2, 2), (256, 4, 2), (320, 2, 1), (512, 1, 1)]
)
def test_it_is_attention_and_so_are_its_gradients(length, heads, groups, causal, masked):
    """Compared with JAX's attention, in one block (7 and 320 tokens), two and four."""
    mask = None
    if masked:
        mask = jax.random.bernoulli(jax.random.key(1), 0.5, (2, length, length))
        mask |= jnp.eye(length, dtype=bool)

    def ours(query, key, value):
        return attend(query, key, value, mask, causal=causal)

    def jaxs(query, key, value):
        heads_mask = None if mask is None else mask[:, None]
        return jax.nn.dot_product_attention(query, key, value, mask=heads_mask, is_causal=causal)

    given = arrays(length, heads, groups)
    # Sums of up to 512 float32 numbers of size 1, rounded to 6e-8 each.
    for one, other in zip(results(ours, *given), results(jaxs, *given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("window", [0, 1, 50, 100])
@pytest.mark.parametrize("dropped", [False, True])
def test_windows_and_dropout(window, dropped):
    """Compared with the definition, in two blocks of 64 tokens; also their gradients."""
    factors = 2 * jax.random.bernoulli(jax.random.key(1), 0.5, (2, 128, 4, 128)).astype("float32")
    distances = jnp.arange(128)[:, None] - jnp.arange(128)
    seen = (distances >= 0) & (distances < (window or 128))

    def ours(query, key, value):
        return attend(
            query, key, value, causal=True, window=window, factors=factors if dropped else None
        )

    def defined(query, key, value):
        key, value = (jnp.repeat(x, 2, 2) for x in (key, value))
        scores = jnp.einsum("blhk,bshk->blhs", query, key) / 8**0.5
        weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
        return jnp.einsum("blhs,bshk->blhk", weights * factors if dropped else weights, value)

    given = arrays(128, 4, 2)
    # Sums of up to 128 float32 numbers of size 1, rounded to 6e-8 each.
    for one, other in zip(results(ours, *given), results(defined, *given), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-5)


def test_bfloat16_is_near_float32():
    def ours(query, key, value):
        return attend(query, key, value, causal=True)

    given = arrays(256, 2, 2, "bfloat16")
    wide = [x.astype("float32") for x in given]
    for one, other in zip(results(ours, *given), results(ours, *wide), strict=True):
        assert one.dtype == jnp.bfloat16
        # bfloat16 rounds to 2^-9 = 0.002; weights, results and gradients are rounded once each.
        error = jnp.linalg.norm(one.astype("float32") - other) / jnp.linalg.norm(other)
        assert error < 0.01


@pytest.fixture
def an_h100(monkeypatch):
    """Has JAX's attention compute what cuDNN would, and lists how that was asked for."""
    asked, attention_of_jax = [], jax.nn.dot_product_attention

    def stand_in(*arrays, implementation, **options):
        asked.append((implementation, options))
        return attention_of_jax(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    with compiling_for(Target("gpu", 9.0)):
        yield asked


def test_fused_kernels_attend_where_they_can(an_h100):
    assert kernel("bfloat16", 64, masked=False) == kernel("float16", 128, masked=False) == "cudnn"
    for dtype, width, masked in (
        ("float32", 64, False),
        ("bfloat16", 60, False),
        ("bfloat16", 256, False),
        ("float32", 64, True),
        ("bfloat16", 256, True),
    ):
        assert kernel(dtype, width, masked) == "xla"
    assert kernel("bfloat16", 64, masked=True) == kernel("float16", 24, masked=True) == "packed"
    assert kernel("bfloat16", 64, masked=False, window=8) == "cudnn"
    assert kernel("bfloat16", 64, masked=True, window=8) == "xla"
    assert kernel("bfloat16", 64, masked=False, dropout=True) == "xla"


def test_xla_attends_on_a_cpu():
    assert kernel("bfloat16", 64, masked=False) == kernel("bfloat16", 64, masked=True) == "xla"


@pytest.mark.parametrize("length", [0, 48])
def test_what_cudnn_gets_is_attention(an_h100, length):
    """With a window or none; that it compiles on several devices, benchmarks/gpu.py shows."""

    def loss(query, key, value):
        return attend(query, key, value, causal=True, window=length).astype("float32").sum()

    def gradients(*arrays):
        split = PartitionSpec("batch")
        mesh = Mesh(jax.local_devices()[:2], "batch")
        each = jax.shard_map(jax.grad(loss, (0, 1, 2)), mesh=mesh, in_specs=split, out_specs=split)
        return jax.jit(each)(*arrays)

    query, key, value, _ = arrays(128, 4, 2, "bfloat16")
    theirs = gradients(query, key, value)
    window = (47, 0) if length else None
    assert an_h100 == [("cudnn", {"is_causal": True, "local_window_size": window})]
    with compiling_for(Target("cpu")):
        ours = gradients(query, key, value)
    for one, other in zip(theirs, ours, strict=True):
        error = jnp.linalg.norm((one - other).astype("float32"))
        assert error < 0.01 * jnp.linalg.norm(other.astype("float32"))
    assert len(an_h100) == 1


def test_scores_of_any_size_are_no_harm():
    query, key, value, _ = arrays(128, 1, 1)
    out = attend(1e4 * query, key, value, causal=True)
    assert jnp.isfinite(out).all()
    # With such large scores the softmax chooses one key.
    assert (jnp.abs(out[:, :, None] - value[:, None]).sum(-1).min(2) < 1e-3).mean() > 0.95


def test_rotary_scores_depend_on_distance_only():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        positions = jnp.array([[i]]), jnp.array([[j]])
        return jnp.sum(
            rotate(query, positions[0], Rotary(1e4)) * rotate(key, positions[1], Rotary(1e4))
        )

    np.testing.assert_allclose(score(5, 2), score(105, 102), rtol=1e-4)
    assert not np.isclose(score(5, 2), score(5, 3), rtol=1e-2)
