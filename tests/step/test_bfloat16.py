"""Gradients computed in bfloat16 are those of float32 but for rounding, on real text."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxdp.model.transformer import Transformer, initial_params
from jaxdp.step.losses import chunked_cross_entropy
from support.models import SMALL

ROWS, LENGTH, VOCAB = 48, 128, 128


def text():
    """Returns inputs and targets: bytes of the README."""
    read = (Path(__file__).parents[2] / "README.md").read_bytes()
    tokens = np.frombuffer(read, np.uint8)
    tokens = tokens[tokens < VOCAB][: ROWS * LENGTH + 1].astype(np.int32)
    return tokens[:-1].reshape(ROWS, LENGTH), tokens[1:].reshape(ROWS, LENGTH)


def gradients(dtype, tied, parts=1, chunks=1):
    """Returns the gradient by the parameters' names, summed over parts of the batch.

    In each part, the logits of a chunk of every sequence are computed at a time.
    """
    config = dataclasses.replace(
        SMALL,
        vocab_size=VOCAB,
        seq_len=LENGTH,
        embed_dim=64,
        mlp_dim=128,
        num_layers=1,
        tied_head=tied,
        bias=True,
        mlp_lookback=2,
        embed_residual=True,
    )
    params = initial_params(Transformer(config), 0)
    model = Transformer(dataclasses.replace(config, dtype=np.dtype(dtype)))

    @jax.jit
    @jax.grad
    def gradient(params, inputs, targets):
        apply = functools.partial(model.apply, {"params": params})
        to_logits = functools.partial(apply, method="logits")
        weights = np.ones(targets.shape, np.float32)
        hidden = apply(inputs, method="hidden")
        return chunked_cross_entropy(to_logits, hidden, targets, weights, chunks)[0]

    cut = (np.split(x, parts) for x in text())
    found = [gradient(params, *part) for part in zip(*cut, strict=True)]
    total = functools.reduce(functools.partial(jax.tree.map, np.add), found)
    paths = jax.tree_util.tree_leaves_with_path(total)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in paths}


def error(one, other):
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return np.linalg.norm(one - other) / np.linalg.norm(other)


@pytest.mark.parametrize("tied", [False, True])
def test_rounding_is_all_that_differs(tied):
    exact, whole = gradients("float32", tied), gradients("bfloat16", tied)
    parts = gradients("bfloat16", tied, parts=ROWS)
    chunks = gradients("bfloat16", tied, chunks=LENGTH // 2)
    for name in exact:
        if name == "layer_0/attention/key/bias":
            continue  # Its gradient is 0: it adds the same to all scores of a query.
        # Each value on the way is rounded to 2^-9 = 0.002, independently; a table's row summed in
        # bfloat16 would be off by 0.1.
        assert error(whole[name], exact[name]) < 0.01, name
        assert error(parts[name], whole[name]) < 0.005, name
        assert error(chunks[name], whole[name]) < 0.005, name
