"""Exact evaluation on validation splits, during a run or from a checkpoint."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.common import paths
from jaxdp.configs import default
from jaxdp.data import chat, eval_sets, tokenizer
from jaxdp.data.batch import Batch, with_number
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.data.sources import contents
from jaxdp.model.transformer import parameter_shapes
from jaxdp.parallel.replicas import Replicas, prefetch
from jaxdp.run import preflight, same_run
from jaxdp.step.program import pmapped_evaluation
from jaxdp.step.setup import batch_sizes, setup_of_feeds, validate
from jaxdp.workdir import parameters


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of evaluating on one validation split.

    Attributes:
      loss: mean over all tokens, in nats.
      tokens: number of tokens that were predicted.
      tokens_per_byte: tokens per byte of the text; None where the tokens lack much of it.
    """

    loss: float
    tokens: int
    tokens_per_byte: float | None = 1.0

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """The loss in bits per byte of text, comparable between tokenizers; None if unknown.

        Examples:
          >>> round(Evaluation(math.log(16), tokens=1000, tokens_per_byte=0.25).bits_per_byte, 6)
          1.0
        """
        if self.tokens_per_byte is None:
            return None
        return self.loss / math.log(2) * self.tokens_per_byte


# By name of the eval set; "" names the run's own validation split.
Evaluations = dict[str, Evaluation]


def figures(found: Evaluations) -> dict[str, float]:
    """Returns the metrics to log: eval/loss for the validation split, eval/NAME/loss for a set."""
    names = ("loss", "perplexity", "bits_per_byte")
    return {
        "/".join(filter(None, ("eval", of, name))): getattr(evaluation, name)
        for of, evaluation in found.items()
        for name in names
        if getattr(evaluation, name) is not None
    }


def evaluate_all(
    p_eval_step: Callable,
    params: Any,
    feeds: Mapping[str, Feed],
    replicas: Replicas,
    watch: Callable[[Iterable], Iterable] = iter,
) -> Evaluations:
    """Evaluates on the validation split of each feed.

    Args:
      p_eval_step: the result of `program.pmapped_evaluation`.
      params: the parameters, replicated.
      feeds: data by name.
      replicas: the devices.
      watch: wraps an iterable of batches and yields them, for example to report progress.
    """
    found = {}
    for name, feed in feeds.items():
        evaluation = evaluate(p_eval_step, params, watch(feed.evaluation()), replicas)
        found[name] = dataclasses.replace(evaluation, tokens_per_byte=feed.tokens_per_byte)
    return found


def evaluate(
    p_eval_step: Callable, params: Any, batches: Iterable[Batch], replicas: Replicas
) -> Evaluation:
    """Evaluates batches: sums losses and weights over all of them, and divides once.

    Args:
      p_eval_step: the result of `program.pmapped_evaluation`.
      params: the parameters, replicated.
      batches: this process's batches; every process has the same number.
      replicas: the devices.
    """
    # The sums of a batch are fetched after the next is dispatched: the devices never wait, and
    # never more than two steps are in flight (more can deadlock on CPU devices).
    total = np.zeros(2)
    previous = (0.0, 0.0)
    numbered = (with_number(batch, number) for number, batch in enumerate(batches))
    for batch in prefetch(numbered, replicas.shard):
        sums = p_eval_step(params, batch)
        total += jax.device_get(previous)
        previous = sums
    loss_sum, weight_sum = total + jax.device_get(previous)
    return Evaluation(float(loss_sum / max(weight_sum, 1)), round(weight_sum))


