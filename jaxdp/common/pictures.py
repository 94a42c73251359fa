"""Writes figures as PNG, SVG or PDF files with matplotlib, an optional dependency."""

import importlib.util
from pathlib import Path
from typing import Any

from jaxdp.common import paths
from jaxdp.common.errors import ConfigError, shown

KINDS = (".png", ".svg", ".pdf")


def check(flag: str, path: str) -> Path:
    """Returns a path that a flag gives to a picture, with ~ replaced by the home folder.

    Raises:
      ConfigError: it doesn't end in a kind of picture, or matplotlib is missing.
    """
    found = paths.local(f"--{flag}", path)
    if found.suffix.lower() not in KINDS:
        raise ConfigError(
            f"--{flag}={shown(path)} names no kind of picture: let it end in {', '.join(KINDS)}"
        )
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"--{flag}={shown(path)} needs the package matplotlib: pip install 'jaxdp[plot]'"
        )
    return found


def new(width: float, height: float) -> Any:
    """Returns a matplotlib Figure, sized in inches, independent of screens and user settings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, flag: str, path: Path) -> None:
    """Writes a figure, as the kind of picture that its path ends in.

    The same figure gives the same file: nothing in it tells the time.

    Args:
      figure: a figure made by `new`.
      flag: the name of the flag that gave the path, for messages.
      path: the path of the file, which `check` accepts.

    Raises:
      ConfigError: the file can't be written.
    """
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    try:
        with matplotlib.rc_context({"svg.hashsalt": "jaxdp"}):
            figure.savefig(path, format=kind, dpi=150, metadata=dated)
    except OSError as error:
        raise ConfigError(
            f"--{flag}={shown(str(path))} can't be written ({error.strerror}): choose another file"
        ) from None
