"""Trains as `python -m jaxdp.train` does, but on windows at random places, as nanoGPT draws them.

Some tokens come several times before others come once. `parity.py` compares this with the order of
jaxdp, where an epoch has each window once. It is for new runs on one source.
"""

import sys

import numpy as np

from jaxdp import train
from jaxdp.common import cli
from jaxdp.data import pipeline

STREAM = 77  # Tells these draws from others with the same seed.


def start_positions(numbers, sequences, seed: int, origin: pipeline.Position):
    """Replaces `pipeline.start_positions`: a place for each number, whatever the others are."""
    from jaxdp.data.tensorflow import tf

    assert len(sequences.parts) == 1 and origin == pipeline.Position()
    last = len(sequences.tokens) - sequences.seq_len - 1

    def draw(numbers):
        seeds = (np.random.SeedSequence([seed, n, STREAM]) for n in numbers)
        return np.array([x.generate_state(1, "u8")[0] % last for x in seeds], np.int64)

    return tf.ensure_shape(tf.numpy_function(draw, [numbers], tf.int64), [None])


if __name__ == "__main__":
    pipeline.start_positions = start_positions
    sys.exit(cli.run(train.main))