def evaluate_checkpoint(
    workdir: str | Path,
    which: str = "newest",
    changes: Mapping[str, Any] | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[int, Evaluations]:
    """Evaluates a checkpoint on the validation split and each of eval_sets.

    Args:
      workdir: the folder of a run.
      which: "newest", "best" (by validation loss), or a number of steps such as "1000".
      changes: {"group.key": value} that replace the run's; see `completed`.
      devices: the devices to evaluate on; all by default.
      say: called with a line of text before something slow, or about a damaged checkpoint.

    Returns:
      The step of the checkpoint, and its evaluations; the validation split's has the name "".

    Raises:
      ConfigError: the workdir, the changes or the data can't be used.
      RunError: the checkpoint is damaged.
    """
    workdir = paths.local("--workdir", workdir)
    saved = configs.load(workdir / "config.json")
    config = completed(saved, changes or {})
    return evaluate_valid(workdir, config, saved, which, devices=devices, say=say)


def evaluate_valid(
    workdir: Path,
    config: ConfigDict,
    saved: ConfigDict,
    which: str,
    *,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] = print,
) -> tuple[int, Evaluations]:
    """Evaluates like `evaluate_checkpoint`, with a config that `completed` has made of `saved`.

    Of another data.path, keys of data that are as the run's apply where they fit its kind.
    """
    same_run.check(config, saved)
    now, before = configs.flatten(config.data, "data."), configs.flatten(saved)
    given = {key for key in now if now[key] != before.get(key, now[key])} - {"data.cache_dir"}
    if given:
        # A tokenizer trained on the new data would not be the run's.
        config.tokenizer = str(workdir / "tokenizer.json")
    if "data.chat_template" not in given:
        chat.take_template(config, workdir)
    replicas = Replicas(devices)
    _fit(config, replicas.device_count)
    own = eval_sets.of_kind(config, given) if "data.path" in given else config
    feed = Feed(own, open_cache(own, say, train=not given))
    preflight.check_split(feed, "validation")
    feeds = {"": feed} | preflight.open_eval_sets(config, feed.cache, say)
    run = _joined(saved, {})
    preflight.say_of_trained_text(own, run, say)
    preflight.say_of_trained_sets(config, say, run)
    setup = setup_of_feeds(feeds, replicas.device_count, 1)
    rows = setup.sizes.micro

    def check(step: int, extra: dict[str, Any]) -> None:
        nonlocal rows
        if not given:
            preflight.check_tokens(feed, step, extra)
        # The run may have had more devices, and so fewer sequences on each.
        rows = min(setup.sizes.micro, extra.get("micro", setup.sizes.micro))

    said = {"tokenizer": tokenizer.digest(feed.cache.tokenizer)}
    params, step = parameters.load_params(
        workdir, parameter_shapes(setup.model), said, say, which=which, check=check
    )
    p_eval_step = pmapped_evaluation(setup, replicas, rows)
    return step, evaluate_all(p_eval_step, replicas.replicate(params), feeds, replicas)


def _fit(config: ConfigDict, device_count: int) -> None:
    """Changes a config, in place, to one for evaluation on so many devices.

    Nothing is synchronised, and `grad_accum_steps` is rounded up to what divides a device's batch.

    Raises:
      ConfigError: the batch can't be split over the devices.
    """
    config.sync.update(default.get_config().sync)
    accum, config.grad_accum_steps = config.grad_accum_steps, 1
    rows = batch_sizes(config, 1, device_count).per_device
    counts = range(min(accum, rows), rows + 1)
    config.grad_accum_steps = next(n for n in counts if rows % n == 0)


def completed(saved: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns a valid config from a saved one, which may be of another version, and changes to it.

    Of other data than the run's, all is for evaluation, unless the changes say how much is.

    Args:
      saved: the result of `config.load`; missing keys get defaults, unknown keys are left out.
      changes: {"group.key": value} that replace saved values.

    Raises:
      ConfigError: the resulting config isn't valid.
    """
    configs.check_known(dict(changes))
    config = _joined(saved, changes)
    config.wandb_project = ""  # Nothing is sent there.
    validate(config)
    now, trained = (list(contents(c.data.path).values()) for c in (config, _joined(saved, {})))
    if now != trained:
        everything = {"data.eval_fraction": 1.0, "eval_max_batches": 0}
        config.update_from_flattened_dict(
            {key: value for key, value in everything.items() if key not in changes}
        )
    return config


def _joined(saved: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """Returns the default config with a saved one's values and changes, as far as it has them."""
    config = default.get_config()
    known = configs.flatten(config)
    with config.ignore_type():
        for flat in (configs.flatten(saved), changes):
            config.update_from_flattened_dict({k: v for k, v in flat.items() if k in known})
    return config
