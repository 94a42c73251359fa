"""Generating text with a KV cache.

Shapes: R prompts, S context, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdp.common.choices import MAX_INT32, TEMPERATURE
from jaxdp.model.transformer import Transformer


def sample(
    model: Transformer, params: Any, prompts: list[np.ndarray], **options: Any
) -> list[np.ndarray]:
    """Continues each prompt: all that `stream`, with the same arguments, yields, joined.

    Returns:
      R arrays of [num_tokens] int32: the new tokens only.
    """
    parts = stream(model, params, prompts, **options)
    nothing = [np.zeros(0, np.int32)] * len(prompts)
    return [np.concatenate(row) for row in zip(nothing, *parts, strict=True)]


def stream(
    model: Transformer,
    params: Any,
    prompts: list[np.ndarray],
    *,
    vocab_size: int,
    num_tokens: int,
    temperature: float = TEMPERATURE,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    at_once: int = MAX_INT32,
) -> Iterator[list[np.ndarray]]:
    """Continues each prompt by `num_tokens` tokens, a few at a time.

    A prompt's continuation doesn't depend on the other prompts. When the context is full, its newer
    half is read again into an empty cache, so a text can be longer than the context.

    Args:
      model: a causal model.
      params: its parameters, on one device or on the host.
      prompts: R arrays of at least one token id each; only the end of a prompt beyond S is used.
      vocab_size: size of the tokenizer's vocabulary; ids beyond it, padding, are never drawn.
      num_tokens: number of tokens to add.
      temperature: divides the logits; 0 always takes the likeliest token.
      top_k: draw from the k likeliest tokens only; 0: from all.
      top_p: draw from the fewest likeliest tokens whose probabilities sum to at least p
        (Holtzman et al. 2020).
      seed: seed of the draws.
      at_once: tokens to draw at a time; before each time the context is read again.

    Yields:
      R arrays of [n] int32: the next tokens; n may differ, and be 0 for a prompt that is done.
    """
    context = model.config.seq_len
    histories = [np.asarray(prompt, np.int32) for prompt in prompts]
    drawn = np.zeros(len(histories), np.int32)  # Each prompt's tokens so far.
    run = functools.partial(fill, model, vocab_size=vocab_size)
    while (drawn < num_tokens).any():
        # Each prompt is cut where it would be alone; one that is done draws 0 tokens.
        windows = [h if len(h) < context else h[-max(context // 2, 1) :] for h in histories]
        starts = np.array([len(window) for window in windows], np.int32)
        counts = np.minimum(np.minimum(num_tokens - drawn, context - starts), at_once)
        tokens = np.zeros((len(windows), context), np.int32)
        for row, window in zip(tokens, windows, strict=True):
            row[: len(window)] = window
        filled = np.asarray(
            run(
                params,
                tokens,
                starts,
                drawn,
                counts.max(),
                temperature,
                min(top_k or vocab_size, vocab_size),
                top_p,
                seed,
            )
        )
        new = [row[a : a + n] for row, a, n in zip(filled, starts, counts, strict=True)]
        histories = [np.concatenate(pair) for pair in zip(histories, new, strict=True)]
        drawn += counts
        yield new


@functools.partial(jax.jit, static_argnums=0, static_argnames="vocab_size")
def fill(
    model, params, tokens, starts, drawn, count, temperature, top_k, top_p, seed, *, vocab_size
):
    """Draws `count` tokens for each row, after its `starts` ones; returns the tokens, [R, S].

    All rows of tokens [R, S], padded on the right, are read in one pass. This leaves cache entries
    of padding after each prompt, but a drawn token overwrites each before it is attended to. What a
    row draws beyond the context is dropped. `drawn` [R] says how many draws each row has had; the
    other arguments are those of `sample`.
    """
    read = functools.partial(model.apply, decode=True, mutable=["cache"], method="hidden")
    head = functools.partial(model.apply, {"params": params}, method="logits")
    row_numbers = jnp.arange(len(tokens))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    states, cache = read({"params": params}, tokens, positions=positions)
    # [R, V]: logits of all positions would be S times as large.
    logits = head(states[row_numbers, starts - 1])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), row_numbers)

    def body(i, carry):
        tokens, logits, cache = carry
        draw_keys = jax.vmap(jax.random.fold_in)(keys, drawn + i)
        likely = filter_logits(
            logits[:, :vocab_size].astype(jnp.float32), top_k, top_p, temperature
        )
        chosen = jax.vmap(jax.random.categorical)(draw_keys, likely).astype(tokens.dtype)
        at = starts + i
        tokens = tokens.at[row_numbers, at].set(chosen)
        states, cache = read({"params": params, **cache}, chosen[:, None], positions=at[:, None])
        return tokens, head(states[:, 0]), cache

    return jax.lax.fori_loop(0, count, body, (tokens, logits, cache))[0]


def filter_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, temperature: jax.Array
) -> jax.Array:
    """Divides logits by the temperature and sets all but the likeliest to minus infinity.

    Of equally likely tokens the first are kept.

    Args:
      logits: [R, V] float32.
      top_k: [] int32, number of tokens to keep, at least 1.
      top_p: [] float32, sum of probabilities to keep, more than 0.
      temperature: [] float32; 0 keeps only the likeliest token.

    Returns:
      [R, V] float32.
    """
    warm = temperature > 1e-6  # Dividing by less would overflow.
    top_k = jnp.where(warm, top_k, 1)
    logits = logits / jnp.where(warm, temperature, 1.0)
    falling = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(falling)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (before < top_p) & (jnp.arange(logits.shape[-1]) < top_k)
    lowest = jnp.min(jnp.where(kept, falling, jnp.inf), axis=-1, keepdims=True)
    above, ties = logits > lowest, logits == lowest
    places = (kept.sum(-1) - above.sum(-1))[..., None]  # For the ties.
    return jnp.where(above | ties & (ties.cumsum(-1) <= places), logits, -jnp.inf)
