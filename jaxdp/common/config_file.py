"""Checks that --config names a file, and suggests the nearest name where it doesn't."""

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from jaxdp.common.errors import ConfigError, shown

SHIPPED = Path(__file__).parent.parent / "configs"
MISSING = "--config is missing: give a config file, such as configs/quickstart.py"


def given(argv: list[str]) -> Iterator[str]:
    """Yields the values of --config among a command's arguments."""
    for i, argument in enumerate(argv):
        if match := re.fullmatch("--?config(?:=(.*))?", argument, re.DOTALL):
            value = match[1] if match[1] is not None else "".join(argv[i + 1 : i + 2])
            yield value


def expanded(argv: list[str]) -> list[str]:
    """Returns a command's arguments with ~ in --config=~/FILE replaced, which no shell does."""

    def home(found: re.Match) -> str:
        return found[1] + os.path.expanduser(found[2])

    return [re.sub("^(--?config=)(~[^:]*)", home, argument) for argument in argv]


def check(value: str) -> None:
    """Checks that the file of a --config exists.

    ml_collections reports a missing file only when the config is used, in several lines.

    Args:
      value: the value of --config: a path, perhaps with a colon and an argument of get_config().

    Raises:
      ConfigError: there is no such file; the message suggests the nearest name.
    """
    path, colon, argument = value.partition(":")
    if os.path.exists(path) and not os.path.isdir(path):
        return
    found = "no such file, but a folder" if os.path.isdir(path) else "no such file"
    close, near = nearest(path)
    hint = f"did you mean {near}{colon}{argument}?" if close else f"the nearest is {near}"
    raise ConfigError(f"--config={shown(value)}: {found}; {hint}")


def nearest(path: str) -> tuple[bool, str]:
    """Finds the config file with the most similar name.

    It searches the folder of the path, configs/, and the configs that come with jaxdp.

    Returns:
      Whether the name is close enough to be a likely misspelling, and the path found.
    """
    names: dict[str, str] = {}
    for folder in (path, os.path.dirname(path) or ".", "configs", str(SHIPPED)):
        if os.path.isdir(folder):
            for file in filter(_is_config, sorted(Path(folder).glob("*.py"))):
                names.setdefault(file.stem, str(file))
    stem = Path(path).stem
    close = difflib.get_close_matches(stem, names, n=1)
    [near] = close or difflib.get_close_matches(stem, names, n=1, cutoff=0.0)
    return bool(close), names[near]


def _is_config(file: Path) -> bool:
    with contextlib.suppress(OSError):
        return "get_config" in file.read_text(encoding="utf-8", errors="ignore")
    return False
