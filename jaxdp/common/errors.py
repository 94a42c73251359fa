"""Errors that end a command with a one-line message, and helpers to write such messages."""

import re
from collections.abc import Callable
from typing import Any

WRONG_INPUT = 2  # The exit status of every command after a ConfigError.
STOPPED = 75  # A run has stopped on request; EX_TEMPFAIL of sysexits.h, try again.


class ConfigError(ValueError):
    """A mistake of the user's; the message is one line that says what to do."""


class RunError(RuntimeError):
    """A run can't go on, through no mistake of the user's; the message says why in one line."""


class Stopped(KeyboardInterrupt):
    """A run was asked to stop before it trained; libraries let it pass, as they do with Ctrl-C."""


def check_text(key: str, text: str) -> None:
    """Raises ConfigError for a text that is not valid Unicode, or contains a NUL character."""
    if not text.isascii() and text != text.encode(errors="ignore").decode():
        raise ConfigError(f"{key}={shown(text)} is not UTF-8: write it in UTF-8")
    if "\0" in text and "prompt" not in key:
        raise ConfigError(f"{key}={shown(text)} holds a NUL character: leave it out")


def check_step(which: str | int) -> None:
    """Raises ConfigError for a value of --step that can't name a checkpoint."""
    if not re.fullmatch("newest|best|[0-9]{1,10}", str(which)):
        raise ConfigError(
            f"--step={shown(which)} names no checkpoint: give newest, best, or a number"
        )


def shown(value: Any, length: int = 200, as_text: Callable[[Any], str] = repr) -> str:
    r"""Formats any value for an error message, cut to `length` characters.

    Examples:
      >>> shown(0.5), shown("a\n"), shown(10**5000)
      ('0.5', "'a\\n'", 'an int')
    """
    try:
        text = as_text(value).strip().replace("\n", " ")
    except Exception:  # Python refuses to print an int of more than 4300 digits, for example.
        return f"an {type(value).__name__}"
    return text if len(text) <= length else f"{text[:length]}..."
