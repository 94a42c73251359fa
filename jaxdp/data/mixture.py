"""Mixes several sources by weight: decides which of them the i-th sequence of a run comes from."""

import dataclasses
import math
import re
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from jaxdp.common.errors import ConfigError, shown

# Only paths with a kind, such as "text:", can have a weight: "2*.txt" is a glob.
WEIGHTED = r"[^*+:/]*\*(?=(?:tfds|hf|text|jsonl|json|csv|parquet):)"
MAX_CYCLE = 100_000  # The most turns in a cycle.


def parse(path: str) -> dict[str, int]:
    """Parses data.path into its sources and their shares.

    Examples:
      >>> parse("0.7*tfds:lm1b+0.3*text:books/*.txt"), parse("books/*.txt")
      ({'tfds:lm1b': 7, 'text:books/*.txt': 3}, {'books/*.txt': 1})

    Returns:
      {path: turns in a cycle}; {path: 1} where there are no weights.

    Raises:
      ConfigError: a weight is not a number above 0 or has too many digits, or a source comes twice.
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
    if sum(shares.values()) > MAX_CYCLE:
        raise ConfigError(
            f"data.path={shown(path)} has weights that take more than {MAX_CYCLE:,} sequences to "
            "be exact: give them with fewer digits"
        )
    return shares


@dataclasses.dataclass(frozen=True)
class Cycle:
    """The order in which sources take turns, repeated for ever.

    Attributes:
      turns: [cycle] int64, the source of each turn.
      earlier_turns: [cycle] int64, how many turns that source has had before in the cycle.
    """

    turns: np.ndarray
    earlier_turns: np.ndarray

    def taken(self, count: int) -> np.ndarray:
        """Returns how many of the first `count` turns each source has, [sources] int64.

        Examples:
          >>> cycle([3, 2]).taken(7)
          array([4, 3])
        """
        shares = np.bincount(self.turns)
        rounds, rest = divmod(count, len(self.turns))
        return rounds * shares + np.bincount(self.turns[:rest], minlength=len(shares))


def cycle(shares: Sequence[int]) -> Cycle:
    """Returns a cycle in which each source is always less than one turn away from its exact share.

    Examples:
      >>> cycle([3, 2]).turns.tolist()
      [0, 1, 0, 1, 0]

    Of the sources that are owed a turn, the one with the earliest deadline gets it: the m-th turn
    of a source of weight w lies between floor((m - 1) / w) and ceil(m / w) (Baruah et al. 1996,
    Proportionate progress). With random draws a batch of 16 would often lack a source altogether.
    """
    total, given = sum(shares), [0] * len(shares)
    turns, earlier_turns = np.zeros((2, total), np.int64)
    for now in range(total):
        owed = [i for i, share in enumerate(shares) if given[i] * total <= share * now]
        turn = min(owed, key=lambda i: -(-(given[i] + 1) * total // shares[i]))
        turns[now], earlier_turns[now] = turn, given[turn]
        given[turn] += 1
    return Cycle(turns, earlier_turns)
