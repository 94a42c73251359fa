"""Writes figures as PNG files with matplotlib, an optional dependency."""

import importlib.util
from typing import Any

from jaxdp.common.errors import ConfigError, check_text, shown


def check(flag: str, path: str) -> None:
    """Raises ConfigError if the path of a PNG isn't valid text, or matplotlib is missing."""
    check_text(f"--{flag}", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"--{flag}={shown(path)} needs the package matplotlib: pip install 'jaxdp[plot]'"
        )


def new(width: float, height: float) -> Any:
    """Returns a matplotlib Figure, sized in inches, independent of screens and user settings."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, flag: str, path: str) -> None:
    """Writes a figure as a PNG file.

    Args:
      figure: a figure made by `new`.
      flag: the name of the flag that gave the path, for messages.
      path: the path of the PNG file.

    Raises:
      ConfigError: the file can't be written.
    """
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(
            f"--{flag}={shown(path)} can't be written ({error.strerror}): choose another file"
        ) from None
