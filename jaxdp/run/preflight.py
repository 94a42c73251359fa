"""Checks before anything is compiled, beyond the config: data, workdir, weights, memory, disk."""

import contextlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common import files, locks
from jaxdp.common.errors import ConfigError, check_text, shown
from jaxdp.common.terminal import in_bytes
from jaxdp.data import eval_sets, special_tokens
from jaxdp.data.cache import TokenCache
from jaxdp.data.feed import Feed
from jaxdp.data.layout import SPLITS
from jaxdp.estimate import memory
from jaxdp.huggingface import load
from jaxdp.model.transformer import ModelConfig
from jaxdp.parallel import processes
from jaxdp.parallel.replicas import device_memory
from jaxdp.run import profiling, sampled
from jaxdp.step.setup import Setup
from jaxdp.sync.compression import BITS
from jaxdp.sync.method import Sync
from jaxdp.sync.methods import METHODS
from jaxdp.workdir import integrity
from jaxdp.workdir.checkpoints import FOLDER, folder_of
from jaxdp.workdir.metrics import JSONL


def check_same_run(config: ConfigDict, saved: ConfigDict) -> None:
    """Refuses to resume a run whose config.json (`saved`) differs in keys that must not change.

    Raises:
      ConfigError: names the keys that differ where they must not.
    """
    new, old = configs.flatten(config), configs.flatten(saved)
    differing = [
        f"{key}={new.get(key)!r} (was {shown(old.get(key))})"
        for key in sorted(configs.identity(new | old))
        if key not in configs.NOT_IDENTITY and new.get(key) != old.get(key)
    ]
    # What compressed sums have lost is in the state.
    dtypes = [flat.get("sync.dtype", "float32") for flat in (new, old)]
    compressed = [str(dtype) in BITS for dtype in dtypes]
    if compressed[0] != compressed[1]:
        differing.append(f"sync.dtype={dtypes[0]!r} (was {shown(dtypes[1])})")
    # No other method can go on from the state of a method with an outer optimizer, or from what
    # compressed sums have lost.
    names = [flat.get("sync.method", "gradient_mean") for flat in (new, old)]
    own = any(METHODS.get(str(name), Sync).has_outer for name in names)
    if names[0] != names[1] and (own or all(compressed)):
        differing.append(f"sync.method={names[0]!r} (was {shown(names[1])})")
    # An EMA must cover a run from its beginning to its end.
    decays = [flat.get("ema.decay", 0.0) for flat in (new, old)]
    if bool(decays[0]) != bool(decays[1]):
        differing.append(f"ema.decay={decays[0]!r} (was {shown(decays[1])})")
    # Without momentum, SGD has no state.
    rates = [flat.get("optimizer.b1", 0.9) for flat in (new, old)]
    if new.get("optimizer.name") == "sgd" and bool(rates[0]) != bool(rates[1]):
        differing.append(f"optimizer.b1={rates[0]!r} (was {shown(rates[1])})")
    if differing:
        raise ConfigError(
            f"this workdir holds a different run: {', '.join(differing)}; "
            "use the old values, or another --workdir"
        )


def check_data(feed: Feed) -> None:
    """Refuses splits without a single sequence, and a sample prompt that can't be tokenised."""
    # A single process imports TensorFlow later, while its step compiles; several processes would
    # drift apart.
    if "tensorflow" in sys.modules or jax.process_count() > 1:
        import jaxdp.data.tensorflow  # noqa: F401  Raises if TensorFlow holds the accelerators.

    for split in SPLITS:
        check_split(feed, split)
    config, cache = feed.config, feed.cache
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


def check_tokens(feed: Feed, step: int, saved: dict) -> bool:
    """Returns True; raises ConfigError if a checkpoint, with JSON `saved`, has seen other data."""
    del step
    if feed.cache.digest != saved["digest"]:
        raise ConfigError(
            f"data.path={feed.config.data.path!r} no longer gives the tokens that this workdir was "
            "trained on: restore the data, or use another --workdir"
        )
    return True


