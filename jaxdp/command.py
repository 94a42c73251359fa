"""What the commands share: flags, errors, signals, and JAX's settings."""

import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging

from jaxdp.config import ConfigError, RunError, check_known

WRONG_INPUT = 2
FAULT = 1


def run(main: Callable[[], int], check_arguments: Callable[[list[str]], None] | None = None) -> int:
    """Parses the flags and runs a command.

    What the user did wrong becomes one line on stderr, an unexpected exception its traceback.

    Args:
      main: the command; returns its exit status.
      check_arguments: raises ConfigError for what the flags' own errors explain badly.

    Returns:
      The exit status.
    """
    logging.set_verbosity(logging.WARNING)
    try:
        if check_arguments:
            check_arguments(sys.argv[1:])
        _parse_flags()
        return main()
    except (ConfigError, RunError) as error:
        print(f"jaxdp: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, ConfigError) else FAULT
    except Exception:
        traceback.print_exc()
        return FAULT


def check_overrides(argv: list[str]) -> None:
    """Refuses --config.KEY=VALUE of an unknown key, which config_flags does with a traceback."""
    overrides = (re.match(r"--?config\.([^=]+)=?(.*)", argument) for argument in argv)
    check_known({match[1]: match[2] for match in overrides if match})


def _parse_flags() -> None:
    try:
        rest = flags.FLAGS(sys.argv)[1:]
    except flags.Error as error:
        raise ConfigError(str(error)) from None
    except Exception as error:  # Parsing --config runs the config file, which can raise anything.
        raise ConfigError(
            f"--config can't be read ({type(error).__name__}: {error}): give a Python file with a "
            "get_config() like those in configs/"
        ) from error
    if rest:
        raise ConfigError(f"{rest[0]!r} is not understood: flags look like --name=value")


def prepare_jax() -> None:
    """Turns the persistent compilation cache on, unless the user has set it up already."""
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "jaxdp" / "xla"))


def on_stop_signal(callback: Callable[[], None]) -> None:
    """Calls back on the first SIGTERM or SIGINT; a second one ends the process as usual."""

    def handle(number, frame):
        del frame
        signal.signal(number, signal.SIG_DFL)
        callback()

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
