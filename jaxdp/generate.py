"""The command `python -m jaxdp.generate --workdir=DIR --prompt=TEXT`: text from a trained model.

The newest checkpoint is used. Give --prompt several times for several texts in one batch.
"""

import os
import sys
from pathlib import Path

from absl import flags

from jaxdp.common import cli
from jaxdp.common import config as configs
from jaxdp.common.choices import MOST
from jaxdp.common.errors import ConfigError
from jaxdp.data import tokenizer
from jaxdp.model import sampling
from jaxdp.run import preflight
from jaxdp.workdir import finished

WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a training run.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; may be given several times.")
NUM_TOKENS = flags.DEFINE_integer("num_tokens", 200, "Tokens to add to each prompt.", 1, MOST)
TEMPERATURE = flags.DEFINE_float(
    "temperature", sampling.TEMPERATURE, "0 takes the likeliest token always.", 0.0
)
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k likeliest tokens only; 0: from all.", 0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the likeliest tokens that reach p.", 1e-6, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws; same seed, same text.", 0, MOST)


def main() -> int:
    """Prints each prompt with its continuation; returns the exit status."""
    if not WORKDIR.value:
        raise ConfigError("--workdir is missing: give the folder of a training run")
    if not PROMPT.value:
        raise ConfigError("--prompt is missing: give a text to continue")
    cli.check_finite(TEMPERATURE, TOP_P)
    cli.prepare_jax()
    preflight.check_devices()
    texts = generate(
        os.path.expanduser(WORKDIR.value),
        PROMPT.value,
        num_tokens=NUM_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
    )
    for number, text in enumerate(texts):
        if number:
            print("-" * 40)
        print(text)
    return 0


def generate(workdir: str | Path, prompts: list[str], **options) -> list[str]:
    """Continues texts with the newest checkpoint of a run.

    Args:
      workdir: of the run.
      prompts: texts of at least one token each.
      **options: num_tokens, temperature, top_k, top_p, seed of `sampling.sample`.

    Returns:
      Each prompt with its continuation, up to an end-of-text token if one is drawn.

    Raises:
      ConfigError: there is no trained causal model, or a prompt can't be used.
      RunError: all checkpoints are damaged.
    """
    run = finished.open_workdir(Path(workdir))
    words = run.words
    if run.config.objective != "causal":
        raise ConfigError(
            f"objective={run.config.objective!r} can't continue text: use a model trained with "
            "'causal'"
        )
    for prompt in prompts:
        configs.check_text("--prompt", prompt)
    ids = tokenizer.encode(words, prompts)
    for prompt, tokens in zip(prompts, ids, strict=True):
        if len(tokens) == 0:
            raise ConfigError(f"--prompt={prompt!r} is empty: give at least one character")
    params, _ = run.params("newest", cli.warn)
    vocab_size = tokenizer.vocab_size(words)
    drawn = sampling.sample(run.model, params, ids, vocab_size=vocab_size, **options)
    end = tokenizer.end_id(words)
    return [
        prompt + words.decode(_until(list(tokens), end), skip_special_tokens=False)
        for prompt, tokens in zip(prompts, drawn, strict=True)
    ]


def _until(tokens: list[int], end: int | None) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens


if __name__ == "__main__":
    sys.exit(cli.run(main))
