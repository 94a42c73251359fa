"""Several sources mixed by weight: which of them the i-th sequence of a run comes from."""

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxdp.common.errors import ConfigError, shown

# Only what has a kind can have a weight: "2*.txt" is a glob.
WEIGHTED = r"[^*+:/]*\*(?=(?:tfds|text|jsonl):)"
LONGEST = 100_000  # Turns of a cycle.


def parse(path: str) -> dict[str, int]:
    """What a data.path names, each with its share.

    Examples:
      >>> parse("0.7*tfds:lm1b+0.3*text:books/*.txt"), parse("books/*.txt")
      ({'tfds:lm1b': 7, 'text:books/*.txt': 3}, {'books/*.txt': 1})

    Returns:
      {path: turns in a cycle}; one path with 1 where there are no weights.

    Raises:
      ConfigError: a weight isn't a number above 0, or a source comes twice.
    """
    if not re.match(WEIGHTED, path):
        return {path: 1}
    weights: dict[str, Fraction] = {}
    for part in re.split(rf"\+(?={WEIGHTED})", path):
        weight, _, name = part.partition("*")
        if not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", weight) or not Fraction(weight):
            raise ConfigError(
                f"data.path={shown(path)} gives {shown(name)} the weight {shown(weight)}: write "
                "sources as 0.7*KIND:NAME+0.3*KIND:NAME, with numbers above 0"
            )
        if name in weights:
            raise ConfigError(
                f"data.path={shown(path)} names {shown(name)} twice: add up its weights"
            )
        weights[name] = Fraction(weight)
    scale = math.lcm(*(weight.denominator for weight in weights.values()))
    shares = {name: int(weight * scale) for name, weight in weights.items()}
    divisor = math.gcd(*shares.values())
    shares = {name: share // divisor for name, share in shares.items()}
    if sum(shares.values()) > LONGEST:
        raise ConfigError(
            f"data.path={shown(path)} has weights that take more than {LONGEST:,} sequences to be "
            "exact: give them with fewer digits"
        )
    return shares


@dataclasses.dataclass(frozen=True)
class Cycle:
    """Whose turn it is, over and over.

    Attributes:
      turns: [cycle] int64, the source of each.
      ranks: [cycle] int64, how many turns it had before in the cycle.
    """

    turns: np.ndarray
    ranks: np.ndarray


def cycle(shares: Sequence[int]) -> Cycle:
    """A cycle in which, after any number of turns, each source is within one of its share.

    Examples:
      >>> cycle([3, 2]).turns.tolist()
      [0, 1, 0, 1, 0]

    Each turn goes to whom is owed one, and of these to whose is due first: so a source's m-th turn
    is in the window from floor((m - 1) / w) to ceil(m / w) of its weight w (Baruah et al. 1996,
    Proportionate progress). Drawn instead, a batch of 16 would often lack a source altogether.
    """
    total, given = sum(shares), [0] * len(shares)
    turns, ranks = np.zeros((2, total), np.int64)
    for now in range(total):
        owed = [i for i, share in enumerate(shares) if given[i] * total <= share * now]
        turn = min(owed, key=lambda i: -(-(given[i] + 1) * total // shares[i]))
        turns[now], ranks[now] = turn, given[turn]
        given[turn] += 1
    return Cycle(turns, ranks)
