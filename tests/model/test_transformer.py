import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from jaxdp.configs import shakespeare_char_cpu, shakespeare_char_tuned
from jaxdp.model.architecture import ModelConfig
from jaxdp.model.block import Lookback, Tokens
from jaxdp.model.flops import flops_per_token
from jaxdp.model.layers import Dropout
from jaxdp.model.transformer import (
    Transformer,
    initial_params,
    num_parameters,
    parameter_shapes,
)
from support.models import INPUTS, LLAMA, SMALL, VARIANTS, apply, initialised

every_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def test_causal_by_gradient():
    """The logits at a position depend on every token up to it and on none after it."""
    model, params = initialised(LLAMA)  # Its head is untied, so embeddings act on inputs only.

    @jax.jit
    @jax.jacobian
    def influence(rows):
        embedding = params["embed"]["embedding"].at[INPUTS[0]].set(rows)
        changed = params | {"embed": {"embedding": embedding}}
        return model.apply({"params": changed}, INPUTS[:1])[0].sum(-1)

    # [positions of logits, positions of tokens]
    reaches = jnp.abs(influence(params["embed"]["embedding"][INPUTS[0]])).sum(-1) > 0
    assert (reaches == jnp.tril(jnp.ones((8, 8), bool))).all()


@every_variant
def test_later_tokens_change_no_earlier_logits(config):
    model, params = initialised(config)
    logits = apply(model, params, INPUTS)
    for position in range(1, 8):
        changed = np.array(INPUTS)
        changed[:, position] = (changed[:, position] + 1) % 11
        other = apply(model, params, changed)
        assert (other[:, :position] == logits[:, :position]).all()
        assert (other[:, position] != logits[:, position]).any()


def test_masked_model_sees_both_sides():
    config = dataclasses.replace(SMALL, causal=False)
    model, params = initialised(config)
    changed = INPUTS.at[:, 7].set(0)
    logits = [apply(model, params, x) for x in (INPUTS, changed)]
    assert (logits[0][0, 0] != logits[1][0, 0]).any()


@every_variant
def test_cache_gives_the_same_logits(config):
    """Reading a prefix, then token by token, gives the logits of reading everything at once."""
    model, params = initialised(config)
    expected = apply(model, params, INPUTS)
    positions = jnp.broadcast_to(jnp.arange(8), INPUTS.shape)

    @jax.jit
    def read(tokens, positions, cache):
        return model.apply(
            {"params": params, **cache}, tokens, positions=positions, decode=True, mutable=["cache"]
        )

    logits, cache = read(INPUTS[:, :3], positions[:, :3], {})
    parts = [logits]
    for i in range(3, 8):
        logits, cache = read(INPUTS[:, i : i + 1], positions[:, i : i + 1], cache)
        parts.append(logits)
    # Sums of 16 terms in another order: a few units in the last place of float32.
    np.testing.assert_allclose(jnp.concatenate(parts, 1), expected, rtol=1e-4, atol=1e-5)


def test_scan_and_remat_change_nothing():
    plain, params = initialised(SMALL)
    layers = [params[f"layer_{i}"] for i in range(2)]
    stacked = {k: v for k, v in params.items() if not k.startswith("layer_")}
    stacked["layers"] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    expected = apply(plain, params, INPUTS)
    for remat in (False, True):
        model = Transformer(dataclasses.replace(SMALL, scan_layers=True, remat=remat))
        np.testing.assert_allclose(apply(model, stacked, INPUTS), expected, rtol=1e-5, atol=1e-6)


def test_grouped_heads_are_heads_that_share_keys():
    """Full attention with repeated key/value heads gives the same logits as grouped attention."""
    grouped, params = initialised(LLAMA)
    full = Transformer(dataclasses.replace(LLAMA, num_kv_heads=4))
    repeated = jax.tree.map(lambda x: x, params)
    for layer in ("layer_0", "layer_1"):
        for name in ("key", "value"):
            kernel = params[layer]["attention"][name]["kernel"]
            repeated[layer]["attention"][name] = {"kernel": jnp.repeat(kernel, 2, axis=1)}
    np.testing.assert_allclose(
        apply(grouped, params, INPUTS),
        apply(full, repeated, INPUTS),
        rtol=1e-4,
        atol=1e-5,
    )


def test_dropout_of_a_row_depends_on_its_number_only():
    x = jnp.ones((4, 1000))

    def drop(rows, x):
        return Dropout(0.25).apply({}, x, rows, rngs={"dropout": jax.random.key(0)})

    whole = drop(jnp.arange(4), x)
    parts = jnp.concatenate([drop(jnp.arange(2), x[:2]), drop(jnp.arange(2, 4), x[2:])])
    assert (whole == parts).all()
    assert (whole[0] != whole[1]).any()
    # 4,000 draws: 0.25 plus or minus 5 standard deviations of 0.007.
    assert abs((whole == 0).mean() - 0.25) < 0.035
    assert set(np.unique(whole)) == {np.float32(0), np.float32(1 / 0.75)}


def test_dropout_is_off_without_rows():
    config = dataclasses.replace(SMALL, dropout=0.5)
    model, params = initialised(config)
    logits = apply(model, params, INPUTS)
    assert (logits == apply(Transformer(SMALL), params, INPUTS)).all()


