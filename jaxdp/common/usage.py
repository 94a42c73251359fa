"""Makes the texts that `jaxdp` and `--help` print, from the commands' docstrings and flags.

A command's docstring has its purpose in the first line, then its usage, indented, then the rest.
It is read from the source, so that the list of commands imports none of them.
"""

import ast
import os
import shutil
import textwrap
from pathlib import Path

from jaxdp import __version__

PACKAGE = Path(__file__).parent.parent
COMMANDS = ("train", "evaluate", "generate", "export", "plan", "plot")
HELP = ("--help", "-h", "--helpfull")
KEY = "--config.KEY=VALUE"
VERSION = f"jaxdp {__version__}"


def described(source: Path) -> tuple[str, str, str]:
    """Splits a command's docstring into its purpose, its usage, and the rest."""
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    purpose, call, *rest = docstring.split("\n\n")
    return purpose, textwrap.dedent(call), "\n\n".join(rest)


def listing() -> str:
    """Returns the list of commands, each with its purpose."""
    rows = [(name, described(PACKAGE / f"{name}.py")[0]) for name in COMMANDS]
    return f"""{VERSION}: data-parallel training of Flax transformer language models

usage: jaxdp COMMAND [--FLAG=VALUE ...]    (or python -m jaxdp.COMMAND ..., the same)

{_table(rows)}

For example, in a folder with jaxdp's configs/:
  jaxdp train --config=configs/quickstart.py --workdir=runs/quickstart

jaxdp COMMAND --help lists the flags of a command.
{_keys()}"""


def help_for(
    source: Path, rows: list[tuple[str, str]], others: list[tuple[str, str]] | None = None
) -> str:
    """Returns the text of a command's --help.

    Args:
      source: the file of the command.
      rows: the command's flags, (as typed, meaning) each.
      others: flags of libraries, for --helpfull, in the same form.
    """
    purpose, call, rest = described(source)
    text = f"usage: {call}\n\n{purpose}\n\n{rest}\n\nflags:\n{_table(rows)}"
    if others:
        text += f"\n\nflags of libraries:\n{_table(others)}"
    return f"{text}\n\n{_keys()}" if KEY in dict(rows) else text


def _table(rows: list[tuple[str, str]]) -> str:
    """Formats (name, text) rows as two columns, in the width of the terminal."""
    left = min(max(len(name) for name, _ in rows), 28) + 4
    width = max(min(shutil.get_terminal_size().columns, 100) - left, 30)
    lines = []
    for name, text in rows:
        first, *more = textwrap.wrap(text, width) or [""]
        lines.append(f"  {name:<{left - 2}}{first}".rstrip())
        lines += [" " * left + line for line in more]
    return "\n".join(lines)


def _keys() -> str:
    """Returns a line that says where the config's keys are explained, with a path to open."""
    path = (PACKAGE / "configs" / "default.py").resolve()
    here = Path(os.path.abspath("."))
    shown = path.relative_to(here) if path.is_relative_to(here) else path
    return f"{shown} explains every key of a config. docs/ in the repository explains the rest."
