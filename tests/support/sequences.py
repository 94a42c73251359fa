"""Sequences whose tokens tell where they come from."""

import numpy as np
from hypothesis import settings

from jaxdp.data.pipeline import eval_batches, train_batches
from jaxdp.data.sequences import Examples, Windows

# The tokens of most tests are 0, 1, 2, ..., so that a token tells its position.
TOKENS = np.arange(203, dtype=np.uint16)
L, G = 8, 4
[PART] = Windows(TOKENS, L, "causal").parts
W, SLACK = PART.count, PART.max_offset


def train(tokens=TOKENS, steps=range(30), objective="causal", end=None, **changes) -> list[dict]:
    options = {
        "seed": 0,
        "start_step": steps.start,
        "num_steps": steps.stop,
        "global_batch_size": G,
        "process_index": 0,
        "process_count": 1,
    }
    return list(train_batches(Windows(tokens, L, objective, end), **options | changes))


def evaluation(tokens, objective="causal", end=None, **changes) -> list[dict]:
    options = {
        "max_batches": 0,
        "global_batch_size": G,
        "process_index": 0,
        "process_count": 1,
    }
    windows = Windows(np.asarray(tokens, np.uint16), L, objective, end)
    return list(eval_batches(windows, **options | changes))


def assert_equal(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


def joined(parts: list[list[dict]]) -> list[dict]:
    """Puts the parts of all processes together to global batches."""
    return [
        {key: np.concatenate([part[key] for part in step]) for key in step[0]}
        for step in zip(*parts, strict=True)
    ]


END = 0
FEW = settings(deadline=None, max_examples=60)


def in_a_row(documents) -> np.ndarray:
    return np.array([token for document in documents for token in [*document, END]])


def examples(pairs, objective="causal", seq_len=L) -> Examples:
    """As a token cache has them, each text with an end."""
    starts = np.cumsum([0, *(len(prompt) + len(text) + 1 for prompt, text in pairs)])[:-1]
    index = np.array([[s, s + len(p)] for s, (p, _) in zip(starts, pairs, strict=True)])
    return Examples(in_a_row([[*p, *t] for p, t in pairs]), index, seq_len, objective)