def test_attentions_weights_are_dropped_in_training_only():
    config = dataclasses.replace(SMALL, attention_dropout=0.5)
    model, params = initialised(config)
    logits = apply(Transformer(SMALL), params, INPUTS)
    assert (apply(model, params, INPUTS) == logits).all()
    key = jax.random.key(0)
    dropped = [apply(model, params, INPUTS, rows=jnp.arange(2), rngs={"dropout": key})]
    dropped += [apply(model, params, INPUTS[1:], rows=jnp.array([1]), rngs={"dropout": key})]
    assert (dropped[0] != logits).any(-1)[:, 2:].all()
    # The second row alone: only sums may be in another order.
    np.testing.assert_allclose(dropped[0][1:], dropped[1], rtol=1e-5, atol=1e-6)


def test_initial_parameters_are_gpt2s():
    config = dataclasses.replace(SMALL, embed_dim=128, mlp_dim=512, num_layers=2)
    params = jax.jit(Transformer(config).init)(jax.random.key(0), INPUTS)["params"]
    layer = params["layer_1"]
    # At least 16,384 draws estimate the standard deviation to 0.6%; 5% is 8 times that.
    for kernel in (layer["attention"]["query"]["kernel"], layer["mlp"]["up"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.05)
    for kernel in (layer["attention"]["out"]["kernel"], layer["mlp"]["down"]["kernel"]):
        np.testing.assert_allclose(kernel.std(), 0.02 / 2, rtol=0.05)


def test_zero_init_makes_each_block_the_identity():
    model = Transformer(dataclasses.replace(LLAMA, zero_init=True, positions="learned"))
    params = initial_params(model, 0)
    table = params["embed"]["embedding"][INPUTS] + params["position_embed"]["embedding"]
    states = jax.jit(functools.partial(model.apply, method="hidden"))({"params": params}, INPUTS)
    # The last norm alone.
    expected = table / jnp.sqrt((table**2).mean(-1, keepdims=True) + LLAMA.norm_epsilon)
    np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-6)


def test_options_start_from_nothing():
    """Shares of 1 and 0, tables and factors of zeros: the same logits as without them."""
    options = {"embed_residual": True, "value_embeddings": True, "mlp_lookback": 2}
    model = Transformer(dataclasses.replace(LLAMA, **options))
    params = initial_params(model, 0)
    plain = traverse_util.flatten_dict(params)
    plain = {path: x for path, x in plain.items() if path[-1] not in ("residual_shares", "factors")}
    plain = {path: x for path, x in plain.items() if path[-2] != "value_embed"}
    expected = apply(Transformer(LLAMA), traverse_util.unflatten_dict(plain), INPUTS)
    np.testing.assert_allclose(apply(model, params, INPUTS), expected, rtol=1e-6)


def test_a_lookback_adds_the_tokens_before_channel_by_channel():
    x, factors = np.random.default_rng(0).normal(size=(2, 1, 5, 3)).astype(np.float32)
    factors = factors[0, :2]
    expected = x.copy()
    expected[:, 1:] += factors[0] * x[:, :-1]
    expected[:, 2:] += factors[1] * x[:, :-2]
    tokens = Tokens(ids=None, embedded=None, positions=None, rows=None, segments=None)
    found = Lookback(2, 5).apply({"params": {"factors": factors}}, x, tokens, decode=False)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_flops_of_windows():
    windows = dataclasses.replace(LLAMA, window=3, window_skip=2)
    saved = flops_per_token(LLAMA, 1000) - flops_per_token(windows, 1000)
    assert saved == 12 * 16 * (8 - 3)  # In the first of two layers.


def test_flops_count_no_lookups():
    one, other = (
        flops_per_token(c, num_parameters(parameter_shapes(Transformer(c))))
        for c in (LLAMA, dataclasses.replace(LLAMA, value_embeddings=True))
    )
    assert one == other


def test_a_cap_bounds_the_logits():
    model, params = initialised(dataclasses.replace(SMALL, logit_cap=0.5))
    _, same = initialised(SMALL)
    uncapped = apply(Transformer(SMALL), same, INPUTS)
    np.testing.assert_allclose(
        apply(model, params, INPUTS), 0.5 * np.tanh(uncapped / 0.5), rtol=1e-5
    )


def test_gpt2_has_124_million_parameters():
    """The published size, which includes biases and position embeddings."""
    config = dataclasses.replace(
        SMALL,
        vocab_size=50257,
        seq_len=1024,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        embed_dim=768,
        mlp_dim=3072,
        bias=True,
    )
    inputs = jax.ShapeDtypeStruct((1, 1024), jnp.int32)
    shapes = jax.eval_shape(Transformer(config).init, jax.random.key(0), inputs)["params"]
    assert num_parameters(shapes) == 124_439_808
    # 6 N + 12 L D S, N without the position table.
    expected = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert flops_per_token(config, 124_439_808) == expected


def test_bfloat16_computes_in_bfloat16_on_float32_parameters():
    model, params = initialised(dataclasses.replace(LLAMA, dtype=jnp.dtype("bfloat16")))
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))
    assert apply(model, params, INPUTS).dtype == jnp.bfloat16


def test_vocabulary_is_padded_to_a_multiple(config):
    config.model.vocab_multiple = 128
    assert ModelConfig.from_config(config, 65).vocab_size == 128
    assert ModelConfig.from_config(config, 128).vocab_size == 128


def test_the_tuned_recipe_has_nanogpts_number_of_parameters():
    plain, tuned = (
        num_parameters(parameter_shapes(Transformer(ModelConfig.from_config(c, 65))))
        for c in (shakespeare_char_cpu.get_config(), shakespeare_char_tuned.get_config())
    )
    assert abs(tuned / plain - 1) < 0.01
