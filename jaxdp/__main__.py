"""The command `jaxdp`, also `python -m jaxdp`: lists the commands, or runs one of them."""

import difflib
import runpy
import sys

from jaxdp.common import streams, usage
from jaxdp.common.errors import WRONG_INPUT


def main() -> int:
    """Runs `jaxdp COMMAND ...` as `python -m jaxdp.COMMAND ...` does; returns the exit status.

    The list of commands imports neither them nor JAX, so it is printed at once.
    """
    streams.protect()
    name, *rest = sys.argv[1:] or ["--help"]
    if name in usage.HELP:
        print(usage.listing())
    elif name == "--version":
        print(usage.VERSION)
    elif name in usage.COMMANDS:
        sys.argv[1:] = rest
        runpy.run_module(f"jaxdp.{name}", run_name="__main__", alter_sys=True)
    else:
        near = difflib.get_close_matches(name, usage.COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(usage.COMMANDS)}"
        print(f"jaxdp: {name!r} is no command: {hint}", file=sys.stderr)
        return WRONG_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
