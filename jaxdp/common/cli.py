"""Functions that the commands share: flags, errors, and JAX's settings."""

import contextlib
import importlib.util
import inspect
import itertools
import math
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from jaxdp.common import config_file, nvidia, paths, streams, usage
from jaxdp.common.config import check_known
from jaxdp.common.errors import WRONG_INPUT, ConfigError, RunError, shown

FAULT = 1
INTERRUPTED = 130  # By Ctrl-C, as shells have it: 128 + SIGINT.
REPEATED = "; repeat this option to specify a list of values"  # absl adds it to a flag's help.
NO_FUNCTION = "AttributeError: module 'config_config' has no attribute 'get_config'"


def run(
    main: Callable[..., int],
    check_arguments: Callable[[list[str]], None] | None = None,
    operands: bool = False,
) -> int:
    """Parses the flags and runs a command, or shows its --help or --version.

    A user's mistake is printed as one line on stderr, an unexpected exception with its traceback.

    Args:
      main: the command; returns its exit status.
      check_arguments: called with the arguments before flags are parsed, with none for --help.
        May define flags; raises ConfigError for mistakes that absl's errors explain badly.
      operands: whether the command takes arguments that are not flags; main gets them as a list.

    Returns:
      The exit status.
    """
    streams.protect()
    logging.set_verbosity(logging.WARNING)
    try:
        if _shows_help(main, check_arguments):
            return 0
        sys.argv = config_file.expanded(sys.argv)
        if check_arguments:
            check_arguments(sys.argv[1:])
        rest = _parse_flags()
        if operands:
            return main(rest)
        if rest:
            raise ConfigError(f"{rest[0]!r} is not understood: flags look like --name=value")
        return main()
    except (ConfigError, RunError) as error:
        print(f"jaxdp: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_INPUT if isinstance(error, ConfigError) else FAULT
    except KeyboardInterrupt:
        print("jaxdp: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return FAULT


def _shows_help(
    main: Callable[..., int], check_arguments: Callable[[list[str]], None] | None
) -> bool:
    """Prints help or the version if the arguments ask for it; returns whether it did."""
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked = set(sys.argv[1:end])
    if "--version" in asked:
        print(usage.VERSION)
        return True
    if not asked & set(usage.HELP):
        return False
    if check_arguments:
        with contextlib.suppress(ConfigError):
            check_arguments([])
    # absl files the flags of the module that runs under the name of the program.
    names = {main.__module__, sys.argv[0]}
    modules = flags.FLAGS.flags_by_module_dict()
    rows = {name: [row for flag in modules[name] for row in _rows(flag)] for name in modules}
    own = [row for name in names for row in rows.pop(name, [])]
    others = list(itertools.chain(*rows.values())) if "--helpfull" in asked else []
    print(usage.help_for(Path(inspect.getfile(main)), own, others))
    return True


def _rows(flag: flags.Flag) -> list[tuple[str, str]]:
    """Returns rows of help, (the flag as typed, its meaning and default); two for --config."""
    kind, default = flag.flag_type(), flag.default
    text = " ".join((flag.help or "").split()).removesuffix(REPEATED)
    if kind == "config object":
        file = [] if default else [("--config=FILE.py", text)]
        return [*file, (usage.KEY, "Another value for a key, such as --config.data.path=FILE.txt.")]
    if default not in (None, "", [], False):
        text += f" Default: {default}."
    value = "" if flag.boolean else "=NUMBER" if kind in ("int", "float") else "=TEXT"
    return [(f"--{flag.name}{value}", text)]


def check_config(argv: list[str]) -> None:
    """Raises ConfigError if --config is missing or no file, or a --config.KEY is unknown."""
    given = list(config_file.given(argv))
    if not given and not any("-flagfile" in argument for argument in argv):
        raise ConfigError(config_file.MISSING)
    for value in given:
        config_file.check(value)
    for argument in itertools.takewhile(lambda x: not re.match("--?config(=|$)", x), argv):
        if re.match(r"--?config\.", argument):
            raise ConfigError(f"{shown(argument)} comes before --config: put it after --config")
    check_overrides(argv)


def check_overrides(argv: list[str]) -> None:
    """Raises ConfigError if a --config.KEY is unknown; config_flags would print a traceback."""
    overrides = (re.match(r"--?config\.([^=]*)=?(.*)", argument, re.DOTALL) for argument in argv)
    check_known({match[1]: match[2] for match in overrides if match})


def _parse_flags() -> list[str]:
    """Parses the flags; returns the arguments that are not flags."""
    for name in [name for name in flags.FLAGS if "_" in name]:  # --num-tokens is --num_tokens.
        hyphenated = name.replace("_", "-")
        if hyphenated not in flags.FLAGS:
            flags.FLAGS[hyphenated] = flags.FLAGS[name]
    try:
        return flags.FLAGS(sys.argv)[1:]
    except (Exception, SystemExit) as error:
        # Parsing --config runs the config file, which can raise anything. absl turns some of these
        # exceptions into an error of its own that ends with a traceback.
        said, _, traceback = str(error).partition("Traceback (most recent call last)")
        if isinstance(error, flags.Error) and not traceback:
            more = ": see configs/default.py for valid values" if "--config." in said else ""
            raise ConfigError(f"{shown(said, as_text=str)}{more}") from None
        reason = (
            traceback.strip().splitlines()[-1] if traceback else f"{type(error).__name__}: {said}"
        )
        own = f"{ConfigError.__module__}.{ConfigError.__name__}: "
        if reason.startswith(own):  # A get_config() that knows what is wrong.
            raise ConfigError(reason.removeprefix(own)) from None
        reason = reason.replace(NO_FUNCTION, "it has no get_config()")
        given = "".join(f"={shown(value)}" for value in config_file.given(sys.argv[1:]))
        raise ConfigError(
            f"--config{given} can't be read ({shown(reason, as_text=str)}): give a Python file "
            "with a get_config() like those in configs/"
        ) from error


def config_of_flag(flag: flags.FlagHolder) -> ConfigDict:
    """Returns the config that --config names.

    Raises:
      ConfigError: the flag is missing, or its file doesn't return a ConfigDict.
    """
    if not flag.present:
        raise ConfigError(config_file.MISSING)
    if not isinstance(flag.value, ConfigDict):
        config_file.check(config_flags.get_config_filename(flags.FLAGS[flag.name]))
        raise ConfigError(
            f"--config gives {shown(flag.value)}, not a ConfigDict: let its get_config() return "
            "one, like those in configs/"
        )
    return flag.value


def warn(line: str) -> None:
    """Prints a notice to stderr, apart from the command's results on stdout."""
    print(f"jaxdp: {line}", file=sys.stderr)


def check_finite(*given: flags.FlagHolder) -> None:
    """Raises ConfigError if a flag is infinite or NaN, which absl's bounds allow; None is fine."""
    for flag in given:
        if flag.value is not None and not math.isfinite(flag.value):
            raise ConfigError(f"--{flag.name}={flag.value} is not finite: give a finite number")


def prepare_jax() -> None:
    """Prepares JAX for a command, except for what the user has set; call it before JAX is used.

    It turns on JAX's persistent compilation cache. And where JAX's plugin for GPUs is installed,
    which the extra plan-gpu does, and no GPU is there, it keeps JAX to the CPU: looking for GPUs,
    the plugin would print a traceback, and then not even compile for them.
    """
    import jax

    if jax.config.values["jax_compilation_cache_dir"] is None:
        try:
            folder = paths.cache_folder() / "xla"
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
            jax.config.update("jax_compilation_cache_dir", str(folder))
        except (ConfigError, OSError) as error:
            warn(f"compiled programs are not kept for the next start ({error})")
    if not jax.config.values["jax_platforms"] and _only_plugin():
        jax.config.update("jax_platforms", "cpu")
        warn("no NVIDIA GPU is visible here, so JAX uses the CPU (JAX_PLATFORMS=cpu)")


def _only_plugin() -> bool:
    """Returns whether JAX has a plugin for NVIDIA GPUs, and this machine has no accelerator."""
    # JAX looks for these files, too; Linux on Windows has the second one.
    devices = nvidia.device_files() or os.path.exists("/dev/dxg")
    return bool(nvidia.plugins()) and not devices and importlib.util.find_spec("libtpu") is None
