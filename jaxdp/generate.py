"""Continues prompts with the model of a checkpoint.

    jaxdp generate --workdir=DIR [--step=newest|best|N] --prompt=TEXT [--prompt=TEXT ...]
    jaxdp generate --workdir=DIR [--step=newest|best|N] --chat

`python -m jaxdp.generate` is the same. It prints each prompt with its continuation. Several prompts
are processed as one batch; --prompt=- is read from stdin. With --chat, each line of stdin is a
message, which a model that was trained on chats answers; an empty line or Ctrl-D ends it.

Exit status: 0; 2 a flag or the workdir is wrong; anything else is a fault.
"""

import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxdp.common import choices, cli, paths
from jaxdp.common.choices import OPTIONS
from jaxdp.common.errors import ConfigError, check_step, check_text

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
STEP = flags.DEFINE_string("step", "newest", "Checkpoint: newest, best, or a number of steps.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
CHAT = flags.DEFINE_bool("chat", False, "Answer the lines of stdin, one after the other.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Continuations of each prompt.", 1, 10_000)
NUM_TOKENS = flags.DEFINE_integer(
    "num_tokens", 200, "Tokens to add to each prompt.", *OPTIONS["num_tokens"]
)
TEMPERATURE = flags.DEFINE_float(
    "temperature",
    choices.TEMPERATURE,
    "Sampling temperature; 0: always the likeliest token.",
    *OPTIONS["temperature"],
)
TOP_K = flags.DEFINE_integer(
    "top_k", 0, "Sample from the k likeliest tokens only; 0: from all.", *OPTIONS["top_k"]
)
TOP_P = flags.DEFINE_float(
    "top_p",
    1.0,
    "Sample from the likeliest tokens whose probabilities reach p.",
    *OPTIONS["top_p"],
)
SEED = flags.DEFINE_integer(
    "seed", 0, "Random seed; equal seeds give equal texts.", *OPTIONS["seed"]
)


def main() -> int:
    """Prints each prompt with its continuation; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    if CHAT.value and (PROMPT.value or NUM_SAMPLES.value > 1):
        raise ConfigError("--chat does not go with --prompt or --num_samples: leave them out")
    if not PROMPT.value and not CHAT.value:
        raise ConfigError("--prompt is missing: give a text to continue")
    cli.check_finite(TEMPERATURE, TOP_P)
    check_step(STEP.value)
    workdir = paths.local("--workdir", WORKDIR.value)
    # Imported here, so that --help and mistakes in flags don't wait seconds for JAX.
    from jaxdp.run import preflight

    cli.prepare_jax()
    preflight.check_devices()
    options = {
        "which": STEP.value,
        "num_tokens": NUM_TOKENS.value,
        "temperature": TEMPERATURE.value,
        "top_k": TOP_K.value,
        "top_p": TOP_P.value,
        "seed": SEED.value,
        "report": cli.warn,
    }
    if CHAT.value:
        _chat(workdir, options)
    else:
        _continue(workdir, options)
    return 0


def _continue(workdir: Path, options: dict[str, Any]) -> None:
    """Prints each prompt with its continuations."""
    from jaxdp.workdir.generation import generate

    prompts = [_stdin() if prompt == "-" else prompt for prompt in PROMPT.value]
    repeated = [prompt for prompt in prompts for _ in range(NUM_SAMPLES.value)]
    for number, text in enumerate(generate(workdir, repeated, **options)):
        if number:
            print("-" * 40)
        print(text)


def _stdin() -> str:
    """Returns what stdin holds, without the line break that a shell puts at its end."""
    return sys.stdin.buffer.read().decode(errors="surrogateescape").removesuffix("\n")


def _chat(workdir: Path, options: dict[str, Any]) -> None:
    """Answers each line of stdin, up to an empty one."""
    from jaxdp.workdir.conversation import Conversation

    conversation = Conversation(workdir, **options)
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        check_text("--chat", line)
        for text in conversation.answer(line):
            print(text, end="", flush=True)
        print()


if __name__ == "__main__":
    sys.exit(cli.run(main))
