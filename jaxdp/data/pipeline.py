"""Makes batches of tokens, with `tf.data`.

The sequences of a run are numbered, and number n is looked up in the shuffled order of its epoch: a
pure function of (seed, n). Row i of the global batch of step s is number s * G + i while the batch
size stays what it is; where it changes, or the mixture's weights do, numbers go on from there. So a
run resumes at any step at no cost, no sequence comes twice or is left out, and the global batch is
the same for any number of processes and devices.

Shapes: G global batch, P rows of this process, L sequence length.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np

from jaxdp.data import mixture
from jaxdp.data.batch import Batch
from jaxdp.data.sequences import Sequences

TOKENS_PER_CALL = 2**16  # Tokens to make in one call of `sequences.take`.
SHUFFLE = 2  # The way sequences are shuffled; a run that an older version began goes on with 1.


@dataclasses.dataclass(frozen=True)
class Position:
    """How far a run has come in its data.

    Attributes:
      step: optimizer steps done.
      taken: the training sequences taken from each source; () where none was taken.
      shuffle: how the run's sequences are shuffled; see `start_positions`.
    """

    step: int = 0
    taken: tuple[int, ...] = ()
    shuffle: int = SHUFFLE

    @property
    def total(self) -> int:
        """The training sequences taken from all sources."""
        return sum(self.taken)

    def ahead(self, turns: mixture.Cycle) -> np.ndarray:
        """Returns by how many sequences each source is ahead of a mixture's turns, [sources].

        All 0, unless the weights have changed.
        """
        expected = turns.taken(self.total)
        return np.asarray(self.taken or 0, np.int64) - expected


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
    origin: Position = Position(),
) -> Iterator[Batch]:
    """Yields this process's part of the training batches, from step start_step on.

    Each epoch of a source is shuffled anew. Windows lie side by side and start at an offset that
    also changes in each epoch: it leaves out less than 2 L tokens at the ends, different ones each
    time.

    Args:
      sequences: the training sequences.
      seed: decides the order.
      start_step: the step of the first batch.
      num_steps: the number of steps in the run; the last batch is that of step num_steps - 1.
      global_batch_size: G, divisible by process_count.
      process_index: which of the equal parts of the global batch to yield.
      process_count: the number of parts.
      num_epochs: rows after this many epochs get weight 0; 0: no limit.
      origin: a position of the run, at or before start_step, since which G is the same.

    Yields:
      The arrays of `sequences.take`, [P, L] each.
    """
    from jaxdp.data.tensorflow import tf

    per_host = global_batch_size // process_count
    first = process_index * per_host
    keys = sequences.keys
    # Small batches are made several at once, because the overhead of a call would dominate.
    together = max(TOKENS_PER_CALL // (per_host * sequences.seq_len), 1)

    def numbers(step, count):
        steps = (step - origin.step + np.arange(count, dtype=np.int64))[:, None]
        rows = first + np.arange(per_host, dtype=np.int64)
        return origin.total + steps * global_batch_size + rows

    def take(starts):
        batch = sequences.take(starts)
        return [batch[key] for key in keys]

    def to_batches(step):
        rows = tf.reshape(numbers(step, together), [-1])
        starts = start_positions(rows, sequences, seed, origin)
        return tuple(tf.numpy_function(take, [starts], list(keys.values()), stateful=False))

    dataset = tf.data.Dataset.range(start_step, num_steps, together)
    dataset = dataset.map(to_batches, num_parallel_calls=2, deterministic=True).prefetch(4)
    # There is nothing to tune, and the tuner's sleeping thread can delay the end of the iterator
    # by up to a minute.
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


def start_positions(numbers, sequences: Sequences, seed: int, origin: Position = Position()):
    """Returns where training sequences begin, from their numbers in the run.

    Args:
      numbers: [P] int64, the number of each sequence.
      sequences: the training sequences.
      seed: decides the order.
      origin: a position of the run since which the mixture's weights are the same. Its `shuffle`
        is 2, or 1 in a run that an older version began; its orders are less independent.

    Returns:
      [P] int64, a TensorFlow tensor to pass to `sequences.take`.
    """
    from jaxdp.data.tensorflow import tf

    def of(values):  # Looks up the value of each sequence's source, [P].
        return tf.gather(tf.constant(values, tf.int64), source)

    parts, turns = sequences.parts, mixture.cycle(sequences.shares)
    turn, round_ = numbers % len(turns.turns), numbers // len(turns.turns)
    source = tf.gather(turns.turns, turn)
    numbers = round_ * of(sequences.shares) + tf.gather(turns.earlier_turns, turn)
    numbers += of(origin.ahead(turns))

    count, slack = of([part.count for part in parts]), of([part.max_offset for part in parts])
    epoch = numbers // count
    if origin.shuffle == 1:
        seeds = tf.fill(tf.shape(epoch), tf.constant(seed, tf.int64))
        words = tf.stack([seeds, epoch * len(parts) + source, (count - 1) % 2**31], axis=1)
        cycle = epoch // (slack + 1) * len(parts) + source
        cycles = tf.stack([seeds, cycle, slack], axis=1)
        offset = _shuffle(epoch % (slack + 1), cycles, slack, 4)
        index = _shuffle(numbers % count, words, count - 1, 4)
    else:
        draw = functools.partial(_draw, seed)
        words, offset = tf.numpy_function(draw, [epoch, source, slack], [tf.int64] * 2, False)
        index = _shuffle(numbers % count, words, count - 1, 12)
    return of([part.first for part in parts]) + index * sequences.stride + offset


def _draw(seed: int, epoch, source, slack):
    """Draws what selects the order of each row's epoch, and how far its windows are shifted.

    Args:
      seed: of the run.
      epoch: [P] int64.
      source: [P] int64.
      slack: [P] int64, the largest offset.

    Returns:
      Three words for `_shuffle` [P, 3], and an offset [P], both int64. The offsets of a source take
      turns: 0 .. slack in a random order, then again in another.
    """
    rows, of_row = np.unique(np.stack([epoch, source, slack]), axis=1, return_inverse=True)
    words, offsets = [], []
    for e, s, most in rows.T.tolist():
        words.append(np.random.SeedSequence([seed, s, e, 0]).generate_state(3).view(np.int32))
        keys = np.random.SeedSequence([seed, s, e // (most + 1), 1]).generate_state(most + 1, "u8")
        offsets.append(keys.argsort()[e % (most + 1)])
    of_row = of_row.reshape(-1)
    return np.array(words, np.int64)[of_row], np.array(offsets, np.int64)[of_row]


def epoch_length(sequences: Sequences) -> int:
    """Returns the number of sequences in an epoch, over all sources."""
    return sum(part.count for part in sequences.parts)


def steps_in(
    num_epochs: int, sequences: Sequences, global_batch_size: int, origin: Position = Position()
) -> int:
    """Returns the number of the step with which the epochs end; its batch may be padded.

    Args:
      num_epochs: passes over the sequences.
      sequences: the training sequences.
      global_batch_size: G since the origin.
      origin: a position of the run.
    """
    rest = max(num_epochs * epoch_length(sequences) - origin.total, 0)
    return origin.step + -(-rest // global_batch_size)


def _shuffle(index, words, max_index, rounds):
    """Maps each index to its place in a stateless permutation of 0 .. max_index.

    The cipher takes few bits of each word, 8 for a small permutation, and mixes well in 12 rounds.
    With seed and epoch as words, and TensorFlow's 4 rounds, seeds 0 and 256 have one order, and the
    orders of two epochs correlate: by 0.2 for 16,000 sequences, by 0.5 for a million.

    Args:
      index: [P] int64.
      words: [P, 3] int64; each triple selects a permutation.
      max_index: [P] int64, the highest index.
      rounds: of the cipher.

    Returns:
      [P] int64.
    """
    from jaxdp.data.tensorflow import tf

    # The raw op takes words for each row. Its wrapper, index_shuffle of tf.random.experimental,
    # takes only one seed for all rows.
    return tf.raw_ops.RandomIndexShuffle(
        index=index, seed=tf.cast(words, tf.int32), max_index=max_index, rounds=rounds
    )


def eval_batches(
    sequences: Sequences,
    *,
    max_batches: int,
    global_batch_size: int,
    process_index: int,
    process_count: int,
) -> Iterator[Batch]:
    """Yields one pass over the tokens, in which each token but the first is a target exactly once.

    Where documents are kept apart, the first token of a document is not a target either. The last
    window and the last batch are padded with weight 0, so that every process yields the same
    number of batches of the same shape.

    Args:
      sequences: the sequences to evaluate on.
      max_batches: stop after this many; 0: no limit.
      global_batch_size: G, divisible by process_count.
      process_index: which of the equal parts of each global batch to yield.
      process_count: the number of parts.

    Yields:
      The arrays of `sequences.take`, [P, L] each.
    """
    per_host = global_batch_size // process_count
    batches = -(-sequences.total // global_batch_size)
    for batch in range(min(batches, max_batches or batches)):
        first = batch * global_batch_size + process_index * per_host
        yield sequences.take((first + np.arange(per_host)) * sequences.stride)
