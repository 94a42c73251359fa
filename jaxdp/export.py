"""The command `python -m jaxdp.export --workdir=DIR --output=FOLDER [--step=newest|best|N]`.

Writes a checkpoint as a folder that transformers opens: AutoModelForCausalLM (of a masked model
AutoModelForMaskedLM) and AutoTokenizer, by from_pretrained("FOLDER").

Exit status: 0; 2 a flag, the workdir or the model isn't fit for it; anything else is a fault.
"""

import os
import sys
from pathlib import Path

from absl import flags

from jaxdp.common import cli
from jaxdp.common.errors import ConfigError
from jaxdp.huggingface.save import export
from jaxdp.run import preflight

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to make.")
STEP = flags.DEFINE_string("step", "newest", "Which checkpoint: newest, best, or steps done.")
flags.DEFINE_alias("out", "output")


def main() -> int:
    """Writes the folder and prints its name; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    if not OUTPUT.value:
        raise ConfigError("--output is missing: give the folder to make")
    cli.check_step(STEP)
    cli.prepare_jax()
    preflight.check_devices()
    workdir, output = (Path(os.path.expanduser(x)) for x in (WORKDIR.value, OUTPUT.value))
    step = export(workdir, output, STEP.value, cli.warn)
    print(f"{output}: the model after step {step:,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
