"""Prints a run's progress in the terminal: tables, a progress bar or plain lines, a summary."""

import contextlib
import time
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from jaxdp.common import streams


class Display:
    """Prints to stdout: with colour and a progress bar on a terminal, else as plain lines."""

    def __init__(self, quiet: bool = False):
        """Makes a display, which prints nothing if `quiet`, as in all processes but the first."""
        streams.protect()  # Here, too, for programs that call jaxdp's functions.
        # In a notebook rich would turn every line into an HTML block, with gaps between them.
        notebook = Console().is_jupyter
        self._console = Console(
            quiet=quiet,
            highlight=False,
            soft_wrap=True,
            force_jupyter=False,
            force_terminal=False if notebook else None,
        )
        self._progress: Progress | None = None
        self._began = time.perf_counter()

    def line(self, text: str, style: str = "") -> None:
        """Prints a line, above the progress bar if there is one."""
        self._print(Text(text, style=style))

    def _print(self, text: Any) -> None:
        # What others have put in place of stdout may fail, too; the run goes on.
        with contextlib.suppress(OSError):
            self._console.print(text)

    def table(self, title: str, rows: dict[str, str]) -> None:
        """Prints names and values in two columns."""
        if self._console.is_terminal:
            grid = Table.grid(padding=(0, 2))
            grid.add_column(style="bold")
            grid.add_column(overflow="fold")
            for name, value in rows.items():
                grid.add_row(name, Text(value))
            self._print(Panel(grid, title=title, title_align="left", expand=False))
        else:
            width = max(map(len, rows))
            self.line(title)
            for name, value in rows.items():
                self.line(f"  {name:<{width}}  {value}")

    def text(self, title: str, text: str) -> None:
        """Prints a text of several lines under a title."""
        if self._console.is_terminal:
            self._print(Panel(Text(text), title=title, title_align="left"))
        else:
            self.line(f"{title}\n{text}\n")

    def start(self, done: int, total: int) -> None:
        """Starts the progress display at step `done` of `total`."""
        self._total, self._started = total, (done, time.perf_counter())
        if self._console.is_terminal:
            self._progress = Progress(
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("", total=total, completed=done, figures="")

    def step(self, done: int) -> None:
        """Moves the progress bar to step `done`."""
        if self._progress:
            self._progress.update(self._task, completed=done)

    def figures(self, done: int, loss: float, tokens_per_second: float | None) -> None:
        """Shows the figures of a logged step, in the bar or as a line with the time left."""
        figures = f"loss {loss:.4f}"
        if tokens_per_second is not None:
            figures += f"  {tokens_per_second:,.0f} tokens/s"
        if self._progress:
            self._progress.update(self._task, completed=done, figures=figures)
            return
        first, since = self._started
        left = (time.perf_counter() - since) / max(done - first, 1) * (self._total - done)
        self.line(f"step {done:>6}/{self._total}  {figures}  {duration(left)} left")

    def stop(self) -> None:
        """Ends the progress bar."""
        if self._progress:
            self._progress.stop()
            self._progress = None

    def seconds(self) -> float:
        """Returns the seconds since the display was made."""
        return time.perf_counter() - self._began

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the progress bar, which restores the terminal."""
        self.stop()


def duration(seconds: float) -> str:
    """Formats seconds as h:mm:ss or m:ss.

    Examples:
      >>> duration(61.2), duration(3600)
      ('1:01', '1:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quantity(number: float) -> str:
    """Formats a large number with three digits and a unit.

    Examples:
      >>> quantity(812), quantity(1_536_000), quantity(3.1e9)
      ('812', '1.54M', '3.1B')
    """
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def in_gib(size: int) -> str:
    """Formats bytes in GiB, in which the memory of GPUs is counted.

    Examples:
      >>> in_gib(80 * 2**30)
      '80.00 GiB'
    """
    return f"{size / 2**30:.2f} GiB"


def in_bytes(size: float) -> str:
    """Formats a number of bytes with three digits and a unit.

    Examples:
      >>> in_bytes(812), in_bytes(3.1e9)
      ('812B', '3.1GB')
    """
    return quantity(size).replace("B", "G") + "B"
