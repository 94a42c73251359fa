"""Figures as PNG files, by matplotlib, which is an extra."""

import importlib.util
from typing import Any

from jaxdp.common.errors import ConfigError, check_text, shown


def check(flag: str, path: str) -> None:
    """Raises ConfigError where there is no matplotlib for a flag's file, or it can't be one."""
    check_text(f"--{flag}", path)
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"--{flag}={shown(path)} needs the package matplotlib: pip install 'jaxdp[plot]'"
        )


def new(width: float, height: float) -> Any:
    """A matplotlib Figure of so many inches, which no screen and no setting of the user's knows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Any, flag: str, path: str) -> None:
    """Writes a figure.

    Args:
      figure: of `new`.
      flag: that gave the path.
      path: of a PNG file.

    Raises:
      ConfigError: it can't be written.
    """
    try:
        figure.savefig(path, format="png", dpi=150)
    except OSError as error:
        raise ConfigError(
            f"--{flag}={shown(path)} can't be written ({error.strerror}): choose another file"
        ) from None
