"""Finds validation text that is trained on, as far as the names of files and of splits tell.

A split is a part of a dataset of TFDS or of the Hugging Face hub, such as "train[:99%]".
"""

import math
import re
from typing import Any

from ml_collections import ConfigDict

from jaxdp.data import sources

SPLIT = re.compile(r"([\w.-]+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def trained_on(config: ConfigDict, run: ConfigDict) -> list[str]:
    """Returns the sources of a config whose validation text has text that a run trains on.

    Args:
      config: names the validation text.
      run: the config of the run, which may be the same.
    """
    c, trained = config.data, sources.contents(run.data.path).values()
    return [
        source
        for source, content in sources.contents(c.path).items()
        if any(_shared(content, other, c, run.data) for other in trained)
    ]


def _shared(one: tuple[str, list[str]], other: tuple[str, list[str]], c: Any, run: Any) -> bool:
    """Returns whether validation text of a source is training text of another, by `contents`."""
    if one != other:
        return not set(one[1]).isdisjoint(other[1])
    if one[0] not in ("tfds", "hf"):
        return c.eval_fraction > run.eval_fraction  # Validation text is the last part.
    if c.eval_split:
        return overlap(c.eval_split, run.train_split)
    if run.eval_split or c.train_split != run.train_split:
        return overlap(c.train_split, run.train_split)
    return c.eval_fraction != run.eval_fraction  # It is taken from all of the split.


def overlap(one: str, other: str) -> bool:
    """Returns whether two splits have examples in common, as far as their names tell.

    Examples:
      >>> overlap("train", "train[99%:]"), overlap("train[:99%]", "train[90%:]")
      (True, True)
      >>> overlap("train[:99%]", "train[-1%:]"), overlap("train", "test")
      (False, False)
      >>> overlap("train[:500]", "train[1%:]")  # Nobody knows without the number of examples.
      False
    """
    pairs = [(a.strip(), b.strip()) for a in one.split("+") for b in other.split("+")]
    return any(a == b != "" or _cross(a, b) for a, b in pairs)


def _cross(one: str, other: str) -> bool:
    found = [match.groups() for x in (one, other) if (match := SPLIT.fullmatch(x))]
    if len(found) < 2 or found[0][0] != found[1][0]:
        return False
    (a, b), (c, d) = (_range(*groups[1:]) for groups in found)
    open_at_one_end = a == c == (0, "") or b == d == (math.inf, "")
    return open_at_one_end or (_before(a, d) and _before(c, b))


def _range(
    begin: str | None, percent: str | None, end: str | None, percent_of_end: str | None
) -> tuple[tuple[float, str], tuple[float, str]]:
    """Returns both ends as (number, unit), with the unit "" at the split's own ends."""

    def place(number, unit):
        return (number + 100 if unit and number < 0 else number), unit or "examples"

    first = place(int(begin), percent) if begin and int(begin) else (0, "")
    return first, place(int(end), percent_of_end) if end else (math.inf, "")


def _before(one: tuple[float, str], other: tuple[float, str]) -> bool:
    """Returns whether a place in a split is surely before another."""
    (a, unit), (b, unit_of_other) = one, other
    if not unit or not unit_of_other:
        return True  # One is the split's own beginning or end.
    return unit == unit_of_other and a < b and (a < 0) == (b < 0)
