"""Names of splits, such as "train[:99%]", as TFDS and the Hugging Face hub have them."""

import math
import re

SPLIT = re.compile(r"([\w.-]+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


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