def check_workdir(workdir: Path) -> None:
    """Refuses a workdir with a file in place of a folder that the run writes, or vice versa.

    And one in which something belongs to another user, so that this run couldn't write it.
    """
    check_text("--workdir", str(workdir))
    kinds = dict.fromkeys(("checkpoints", "tensorboard", profiling.FOLDER), Path.is_dir)
    kinds |= dict.fromkeys(("config.json", "tokenizer.json", JSONL, "lock"), Path.is_file)
    try:
        for name, fits in kinds.items():
            path = workdir / name
            if (path.exists() or path.is_symlink()) and not fits(path):
                kind = "folder" if fits is Path.is_dir else "file"
                raise ConfigError(
                    f"{path} is not a {kind}, which a run needs: move it away, or use another "
                    "--workdir"
                )
        _check_permissions(workdir)
    except OSError as error:
        raise ConfigError(
            f"--workdir={shown(str(workdir))} can't be read ({error.strerror}): choose another "
            "folder"
        ) from None


def _check_permissions(workdir: Path) -> None:
    """Refuses a workdir with files that another user has left there, for example root."""
    read, write, enter = os.R_OK, os.W_OK, os.X_OK
    if not workdir.is_dir():
        return  # `create_workdir` makes it.
    me, status = os.geteuid(), workdir.stat()
    # In a folder such as /tmp (sticky), only their owners may replace files.
    sticky = status.st_mode & stat.S_ISVTX and me not in (0, status.st_uid)
    wanted = {workdir: read | write | enter}
    wanted |= {workdir / name: read for name in ("config.json", "tokenizer.json")}
    wanted |= {workdir / name: read | write for name in ("lock", JSONL)}
    folders = [workdir / name for name in (FOLDER, "tensorboard", profiling.FOLDER)]
    wanted |= dict.fromkeys(folders, read | write | enter)
    if os.access(workdir / FOLDER, read | enter, effective_ids=True):
        # Old ones are to be removed.
        steps = [path for path in integrity.steps(workdir / FOLDER) if path.is_dir()]
        wanted |= dict.fromkeys(steps, read | write | enter)
    for path, mode in wanted.items():
        if not path.exists():
            continue
        owner = path.stat().st_uid
        foreign = sticky and path != workdir and owner != me
        if foreign or not os.access(path, mode, effective_ids=True):
            way_out = "make it writable" if owner == me else "change its owner with chown -R"
            raise ConfigError(
                f"--workdir={workdir}: {path} belongs to user {owner}, and user {me} can't read "
                f"and write it: {way_out}, or use another folder"
            )


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
                f"{key} is too large: model.num_layers={model.num_layers} and model.embed_dim="
                f"{model.embed_dim} with {sizes.micro} sequences at once take at least "
                f"{in_bytes(needed)} and a device has {in_bytes(room)}: make them smaller"
            )
    least = memory.least_bytes(setup)
    if least > room:
        raise ConfigError(
            f"model is too large: its state, with optimizer.name={setup.config.optimizer.name!r}, "
            f"and the batch take {in_bytes(least)} and a device has {in_bytes(room)}: use "
            "a smaller model or another optimizer, or several devices and sync.method='sharded'"
        )


def create_workdir(workdir: Path) -> None:
    """Creates the workdir if it doesn't exist, and checks that it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=workdir).close()
    except OSError as error:
        raise ConfigError(
            f"--workdir={workdir} can't be written ({error.strerror}): choose another folder"
        ) from None


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


@contextlib.contextmanager
def locked(workdir: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Locks a workdir against other runs; when a process dies, its lock is released.

    Process 0 holds the lock for all processes of a run. `say` is called with a line of text if the
    disk has no flock.
    """
    if not processes.is_main():
        yield
        return

    def busy(lock: str) -> None:
        dead = f"; if it has died on another machine, remove {lock}" if lock else ""
        raise ConfigError(
            f"--workdir={workdir} is in use by another run: wait until it has ended, or use "
            f"another folder{dead}"
        )

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locks.held(workdir / "lock", busy, say))
        except OSError as error:
            raise ConfigError(
                f"--workdir={workdir} can't be locked ({error.filename}: {error.strerror}): remove "
                "that file, or use another folder"
            ) from None
        yield


def check_disk(workdir: Path, state: Any) -> None:
    """Refuses a disk without room for one more checkpoint beside the existing ones.

    Args:
      workdir: an existing folder.
      state: the arrays that a checkpoint holds, or their shapes and dtypes.
    """
    needed = files.num_bytes(state)
    free = shutil.disk_usage(workdir).free
    if free < needed:
        raise ConfigError(
            f"--workdir={workdir} has {in_bytes(free)} free and a checkpoint takes "
            f"{in_bytes(needed)}: make room, or use another folder"
        )
