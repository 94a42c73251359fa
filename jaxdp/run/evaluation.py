"""Exact passes over validation splits: of a run under way, or of a checkpoint."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from jaxdp.common import config as configs
from jaxdp.configs import default
from jaxdp.data import tokenizer
from jaxdp.data.batch import Batch, with_number
from jaxdp.data.cache import open_cache
from jaxdp.data.feed import Feed
from jaxdp.model.transformer import parameter_shapes
from jaxdp.parallel.replicas import Replicas, prefetch
from jaxdp.run import preflight
from jaxdp.step.objective import Objective
from jaxdp.step.setup import batch_sizes, setup_of_feeds, validate
from jaxdp.workdir import checkpoints


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of a pass.

    Attributes:
      loss: mean over tokens, nats.
      tokens: how many there were.
      tokens_per_byte: of the text.
    """

    loss: float
    tokens: int
    tokens_per_byte: float = 1.0

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where that is beyond a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of text, comparable between tokenizers.

        Examples:
          >>> round(Evaluation(math.log(16), tokens=1000, tokens_per_byte=0.25).bits_per_byte, 6)
          1.0
        """
        return self.loss / math.log(2) * self.tokens_per_byte


# By name of the set; that of the validation split is "".
Evaluations = dict[str, Evaluation]


def figures(found: Evaluations) -> dict[str, float]:
    """As they are logged: eval/loss of the validation split, eval/NAME/loss of a set, ..."""
    names = ("loss", "perplexity", "bits_per_byte")
    return {
        "/".join(filter(None, ("eval", of, name))): getattr(evaluation, name)
        for of, evaluation in found.items()
        for name in names
    }


def compiled(model: Any, objective: Objective, replicas: Replicas) -> Callable:
    """The pmapped `Objective.eval_step` of a model."""
    return replicas.pmap(functools.partial(objective.eval_step, apply_fn=model.apply))


def evaluate_all(
    p_eval_step: Callable,
    params: Any,
    feeds: Mapping[str, Feed],
    replicas: Replicas,
    watch: Callable[[Iterable], Iterable] = iter,
) -> Evaluations:
    """Evaluates on the validation split of each feed, in one pass.

    Args:
      p_eval_step: of `compiled`.
      params: replicated.
      feeds: by name.
      replicas: the devices.
      watch: gives on what it is given; hears so that there is progress.
    """
    found = {}
    for name, feed in feeds.items():
        evaluation = evaluate(p_eval_step, params, watch(feed.evaluation()), replicas)
        found[name] = dataclasses.replace(evaluation, tokens_per_byte=feed.cache.tokens_per_byte)
    return found


def evaluate(
    p_eval_step: Callable, params: Any, batches: Iterable[Batch], replicas: Replicas
) -> Evaluation:
    """Sums losses and weights over all batches and divides once.

    Args:
      p_eval_step: of `compiled`.
      params: replicated.
      batches: this process's part; equally many on every process.
      replicas: the devices.
    """
    # The sums of one batch are read after the next is dispatched: the devices never wait, and
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
    """Evaluates a checkpoint.

    Args:
      workdir: of a run.
      which: "newest", "best" or a number of steps.
      changes: {"group.key": value}, in place of the run's; with other data, the run's tokenizer.
      devices: to evaluate on; all by default.
      say: is told in a line what takes time, or is wrong with a checkpoint.

    Returns:
      The step of the checkpoint, and the evaluation of the validation split and each of eval_sets.

    Raises:
      ConfigError: the workdir, the changes or the data are not fit for use.
      RunError: the checkpoint is damaged.
    """
    workdir, changes = Path(workdir), dict(changes or {})
    saved = configs.load(workdir / "config.json")
    config = completed(saved, changes)
    preflight.check_same_run(config, saved)
    other = any(key.startswith("data.") and key != "data.cache_dir" for key in changes)
    if other:
        # The tokenizer could be made from the data.
        config.tokenizer = str(workdir / "tokenizer.json")
    replicas = Replicas(devices)
    batch_sizes(config, 1, replicas.device_count)
    feed = Feed(config, open_cache(config, say, train=not other))
    preflight.check_split(feed, "validation")
    feeds = {"": feed} | preflight.open_eval_sets(config, feed.cache, say)
    setup = setup_of_feeds(feeds, replicas.device_count, 1)

    def fits(step: int, extra: dict[str, Any]) -> None:
        if not other:
            preflight.same_tokens(feed, step, extra)

    said = {"tokenizer": tokenizer.digest(feed.cache.tokenizer)}
    params, step = checkpoints.load_params(
        workdir, parameter_shapes(setup.model), said, say, which=which, check=fits
    )
    p_eval_step = compiled(setup.model, setup.objective, replicas)
    return step, evaluate_all(p_eval_step, replicas.replicate(params), feeds, replicas)


def completed(saved: ConfigDict, changes: Mapping[str, Any]) -> ConfigDict:
    """A valid config of what `config.load` read, which may be of another version, and some changes.

    Args:
      saved: keys it lacks get their defaults; those that are unknown now are left out.
      changes: {"group.key": value}.

    Raises:
      ConfigError: it isn't valid.
    """
    config = default.get_config()
    known = configs.flatten(config)
    configs.check_known(dict(changes))
    with config.ignore_type():
        for flat in (configs.flatten(saved), changes):
            config.update_from_flattened_dict({k: v for k, v in flat.items() if k in known})
    validate(config)
    return config
