"""Names of splits, such as "train[:99%]", as TFDS and the Hugging Face hub have them."""

import re

SPLIT = re.compile(r"(\w+)(?:\[(?:(-?\d+)(%?))?:(?:(-?\d+)(%?))?\])?")


def overlap(one: str, other: str) -> bool:
    """Returns whether two splits have examples in common, as far as their names tell.

    Examples:
      >>> overlap("train", "train[99%:]"), overlap("train[:99%]", "train[90%:]")
      (True, True)
      >>> overlap("train[:99%]", "train[99%:]"), overlap("train", "test")
      (False, False)
      >>> overlap("train[:99%]", "train[500:]")  # Nobody knows without the number of examples.
      False
    """
    return any(_overlap(a, b) for a in one.split("+") for b in other.split("+"))


def _overlap(one: str, other: str) -> bool:
    found = [SPLIT.fullmatch(name.strip()) for name in (one, other)]
    groups = [match.groups() for match in found if match]
    if len(groups) < 2:
        return one == other != ""
    (name, *first), (name_of_other, *second) = groups
    return bool(name == name_of_other and _cross(first, second))


def _cross(first: list[str | None], second: list[str | None]) -> bool:
    """Returns whether two ranges of a split cross, [begin, "%", end, "%"]; None: not given."""
    if not any(first) or not any(second):
        return True  # One is the whole split.
    comparable = ("%" in first) == ("%" in second)
    counted_from_the_end = any(x.startswith("-") for x in (*first, *second) if x)
    if not comparable or counted_from_the_end:
        return False
    (a, b), (c, d) = ((int(x[0] or 0), float(x[2] or "inf")) for x in (first, second))
    return max(a, c) < min(b, d)
