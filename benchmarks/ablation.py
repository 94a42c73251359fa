"""Trains a variant of a config, and prints its loss on the end of the training text.

    python benchmarks/ablation.py --config=configs/shakespeare_char_tuned.py \
        --config.data.path=tinyshakespeare.txt --config.model.qk_norm=False

To choose between variants without a look at the validation split: a model trains on the first 90%
of the training split, and its loss is the mean over the next --eval_sequences sequences, rounded
down to a multiple of 100. There are no checkpoints, and the seed decides the order of each epoch.
"""

import itertools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from jaxdp.common import cli
from jaxdp.data.cache import open_cache
from jaxdp.model.transformer import initial_params, num_parameters
from jaxdp.step import setup
from jaxdp.step.losses import cross_entropy

CONFIG = config_flags.DEFINE_config_file("config", None, "Python file with get_config().")
SEQUENCES = flags.DEFINE_integer("eval_sequences", 800, "Sequences to evaluate on.")
EVAL_BATCH, STEPS_PER_CALL = 100, 50


def main() -> int:
    """Trains, and prints a line."""
    cli.prepare_jax()
    config = CONFIG.value
    setup.validate(config)
    cache = open_cache(config)
    made = setup.make_setup(config, cache.vocab_size, 1)
    cut = int(0.9 * len(cache.train))
    training = sequences(cache.train[:cut], config.seq_len)
    held_out = sequences(cache.train[cut:], config.seq_len)[: SEQUENCES.value]
    held_out = held_out[: len(held_out) // EVAL_BATCH * EVAL_BATCH]
    params, ms = trained(made, training)
    loss = jax.jit(lambda params, tokens: mean_loss(made.model, params, tokens))
    parts = [loss(params, part) for part in np.split(held_out, len(held_out) // EVAL_BATCH)]
    print(f"loss {np.mean(parts):.4f}  {num_parameters(params):,} parameters  {ms:.0f} ms a step")
    return 0


def sequences(tokens: np.ndarray, length: int) -> np.ndarray:
    """Returns [n, length + 1] int32: inputs and targets, which overlap by a token."""
    count = (len(tokens) - 1) // length
    starts = length * np.arange(count)[:, None]
    return np.asarray(tokens[starts + np.arange(length + 1)], np.int32)


def mean_loss(model, params, tokens: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Returns the mean loss of [n, L + 1] tokens, in nats; with a key, dropout is on."""
    dropout = {} if key is None else {"rows": jnp.arange(len(tokens)), "rngs": {"dropout": key}}
    logits = model.apply({"params": params}, tokens[:, :-1], **dropout)
    total, weight = cross_entropy(logits, tokens[:, 1:], jnp.ones(logits.shape[:2]))
    return total / weight


def trained(made: setup.Setup, data: np.ndarray):
    """Returns the parameters after training, and a step's time in ms."""
    config, rng = made.config, np.random.default_rng(made.config.seed)
    clip = optax.clip_by_global_norm(config.optimizer.clip_norm or np.inf)
    optimizer = optax.chain(clip, made.optimizer)

    @jax.jit
    def train(carry, numbers, batches):
        def step(carry, numbered):
            (params, state), (number, batch) = carry, numbered
            key = jax.random.fold_in(jax.random.key(config.seed), number)
            gradient = jax.grad(lambda params: mean_loss(made.model, params, batch, key))(params)
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, carry, (numbers, batches))[0]

    steps, size = config.num_train_steps, config.global_batch_size
    epochs = itertools.chain.from_iterable(rng.permutation(len(data)) for _ in itertools.count())
    rows = np.fromiter(itertools.islice(epochs, steps * size), int).reshape(steps, size)
    params = initial_params(made.model, config.seed)
    carry, times = (params, optimizer.init(params)), []
    for first in range(0, steps, STEPS_PER_CALL):
        began, part = time.perf_counter(), rows[first : first + STEPS_PER_CALL]
        numbers = first + np.arange(len(part))
        carry = jax.block_until_ready(train(carry, numbers, data[part]))
        times.append((time.perf_counter() - began) / len(part))
    return carry[0], 1e3 * np.median(times)


if __name__ == "__main__":
    sys.exit(cli.run(main))
