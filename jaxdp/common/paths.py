"""Paths that a user gives, and the folder for caches; nothing is ever made in a folder called ~."""

import os
import re
from pathlib import Path

from jaxdp.common.errors import ConfigError, check_text, shown

# Path("gs://bucket") has lost a slash.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def local(key: str, path: str | Path) -> Path:
    """Returns a path of this machine's file systems, with ~ replaced by the home folder.

    Args:
      key: the flag or key that the path was given by.
      path: as it was given.

    Raises:
      ConfigError: the path is an address such as gs://BUCKET/NAME, or there is no such home folder.
    """
    text = str(path)
    check_text(key, text)
    if _SCHEME.match(text):
        raise ConfigError(
            f"{key}={shown(text)} is no path of this machine: give a folder here, on a disk or "
            "where the storage is mounted"
        )
    return Path(_expanded(key, text))


def cache_folder() -> Path:
    """Returns the user's folder for jaxdp's caches: $XDG_CACHE_HOME/jaxdp or ~/.cache/jaxdp.

    Raises:
      ConfigError: neither is set.
    """
    # By the XDG Base Directory Specification a relative path is ignored.
    given = os.environ.get("XDG_CACHE_HOME", "")
    base = given if os.path.isabs(given) else _expanded("XDG_CACHE_HOME", "~/.cache")
    return Path(base) / "jaxdp"


def check_home(key: str, *variables: str) -> None:
    """Refuses what a library would put into the home folder, if there is none.

    Args:
      key: what the library is used for.
      *variables: if one of these is set, the library uses another folder.
    """
    if not any(os.environ.get(name) for name in variables):
        _expanded(key, "~")


def check_hub(key: str) -> None:
    """Refuses a download from the Hugging Face hub if there is no folder to keep it in."""
    check_home(key, "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")


def _expanded(key: str, text: str) -> str:
    found = os.path.expanduser(text)
    if not found.startswith("~"):
        return found
    name = text.split("/")[0]
    if name != "~":
        raise ConfigError(f"{key}={shown(text)}: there is no user {name[1:]!r}: write the path out")
    raise ConfigError(
        f"{key}: user {os.getuid()} has no home folder, where {text!r} would be: set HOME to a "
        "folder that can be written"
    )
