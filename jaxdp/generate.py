"""Continues prompts with the model of a run's newest checkpoint.

    jaxdp generate --workdir=DIR --prompt=TEXT [--prompt=TEXT ...]

`python -m jaxdp.generate` is the same. It prints each prompt with its continuation. Several prompts
are processed as one batch.

Exit status: 0; 2 a flag or the workdir is wrong; anything else is a fault.
"""

import sys

from absl import flags

from jaxdp.common import choices, cli, paths
from jaxdp.common.choices import MAX_INT32
from jaxdp.common.errors import ConfigError

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "Tokens to add to each prompt.", 1, MAX_INT32)
TEMPERATURE = flags.DEFINE_float(
    "temperature", choices.TEMPERATURE, "Sampling temperature; 0: always the likeliest token.", 0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Sample from the k likeliest tokens only; 0: from all.", 0)
TOP_P = flags.DEFINE_float(
    "top_p", 1.0, "Sample from the likeliest tokens whose probabilities reach p.", 1e-6, 1.0
)
SEED = flags.DEFINE_integer("seed", 0, "Random seed; equal seeds give equal texts.", 0, MAX_INT32)


def main() -> int:
    """Prints each prompt with its continuation; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    if not PROMPT.value:
        raise ConfigError("--prompt is missing: give a text to continue")
    cli.check_finite(TEMPERATURE, TOP_P)
    workdir = paths.local("--workdir", WORKDIR.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.run import preflight
    from jaxdp.workdir.generation import generate

    cli.prepare_jax()
    preflight.check_devices()
    texts = generate(
        workdir,
        PROMPT.value,
        num_tokens=NUM_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
        report=cli.warn,
    )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
