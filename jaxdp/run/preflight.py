"""Checks before anything is compiled, beyond the config: data, weights, memory, devices."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.common.errors import ConfigError, shown
from jaxdp.common.terminal import in_bytes
from jaxdp.data import eval_sets, special_tokens, splits
from jaxdp.data.cache import TokenCache
from jaxdp.data.feed import Feed
from jaxdp.data.layout import SPLITS
from jaxdp.data.sources import has_splits
from jaxdp.estimate import memory
from jaxdp.huggingface import load
from jaxdp.model.architecture import ModelConfig
from jaxdp.parallel.replicas import device_memory
from jaxdp.run import sampled
from jaxdp.step.setup import Setup
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import folder_of


def check_data(feed: Feed, say: Callable[[str], None] = print) -> None:
    """Refuses splits without a single sequence, and a sample prompt that can't be tokenised.

    `say` is called with a warning if validation is on text that is trained on.
    """
    # A single process imports TensorFlow later, while its step compiles; several processes would
    # drift apart.
    if "tensorflow" in sys.modules or jax.process_count() > 1:
        import jaxdp.data.tensorflow  # noqa: F401  Raises if TensorFlow holds the accelerators.

    for split in SPLITS:
        check_split(feed, split)
    config, cache = feed.config, feed.cache
    train, evaluation = config.data.train_split, config.data.eval_split
    found = splits.trained_on(config, config)
    if any(map(has_splits, found)):
        say(
            f"Evaluation is on text that is trained on: data.eval_split={shown(evaluation)} has "
            f"some of data.train_split={shown(train)}."
        )
    if files := [source for source in found if not has_splits(source)]:
        # Each is divided by data.eval_fraction for itself.
        say(
            f"Evaluation is on text that is trained on: in data.path, {' and '.join(files)} have "
            "files in common."
        )
    if config.objective == "causal" and config.sample.num_tokens:
        try:
            sampled.prompt_tokens(config, cache)
        except ConfigError as error:
            raise ConfigError(f"sample.prompt={config.sample.prompt!r}: {error}") from None


def check_split(feed: Feed, split: str) -> None:
    """Refuses a split, "train" or "validation", if one of its sources has no sequence."""
    config, cache = feed.config, feed.cache
    if split == "train":
        name, paths, sequences = "training", list(feed.shares), feed.training
        borders = cache.train_borders
    else:
        name, paths, sequences = "validation", [config.data.path], feed.validation
        borders = (len(cache.validation),)
    counts = [part.count for part in sequences.parts]
    for path, count, tokens in zip(paths, counts, np.diff(borders, prepend=0), strict=True):
        if config.data.packing == "padded" and not count:
            raise ConfigError(
                f"data.path={path!r} gives no {name} example in which seq_len="
                f"{config.seq_len} leaves a token to predict: give more, or a larger seq_len"
            )
        if config.data.packing != "padded" and tokens <= config.seq_len:
            raise ConfigError(
                f"data.path={path!r} gives {tokens} {name} tokens, too few for one sequence "
                f"of seq_len={config.seq_len} and a next token: give more text, or a smaller "
                "seq_len"
            )
    if config.data.packing == "documents" and special_tokens.end_id(cache.tokenizer) is None:
        raise ConfigError(
            f"data.packing='documents' needs a token that ends a document, and tokenizer="
            f"{config.tokenizer!r} has none ({', '.join(special_tokens.END_NAMES)}): name one "
            "with data.eos, or use another tokenizer, such as 'byte', or data.packing='stream'"
        )


def open_eval_sets(
    config: ConfigDict, cache: TokenCache, report: Callable[[str], None]
) -> dict[str, Feed]:
    """Opens eval_sets with the cache's tokenizer; refuses those that can't be used."""
    sets = {}
    for name in eval_sets.parse(config.eval_sets):
        with eval_sets.named(config, name):
            sets[name] = eval_sets.open_set(config, name, cache, report)
            check_split(sets[name], "validation")
    return sets


def say_of_trained_sets(
    config: ConfigDict, say: Callable[[str], None], run: ConfigDict | None = None
) -> None:
    """Calls `say` with a warning for each of eval_sets that has text of a run's training split.

    `run` is the config of that run, by default `config`.
    """
    for name in eval_sets.parse(config.eval_sets):
        with eval_sets.named(config, name):
            own = eval_sets.config_of(config, name)
        if splits.trained_on(own, run or config):
            say(f"Evaluation set {name} may be trained on: it has text of data.path.")


def say_of_trained_text(config: ConfigDict, run: ConfigDict, say: Callable[[str], None]) -> None:
    """Calls `say` with a warning if the validation text of a config may be what a run trains on."""
    if splits.trained_on(config, run):
        keys = ("path", "eval_split", "train_split", "eval_fraction")
        differing = [
            f"data.{key}={shown(config.data[key])} (the run's is {shown(run.data[key])})"
            for key in keys
            if config.data[key] != run.data[key]
        ]
        reason = ", ".join(differing) or "so it was in the run"
        say(f"Evaluation may be on text that is trained on: {reason}.")


def check_tokens(feed: Feed, step: int, saved: dict) -> bool:
    """Returns True; raises ConfigError if a checkpoint, with JSON `saved`, has seen other data."""
    del step
    if feed.cache.digest != saved["digest"]:
        raise ConfigError(
            f"data.path={feed.config.data.path!r} no longer gives the tokens that this workdir was "
            "trained on: restore the data, or use another --workdir"
        )
    return True


def check_init(
    config: ConfigDict,
    workdir: Path,
    vocab_size: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Refuses initial weights (init_from) that are missing or belong to another model.

    Once a run has a checkpoint, it doesn't need them, and they aren't checked.

    Args:
      config: the config of the run; model.vocab_multiple is set to what the weights need, in place.
      workdir: the folder of the run.
      vocab_size: the tokenizer's vocabulary size, if it is known already.
      say: called with a line of text if the weights have more rows than the tokenizer has tokens.
    """
    if not config.init_from or integrity.steps(folder_of(workdir)):
        return
    folder = load.open_folder(config.init_from)
    rows = folder.vocab_size
    if vocab_size is not None and vocab_size < rows:
        if ModelConfig.from_config(config, vocab_size).vocab_size != rows:
            config.model.vocab_multiple = rows
        say(
            f"The weights of {config.init_from} have {rows:,} rows in their vocabulary, "
            f"{rows - vocab_size:,} more than the tokenizer has tokens: they are kept, and no text "
            "that is generated has them."
        )
    folder.check(ModelConfig.from_config(config, vocab_size or 1), vocab_size is not None)


