"""Makes the pictures of the README: a recorded run, docs/terminal.svg, and its curves.

    python docs/pictures.py

trains the quickstart in runs/quickstart, which must not be there yet, in three minutes.
"""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

DOCS = Path(__file__).parent
TRAIN = "python -m jaxdp.train --config=configs/quickstart.py --workdir=runs/quickstart"
COLUMNS = 100
# A terminal to rich, but for moving lines: what would be left on it at the end is printed.
TERMINAL = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "TERM": "xterm-256color"}
OUTSIDE = re.compile(r"@font-face \{.*?\}", re.DOTALL)  # Fonts from another host.


def main() -> None:
    """Trains, records, draws."""
    said = record(TRAIN)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(f"$ {TRAIN}\n{said}"))
    svg = console.export_svg(title="jaxdp", theme=DIMMED_MONOKAI, unique_id="terminal")
    svg = OUTSIDE.sub("", svg).replace("Fira Code", "monospace")
    (DOCS / "terminal.svg").write_text(svg)
    record("python -m jaxdp.plot runs/quickstart --output=docs/curves.svg")


def record(command: str) -> str:
    """Runs a command in the repository; returns what it prints to a terminal."""
    env = os.environ | TERMINAL | {"COLUMNS": str(COLUMNS)}
    done = subprocess.run(
        [sys.executable, *command.split()[1:]],
        cwd=DOCS.parent,
        env=env,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    said = re.sub(r"\x1b\[\?25[lh]\n?", "", done.stdout)  # Hides and shows the cursor.
    path = re.compile(rf"{re.escape(sys.executable)}(.*?)(│?)$", re.MULTILINE)
    room = " " * (len(sys.executable) - len("python"))  # Before the right border of a table.
    return path.sub(rf"python\1{room}\2", said)


if __name__ == "__main__":
    main()
