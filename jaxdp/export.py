"""Writes a trained model as a folder that transformers opens.

    jaxdp export --workdir=DIR --output=FOLDER [--step=newest|best|N] [--dtype=bfloat16]

`python -m jaxdp.export` is the same. Hugging Face's transformers opens the folder with
AutoTokenizer.from_pretrained("FOLDER") and AutoModelForCausalLM.from_pretrained("FOLDER"), or for
a masked model with AutoModelForMaskedLM.

Exit status: 0; 2 a flag or the workdir is wrong, or the model can't be exported; anything else is a
fault.
"""

import sys

from absl import flags

from jaxdp.common import cli, paths
from jaxdp.common.errors import ConfigError, check_step

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
OUTPUT = flags.DEFINE_string("output", None, "Folder to make; must not exist yet.")
STEP = flags.DEFINE_string("step", "newest", "Checkpoint: newest, best, or a number of steps.")
DTYPE = flags.DEFINE_string("dtype", "float32", "Of the weights: float32, or bfloat16 (half size).")
flags.DEFINE_alias("out", "output")


def main() -> int:
    """Writes the folder and prints its name; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    if not OUTPUT.value:
        raise ConfigError("--output is missing: give the folder to make")
    check_step(STEP.value)
    workdir = paths.local("--workdir", WORKDIR.value)
    output = paths.local("--output", OUTPUT.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.huggingface.save import export
    from jaxdp.run import preflight

    cli.prepare_jax()
    preflight.check_devices()
    step = export(workdir, output, STEP.value, cli.warn, DTYPE.value)
    print(f"{output}: the model after step {step:,}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