def take_vocabulary(config: ConfigDict, saved: ConfigDict) -> None:
    """Takes model.vocab_multiple from the config.json of a run that began with init_from's weights.

    `check_init` has set it there.
    """
    if config.init_from and config.init_from == saved.init_from:
        config.model.vocab_multiple = saved.model.vocab_multiple


def check_memory(setup: Setup) -> None:
    """Refuses a model or batch that can't fit in a device's memory, however it is compiled.

    The first lower bound counts parameters and gradients, the input of one layer, and the batch;
    it takes no time, however large the model. The second is exact for the state and the batch.
    """
    model, sizes = setup.model.config, setup.sizes
    layer = 2 * model.embed_dim * (model.num_heads * model.head_dim + model.mlp_dim)
    parameters = 8 * (model.vocab_size * model.embed_dim + model.num_layers * layer)
    batch = 4 * model.seq_len * (sizes.micro * model.embed_dim + 3 * sizes.per_device)
    room = device_memory()
    for key, needed in (("model", parameters), ("global_batch_size", parameters + batch)):
        if needed > room:
            raise ConfigError(
                f"{key} is too large: model.num_layers={model.num_layers}, model.embed_dim="
                f"{model.embed_dim}, and {sizes.micro} sequences of seq_len={model.seq_len} at "
                f"once take at least {in_bytes(needed)} and a device has {in_bytes(room)}: make "
                "them smaller"
            )
    least = memory.least_bytes(setup)
    if least > room:
        raise ConfigError(
            f"model is too large: its state, with optimizer.name={setup.config.optimizer.name!r}, "
            f"and the batch take {in_bytes(least)} and a device has {in_bytes(room)}: use "
            "a smaller model or another optimizer, or several devices and sync.method='sharded'"
        )


def check_delay(setup: Setup) -> None:
    """Refuses sync.delay where processes would take the bytes of one collective for another's.

    With it islands exchange changes while their devices average gradients. On CPUs processes
    communicate by gloo, which can't tell two collectives that are under way from each other.
    """
    delay, inside = setup.config.sync.delay, setup.islands.size > 1
    on_cpus = jax.local_devices()[0].platform == "cpu"
    if delay and inside and on_cpus and jax.process_count() > 1:
        raise ConfigError(
            f"sync.delay={delay} does not work on CPUs in several processes with islands of "
            "several devices: set it to 0, as it hides nothing on CPUs, in a new --workdir"
        )


def check_devices() -> None:
    """Refuses a platform in JAX_PLATFORMS that isn't available."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    logged: list[logging.LogRecord] = []

    def into_the_message(record: logging.LogRecord) -> bool:
        logged.append(record)
        return not platforms  # Without JAX_PLATFORMS there is no error, so JAX's warning is shown.

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(into_the_message)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError: no plugin is installed.
        causes = [record.exc_info[1] for record in logged if record.exc_info]
        texts = [*(str(cause) for cause in causes), str(error), "JAX has no such platform here"]
        reason = next(text for text in texts if text).splitlines()[0]
        raise ConfigError(
            f"JAX_PLATFORMS={platforms!r} can't be used ({reason}): install the "
            "drivers and pip install -e '.[cuda]', or leave JAX_PLATFORMS empty"
        ) from error
    finally:
        logger.removeFilter(into_the_message)
