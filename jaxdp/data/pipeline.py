"""From tokens to batches, with `tf.data`.

The sequences of optimizer step s are a pure function of (seed, s): number s * G + i, for row i of
a global batch of G, is looked up in a shuffled order of the epoch that it falls in. So a resumed
run starts anywhere at no cost, and the global batch does not depend on how many processes and
devices share it.

Shapes: G global batch, P rows of this process, L sequence length.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from jaxdp.data import mixture
from jaxdp.data.batch import Batch
from jaxdp.data.sequences import Sequences

TOGETHER = 2**16  # Tokens.


def train_batches(
    sequences: Sequences,
    *,
    seed: int,
    start_step: int,
    num_steps: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
    num_epochs: int = 0,
) -> Iterator[Batch]:
    """Yields this process's rows of the batches of steps start_step .. num_steps - 1.

    Each epoch of a source has a shuffled order of its own. Windows lie side by side from an offset
    that is new in each epoch, too: less than 2 L tokens at the ends are left out, others each time.

    Args:
      sequences: what to train on.
      seed: decides the order.
      start_step: the first step to give a batch for.
      num_steps: the step to end before.
      global_batch_size: G, divisible by process_count.
      process_index: which of the equal parts of the global batch to give.
      process_count: how many there are.
      num_epochs: rows beyond so many epochs get weight 0; 0: there are none.

    Yields:
      What `sequences.take` gives, [P, L] each.
    """
    from jaxdp.data.tensorflow import tf

    per_host = global_batch_size // process_count
    first = process_index * per_host
    keys = sequences.keys
    # Small batches are made several at once: what a call costs is more than what it does.
    together = max(TOGETHER // (per_host * sequences.seq_len), 1)

    def numbers(step, count):
        steps = (step + np.arange(count, dtype=np.int64))[:, None]
        return steps * global_batch_size + first + np.arange(per_host, dtype=np.int64)

    def take(starts):
        batch = sequences.take(starts)
        return [batch[key] for key in keys]

    def to_batches(step):
        rows = tf.reshape(numbers(step, together), [-1])
        starts = start_positions(rows, sequences, seed)
        return tuple(tf.numpy_function(take, [starts], list(keys.values()), stateful=False))

    dataset = tf.data.Dataset.range(start_step, num_steps, together)
    dataset = dataset.map(to_batches, num_parallel_calls=2, deterministic=True).prefetch(4)
    # There is nothing to tune, and the tuner's thread, asleep, can hold up the end of the iterator
    # for as long as a minute.
    options = tf.data.Options()
    options.autotune.enabled = False
    dataset = dataset.with_options(options)
    end = num_epochs * epoch_length(sequences) or np.inf
    batches = itertools.chain.from_iterable(
        zip(*(np.split(array, together) for array in arrays), strict=True)
        for arrays in dataset.as_numpy_iterator()
    )
    for step, arrays in zip(range(start_step, num_steps), batches, strict=False):
        batch = dict(zip(keys, arrays, strict=True))
        if not (real := numbers(step, 1)[0] < end).all():
            batch["weights"] = batch["weights"] * real[:, None].astype(np.float32)
        yield batch


def start_positions(numbers, sequences: Sequences, seed: int):
    """Where training sequences begin.

    Args:
      numbers: [P] int64; a run's sequences are numbered through: step * G + row of the batch.
      sequences: all there are.
      seed: decides the order.

    Returns:
      [P] int64, a tensor of TensorFlow, for `sequences.take`.
    """
    from jaxdp.data.tensorflow import tf

    def of(values):  # [P] of the source of each.
        return tf.gather(tf.constant(values, tf.int64), source)

    parts, turns = sequences.parts, mixture.cycle(sequences.shares)
    turn, round_ = numbers % len(turns.turns), numbers // len(turns.turns)
    source = tf.gather(turns.turns, turn)
    numbers = round_ * of(sequences.shares) + tf.gather(turns.ranks, turn)

    count, slack = of([part.count for part in parts]), of([part.slack for part in parts])
    epoch = numbers // count
    seeds = tf.fill(tf.shape(epoch), tf.constant(seed, tf.int64))
    index = _shuffle(numbers % count, [seeds, epoch * len(parts) + source], count - 1)
    # A long cycle of its own, so that the offset is as good as drawn anew in each epoch.
    cycle = epoch // (slack + 1) * len(parts) + source
    offset = _shuffle(epoch % (slack + 1), [seeds, cycle], slack)
    return of([part.first for part in parts]) + index * sequences.stride + offset


def epoch_length(sequences: Sequences) -> int:
    """Sequences in an epoch, of all sources together."""
    return sum(part.count for part in sequences.parts)


def steps_in(num_epochs: int, sequences: Sequences, global_batch_size: int) -> int:
    """Optimizer steps that so many epochs take, the last batch filled up where it isn't full."""
    return -(-num_epochs * epoch_length(sequences) // global_batch_size)


def _shuffle(index, seeds, max_index):
    """Stateless permutations of 0 .. max_index, a different one for each pair of seeds.

    Args:
      index: [P] int64.
      seeds: a pair of [P] int64.
      max_index: [P] int64, the highest index.

    Returns:
      [P] int64.
    """
    from jaxdp.data.tensorflow import tf

    # The op takes three 32-bit seeds per row; tf.random.experimental.index_shuffle, which wraps
    # it, takes one seed for all rows only.
    seeds = tf.cast(tf.stack([*seeds, max_index % 2**31], axis=1), tf.int32)
    return tf.raw_ops.RandomIndexShuffle(index=index, seed=seeds, max_index=max_index, rounds=4)


def eval_batches(
    sequences: Sequences,
    *,
    max_batches: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """Yields one pass over the tokens, each a target exactly once (but the very first).

    Where documents are kept apart, the first of each is no target either. What the last window and
    the last batch lack is filled with weight 0, so that every process yields equally many batches
    of equal shape.

    Args:
      sequences: what to evaluate on.
      max_batches: stop after so many; 0: never.
      global_batch_size: G, divisible by process_count.
      process_index: which of the equal parts of each global batch to give.
      process_count: how many there are.

    Yields:
      As `train_batches` does.
    """
    per_host = global_batch_size // process_count
    batches = -(-sequences.total // global_batch_size)
    for batch in range(min(batches, max_batches or batches)):
        first = batch * global_batch_size + process_index * per_host
        yield sequences.take((first + np.arange(per_host)) * sequences.stride)
